"""The fingerprint has its specification's format, notices one flipped bit, and names the first layer that differs."""

import hashlib
import math
import struct

import numpy as np
import pytest
import timm
import torch

from bn_affine_adapters import reinit_
from bn_affine_adapters.seed.fingerprint import DIGEST, SAMPLE, fingerprint, first_difference, float32, layout, sampled

# In the order of a network's definition, which is not that of their bytes: Z, a, head, stem, Ö.
SHAPES = {
    "stem.weight": (4, 3, 3, 3),
    "Öse.weight": (64, 65),
    "blocks.10.weight": (16, 300),
    "blocks.9.weight": (5000,),
    "Z": (1,),
    "a": (4096,),
    "head.fc.bias": (4097,),
}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def flipped(arrays, name, index, bit=0):
    """Return the arrays with one bit of one value flipped."""
    changed = arrays[name].copy()
    changed.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
    return arrays | {name: changed}


def written_again(arrays, sample):
    """Compute the format a second time, from the specification's words."""
    text = f"bnaffine-fp-v1 sample={sample}\n".encode()
    for name in sorted(arrays, key=lambda n: n.encode("utf-8")):
        values = arrays[name].flatten().tolist()
        step = 1 if sample is None else max(1, math.ceil(len(values) / sample))
        octets = struct.pack(f"<{len(values[::step])}f", *values[::step])
        shape = ",".join(str(n) for n in arrays[name].shape)
        text += f"{name}\tfloat32\t{shape}\t{hashlib.sha256(octets).hexdigest()}\n".encode()
    return hashlib.sha256(text).hexdigest()


def test_the_format_is_the_specifications():
    found = fingerprint(tensors())
    assert found.full == written_again(tensors(), None)
    assert found.sampled == sampled(tensors()) == written_again(tensors(), 4096)
    assert SAMPLE == 4096


def test_the_fingerprint_of_nothing_is_that_of_the_header():
    assert fingerprint({}).full == hashlib.sha256(b"bnaffine-fp-v1 sample=None\n").hexdigest()
    assert fingerprint({}).tensors == ""


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)], ids=str)
def test_a_tensor_without_dimensions_or_values_has_its_own_line(shape):
    arrays = {"scale": float32(torch.zeros(shape))}
    assert arrays["scale"].shape == shape
    assert fingerprint(arrays).full == written_again({"scale": np.zeros(shape, np.float32)}, None)


def test_the_digests_are_each_tensors_own_in_the_order_of_bytes():
    arrays = tensors()
    digests = [hashlib.sha256(arrays[n].tobytes()).hexdigest()[:8] for n in sorted(arrays, key=str.encode)]
    assert fingerprint(arrays).tensors == "".join(digests)
    assert (DIGEST, len(digests)) == (8, 7)


def test_the_order_of_the_mapping_does_not_matter():
    arrays = tensors()
    assert fingerprint(dict(reversed(arrays.items()))) == fingerprint(arrays)


@pytest.mark.parametrize("bit", [0, 1, 22, 23, 31])
def test_one_flipped_bit_changes_the_full_fingerprint(bit):
    arrays = tensors()
    before = fingerprint(arrays).full
    tried = [(name, index) for name in arrays for index in {0, arrays[name].size // 2, arrays[name].size - 1}]
    changed = [fingerprint(flipped(arrays, name, index, bit)).full for name, index in tried]
    assert before not in changed
    assert len(set(changed)) == len(tried) == 19


def test_a_negative_zero_is_another_value_than_zero():
    zero = np.zeros(3, np.float32)
    assert fingerprint({"a": zero}).full != fingerprint({"a": -zero}).full


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {k: v for k, v in a.items() if k != "Z"},
        lambda a: a | {"extra": np.zeros(1, np.float32)},
        lambda a: {("stem.kernel" if k == "stem.weight" else k): v for k, v in a.items()},
        lambda a: a | {"stem.weight": a["stem.weight"].reshape(4, 27)},
        lambda a: a | {"a": a["a"][::-1]},
    ],
    ids=["missing", "extra", "renamed", "reshaped", "reversed"],
)
def test_another_set_of_tensors_has_another_fingerprint(change):
    before, after = fingerprint(tensors()), fingerprint(change(tensors()))
    assert after.full != before.full
    assert after.sampled != before.sampled


