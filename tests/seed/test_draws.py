"""The draws are bnaffine-init-v1: every golden vector of its specification, and what its rules say of streams."""

import hashlib
import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import timm
import torch

from bn_affine_adapters.seed import draws
from bn_affine_adapters.seed.fingerprint import fingerprint, sampled

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "init-v1.json").read_text(encoding="utf-8"))
Q_SHOWN = "Q[0],Q[1],Q[16384],Q[32766],Q[32767]"
CHUNK = 2**20


def word(value):
    """Return a float32's bits as the vectors spell them: eight hex digits."""
    return f"{np.float32(value).view(np.uint32):08x}"


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<f4").tobytes()).hexdigest()


def stream(seed, name, chunk):
    """Return a whole chunk of codes, written a second time: pairs of SHAKE-128's bytes, the low one first."""
    key = b"bnaffine-init-v1\n" + str(seed).encode() + b"\n" + str(chunk).encode() + b"\n" + name.encode("utf-8")
    octets = np.frombuffer(hashlib.shake_128(key).digest(2 * CHUNK), dtype=np.uint8).astype(np.int64)
    return octets[::2] + 256 * octets[1::2]


def scale_of(case):
    """Return a weight's scale, written a second time from the specification's part 4."""
    fan = math.prod(case["shape"][1:]) if case["mode"] == "fan_in" else case["shape"][0] * math.prod(case["shape"][2:])
    squared = case["gain2"] / fan
    return math.sqrt(3 * squared if case["dist"] == "uniform" else squared)


def test_the_vectors_have_as_many_cases_as_their_specification():
    assert GOLDEN["spec"] == draws.SCHEME == "bnaffine-init-v1"
    counts = {key: len(GOLDEN[key]) for key in ("codes", "weights")}
    assert counts == {"codes": 5, "weights": 6}
    known = {"spec", "normal_table_sha256", Q_SHOWN, "codes", "weights", "resnet50", "gamma_unit", "bias"}
    known |= {"by_class"}  # read by test_rules.py
    assert set(GOLDEN) == known, "the vectors hold a part that no test reads"


def test_the_normal_table_is_the_golden_one():
    table = draws.quantiles()
    assert table.size == 32768
    assert hashlib.sha256(table.astype("<i4").tobytes()).hexdigest() == GOLDEN["normal_table_sha256"]
    assert GOLDEN["normal_table_sha256"] == draws.NORMAL_TABLE_SHA256
    assert table[[0, 1, 16384, 32766, 32767]].tolist() == GOLDEN[Q_SHOWN]


def test_a_machine_with_another_normal_distribution_is_refused(monkeypatch):
    class Skewed(NormalDist):
        def inv_cdf(self, p):
            return super().inv_cdf(p) * (1 + 1e-6)

    monkeypatch.setattr(draws, "NormalDist", Skewed)
    with pytest.raises(RuntimeError, match=draws.NORMAL_TABLE_SHA256):
        draws.quantiles.__wrapped__()


def test_the_sine_table_is_exact():
    found = draws.sines().tolist()
    assert found == [round(2**20 * math.sin(math.tau * (c + 0.5) / 65536)) for c in range(65536)]
    # No rounding depends on the last digits of this machine's sine: each is a hundred thousand of them from a half.
    parts = [2**20 * math.sin(math.tau * (c + 0.5) / 65536) for c in range(65536)]
    assert min(abs(part - math.floor(part) - 0.5) for part in parts) > 1e5 * 2**20 * 2**-53


def test_a_machine_with_other_sines_is_refused(monkeypatch):
    monkeypatch.setattr(draws, "SINE_TABLE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="0" * 64):
        draws.sines.__wrapped__()


@pytest.mark.parametrize("case", GOLDEN["codes"], ids=lambda case: f"{case['seed']}-{case['name']}-{case['chunk']}")
def test_the_first_codes_of_a_stream_are_the_golden_ones(case):
    found = draws.codes(case["seed"], case["name"], case["chunk"], 8)
    assert found.tolist() == case["first8"]
    assert found.dtype == np.uint16
    assert stream(case["seed"], case["name"], case["chunk"])[:8].tolist() == case["first8"]


@pytest.mark.parametrize("case", GOLDEN["weights"], ids=lambda case: f"{case['name']}-{case['dist']}-{case['mode']}")
def test_a_weight_is_the_golden_one(case):
    scale = scale_of(case)
    assert float(np.float32(scale)) == float.fromhex(case["scale_f32_hex"])
    array = draws.draw(tuple(case["shape"]), case["seed"], case["name"], case["dist"], scale)
    assert (array.shape, array.dtype) == (tuple(case["shape"]), np.float32)
    flat = array.reshape(-1)
    assert [word(value) for value in flat[:4]] == case["first4_f32_bits"]
    assert word(flat[-1]) == case["last_f32_bits"]
    assert digest(array) == case["sha256_le_f32"]


@pytest.mark.parametrize(("key", "distribution"), [("gamma_unit", "unit"), ("bias", "uniform")])
def test_gamma_and_a_bias_are_the_golden_ones(key, distribution):
    case = GOLDEN[key]
    scale = math.sqrt(1 / case["fan_in_of_weight"]) if key == "bias" else 1.0
    array = draws.draw(tuple(case["shape"]), case["seed"], case["name"], distribution, scale)
    assert [word(value) for value in array[:4]] == case["first4_f32_bits"]
    assert digest(array) == case["sha256_le_f32"]


@pytest.fixture(scope="module")
def resnet50_weights():
    """All of ResNet-50's weights drawn from seed 0: torchvision's names and timm's are the same."""
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    return {n: draws.draw(s, 0, n, "normal", math.sqrt(2 / math.prod(s[1:]))) for n, s in shapes.items()}


def test_resnet50_has_the_golden_fingerprints(resnet50_weights):
    case = GOLDEN["resnet50"]
    assert (case["seed"], case["dist"], case["mode"]) == (0, "normal", "fan_in")
    assert len(resnet50_weights) == 54
    assert sum(array.size for array in resnet50_weights.values()) == 25_502_912
    found = fingerprint(resnet50_weights)
    assert found.full == case["fingerprint"]
    assert found.sampled == sampled(resnet50_weights) == case["sample4096"]


def test_the_golden_fingerprint_tells_another_seed(resnet50_weights):
    name = "layer1.0.conv1.weight"
    shape = resnet50_weights[name].shape
    other = resnet50_weights | {name: draws.draw(shape, 1, name, "normal", math.sqrt(2 / math.prod(shape[1:])))}
    found = fingerprint(other)
    assert found.full != GOLDEN["resnet50"]["fingerprint"]
    assert found.sampled != GOLDEN["resnet50"]["sample4096"]


# What z(c) is, written a second time, a code at a time.
INVERSE = NormalDist().inv_cdf
Z = {
    "normal": lambda c: math.copysign(round(2**20 * INVERSE((max(c, 65535 - c) + 0.5) / 65536)), c - 32767.5) / 2**20,
    "uniform": lambda c: (2 * c - 65535) / 2**16,
    "sign": lambda c: 1.0 if c >= 32768 else -1.0,
    "unit": lambda c: (2 * c + 1) / 2**17,
}


@pytest.mark.parametrize("distribution", Z)
def test_a_table_holds_the_exact_value_of_every_code(distribution):
    table = draws.table(distribution)
    expected = [Z[distribution](c) for c in range(65536)]
    assert len(expected) == len(table) == 65536
    # Python floats have 53 bits: equality says that binary32 holds each value exactly.
    assert table.astype(np.float64).tolist() == expected
    assert (np.diff(table) >= 0).all()


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sign"])
def test_a_distribution_is_symmetric_about_zero(distribution):
    table = draws.table(distribution)
    assert (table == -table[::-1]).all()


def test_unit_lies_strictly_between_zero_and_one():
    table = draws.table("unit")
    assert 0 < table.min() < table.max() < 1


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 65537])
def test_values_around_the_chunk_boundary_follow_the_codes(size):
    name, scale = "fc.weight", 0.1
    values = draws.draw((size,), 5, name, "uniform", scale)
    codes = np.concatenate([stream(5, name, 0), stream(5, name, 1)])[:size]
    expected = ((2 * codes - 65535) / 2**16).astype(np.float32) * np.float32(scale)
    assert np.array_equal(values, expected)
    assert values.size == size


def test_a_chunk_begins_a_stream_of_its_own():
    values = draws.draw((CHUNK + 4,), 0, "fc.weight", "unit")
    assert not np.array_equal(values[CHUNK:], values[:4])
    assert np.array_equal(values[CHUNK:], draws.table("unit")[draws.codes(0, "fc.weight", 1, 4)])


@pytest.mark.parametrize("size", [0, 1, 2, draws.BLOCK - 1, draws.BLOCK, draws.BLOCK + 1, 3 * draws.BLOCK + 17])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(size):
    longer = draws.draw((4 * draws.BLOCK,), 3, "conv1.weight", "normal", 0.5)
    assert np.array_equal(draws.draw((size,), 3, "conv1.weight", "normal", 0.5), longer[:size])


@pytest.mark.parametrize("block", [1 << 10, 1000, 1 << 20])
def test_the_block_size_changes_no_value(block, monkeypatch):
    before = draws.draw((200_003,), 3, "conv1.weight", "normal", 0.5)
    monkeypatch.setattr(draws, "BLOCK", block)
    assert np.array_equal(draws.draw((200_003,), 3, "conv1.weight", "normal", 0.5), before)


def test_the_shape_is_not_part_of_the_key():
    flat = draws.draw((24,), 0, "x", "unit")
    for shape in [(2, 3, 4), (24, 1), (4, 6)]:
        assert np.array_equal(draws.draw(shape, 0, "x", "unit").reshape(-1), flat)


def test_a_scalar_has_one_value():
    assert draws.draw((), 0, "x", "unit").shape == ()
    assert draws.draw((), 0, "x", "unit") == draws.draw((1,), 0, "x", "unit")[0]


@pytest.mark.parametrize(
    ("seed", "name"), [(1, "conv1.weight"), (10, "conv1.weight"), (0, "conv1.weight "), (0, "conv2.weight")]
)
def test_another_seed_or_name_gives_other_values(seed, name):
    here, there = draws.draw((1000,), 0, "conv1.weight", "unit"), draws.draw((1000,), seed, name, "unit")
    assert (here != there).mean() > 0.99


def test_the_scale_is_rounded_before_it_multiplies():
    # A scale whose binary32 rounding changes products: z * RNE32(scale), not RNE32(z * scale).
    scale = math.sqrt(2 / 147)
    z = draws.draw((10_000,), 0, "conv1.weight", "normal")
    found = draws.draw((10_000,), 0, "conv1.weight", "normal", scale)
    assert np.array_equal(found, z * np.float32(scale))
    late = (z.astype(np.float64) * scale).astype(np.float32)
    assert (found != late).any(), "this scale cannot tell the two roundings apart"


def test_fill_writes_in_place_and_nowhere_else():
    memory = np.full(100, -1, dtype=np.float32)
    draws.fill(memory[10:20], 0, "x", "unit")
    assert (np.delete(memory, np.arange(10, 20)) == -1).all()
    assert np.array_equal(memory[10:20], draws.draw((10,), 0, "x", "unit"))