def test_the_sampled_form_sees_every_value_of_a_tensor_of_4096():
    before = sampled(tensors())
    assert all(sampled(flipped(tensors(), "a", index)) != before for index in range(0, 4096, 5))


def test_the_sampled_form_misses_by_design_a_word_between_its_steps():
    # 5,000 values, every second of which is read.
    before, after = fingerprint(tensors()), fingerprint(flipped(tensors(), "blocks.9.weight", 4999, bit=30))
    assert after.sampled == before.sampled
    assert after.full != before.full
    assert fingerprint(flipped(tensors(), "blocks.9.weight", 4998)).sampled != before.sampled


def test_the_sampled_form_catches_a_drift_of_the_seed():
    arrays = tensors()
    found = {sampled(arrays | {name: tensors(seed=1)[name]}) for name in arrays}
    assert sampled(arrays) not in found
    assert len(found) == 7


def test_a_redrawn_networks_fingerprint_follows_its_seed():
    def of(seed):
        model = reinit_(timm.create_model("cifar_resnet14"), seed)
        return fingerprint({name: float32(p) for name, p in model.named_parameters()})

    first, second, again = of(0), of(1), of(0)
    assert again == first
    assert second.full != first.full
    assert second.sampled != first.sampled


def test_the_first_difference_is_the_first_in_the_order_of_the_definition():
    names, ours = list(SHAPES), fingerprint(tensors())
    assert names != sorted(names, key=str.encode)
    for first in range(len(names)):
        others = tensors() | {name: tensors(seed=1)[name] for name in names[first:]}
        assert first_difference(names, ours.tensors, fingerprint(others).tensors) == names[first]
    assert len(names) == 7


@pytest.mark.parametrize("name", SHAPES)
def test_the_only_difference_is_named(name):
    ours, theirs = fingerprint(tensors()), fingerprint(flipped(tensors(), name, 0))
    assert first_difference(list(SHAPES), ours.tensors, theirs.tensors) == name


def test_equal_digits_name_no_tensor_and_too_few_the_first():
    digits = fingerprint(tensors()).tensors
    assert first_difference(list(SHAPES), digits, digits) not in SHAPES
    assert first_difference(list(SHAPES), digits, "") in SHAPES
    assert first_difference(list(SHAPES), digits, "abc") in SHAPES


def test_the_layout_is_a_hash_of_names_shapes_and_scheme():
    lines = "".join(f"{n}\t{','.join(map(str, SHAPES[n]))}\n" for n in sorted(SHAPES, key=str.encode))
    expected = hashlib.sha256(f"bnaffine-layout-v1 bnaffine-init-v1\n{lines}".encode()).hexdigest()
    assert layout(SHAPES, "bnaffine-init-v1") == expected
    assert layout(dict(reversed(SHAPES.items())), "bnaffine-init-v1") == expected


def test_the_layout_tells_names_shapes_and_schemes_apart():
    renamed = {("stem.kernel" if name == "stem.weight" else name): shape for name, shape in SHAPES.items()}
    reshaped = SHAPES | {"stem.weight": (4, 27)}
    shorter = {name: shape for name, shape in SHAPES.items() if name != "Z"}
    found = {layout(shapes, "bnaffine-init-v1") for shapes in (SHAPES, renamed, reshaped, shorter)}
    found.add(layout(SHAPES, "bnaffine-init-v2"))
    assert len(found) == 5


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.arange(120.0).view(5, 4, 3, 2).permute(3, 2, 1, 0),
        torch.arange(240.0).view(2, 3, 4, 10)[..., ::2],
        torch.arange(120).view(2, 3, 4, 5),
        torch.arange(120.0).view(2, 3, 4, 5).bfloat16(),
        torch.nn.Parameter(torch.arange(120.0).view(2, 3, 4, 5)),
    ],
    ids=["channels_last", "permuted", "strided", "integers", "bfloat16", "parameter"],
)
def test_values_are_read_in_row_major_order_as_float32(tensor):
    found = float32(tensor)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.dtype("<f4"), (2, 3, 4, 5), True)
    assert found.flatten().tolist() == [float(v) for v in tensor.detach().reshape(-1).tolist()]
