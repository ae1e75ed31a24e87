"""Mutated compact files: each loads to a verified network or raises our error; none crashes, hangs or takes the memory.

BNAA_FUZZ=2000 runs so many, BNAA_FUZZ_SEED=1 others. They are loaded in a process of their own, which may die.
"""

import json
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_fuzz import (
    AT,
    BASES,
    COUNT,
    ON_CONFIG,
    ON_HEADER,
    RARELY,
    REFUSED,
    SEED,
    Server,
    change_bytes,
    change_config,
    complaint,
    mutated_tensors,
)

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.fold import copies, parameters
from bn_affine_adapters.adapter.rebuild import verify
from bn_affine_adapters.sharing.compact import BITS, METADATA

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc/self")

KINDS = ("cifar", "resnet", "vit")
ON_VALUES = st.one_of(
    st.tuples(st.just("byte"), AT, st.integers(0, 255)),
    st.tuples(st.just("fill"), AT, st.integers(0, 255)),
    st.tuples(st.just("cut"), AT, st.integers(0, 255)),
    st.tuples(st.just("append"), AT, st.integers(0, 255)),
)
BITS_AND_VERSION = st.tuples(
    st.sampled_from(["bits", "version"]), st.sampled_from([*BITS, 0, 1, 2, 5, -8, 2**70, 8.0, None, "8", True, [8]])
)
CASES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([8, 16]),
    st.lists(ON_CONFIG, max_size=2) | st.just([]),
    st.lists(BITS_AND_VERSION, max_size=1) | st.just([]) | st.just([]),
    st.lists(ON_VALUES, max_size=2),
    st.booleans(),  # whether the stranger writes the digest of the changed values too
    st.lists(ON_HEADER, max_size=1) | st.just([]) | st.just([]),
    RARELY,
)


@cache
def originals():
    """A compact file of each network and number of bits, made once."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in KINDS:
            architecture, args, config, side = BASES[name]
            torch.manual_seed(0)
            data = {"data_config": {"input_size": [3, side, side]}}
            model = get_bn_only_model(timm.create_model(architecture, **args), BNOnlyConfig(seed=0, **config, **data))
            for bits in (8, 16):
                file = export(model.eval(), Path(folder, f"{name}{bits}.safetensors"), format="compact", bits=bits)
                found[name, bits] = file.read_bytes()
    return found


def change_values(data, op, at, value):
    """Return changed bytes of the tensor; the first 64 are digests."""
    at %= max(len(data), 1)
    if op == "byte":
        return data[:at] + bytes([value]) + data[at + 1 :]
    if op == "fill":
        return data[:at] + bytes([value]) * 8 + data[at + 8 :]
    return data[:at] if op == "cut" else data + bytes([value]) * (1 + at % 9)


def redigested(bits, data, original):
    """Return the bytes with the digest of their values, if they can be decoded; the number of tensors is known."""
    count = original["tensors"]
    with suppress(Exception):
        grid = np.frombuffer(data[64 : 64 + 2 * count], "<f2").astype("<f4")
        codes = np.frombuffer(data[64 + 2 * count :], {8: "u1", 16: "<u2"}[bits]).astype("<f4") - 2 ** (bits - 1)
        values = codes.astype("<f4") * np.repeat(grid, original["sizes"])
        return data[:48] + sha256(values.astype("<f4").tobytes()).digest()[:16] + data[64:]
    return data


@cache
def layout(name):
    """Return how many values each tensor of a file has."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.safetensors")
        file.write_bytes(originals()[name, 8])
        model = load_bn_only_model(file)
        held = parameters(copies(model.get_base_model(), "default", model.peft_config["default"]))
    sizes = [tensor.numel() for tensor in held.values()]
    return {"tensors": len(sizes), "sizes": sizes}


def mutate(case):
    """Return the bytes of a compact file."""
    name, bits, on_config, on_format, on_values, redo, on_header, on_bytes = case
    content = originals()[name, bits]
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    chosen = json.loads(header["__metadata__"][METADATA])
    for op in on_config:
        change_config(chosen, *op)
    chosen.update(on_format)
    text = json.dumps(chosen)
    for deep in (1, 5, 100, 900, 20_000):
        text = text.replace(f'"@{deep}@"', "[" * deep + "]" * deep)
    for op in on_values:
        data = change_values(data, *op)
    if redo:
        data = redigested(bits, data, layout(name))
    header["__metadata__"][METADATA] = text
    header["values"] |= {"shape": [len(data)], "data_offsets": [0, len(data)]}
    head = json.dumps(header).encode()
    whole = mutated_tensors(len(head).to_bytes(8, "little") + head + data, on_header, [])
    for op in on_bytes:
        whole = change_bytes(whole, *op)
    return whole


def load(file, side):
    """Return "loaded", the class of our error, or what is wrong."""
    try:
        model = load_bn_only_model(file)
    except BNAdapterError as error:
        whole = error.what and error.seen and error.do and "\x1b" not in str(error)
        return type(error).__name__ if whole else f"not as our errors are: {error!r}"
    except Exception as error:
        return "foreign: " + "".join(traceback.format_exception(error))[-3000:]
    found = model.peft_config["default"]
    if found.verify != "full" or not found.compact or len(found.backbone_fingerprint) != 64:
        return f"not verified: verify={found.verify}, compact={found.compact}"
    verify(model.get_base_model(), found)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        return "not finite"
    try:
        logits = model(torch.zeros(1, found.model_args.get("in_chans", 3), side, side))
    except Exception as error:  # a setting that changes no tensor and verifies, such as another stride
        return f"loaded, but takes no image of {side}: {type(error).__name__}"
    return "loaded" if logits.shape[0] == 1 and logits.is_floating_point() else f"strange logits {tuple(logits.shape)}"


def test_mutated_compact_files_load_to_a_verified_network_or_are_refused(tmp_path):
    outcomes, file = Counter(), tmp_path / "mutated.safetensors"
    server = Server(load, limit=30)

    @seed(SEED)
    @settings(
        max_examples=COUNT,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=CASES)
    def check(case):
        file.write_bytes(mutate(case))
        outcome, seconds, grown = server.ask(str(file), BASES[case[0]][3])
        outcomes[outcome.partition(":")[0]] += 1
        wrong = complaint(outcome, seconds, grown, server.limit)
        assert wrong is None, f"{wrong}\nthe file is {file}, made by mutate({case!r})"

    try:
        check()
    finally:
        server.stop()
        print(outcomes)
    assert outcomes.total() >= 0.95 * COUNT
    assert outcomes["loaded"] >= COUNT / 50, "hardly any mutated file loads: nothing is looked at in depth"
    assert len([outcome for outcome in outcomes if outcome in REFUSED]) >= 5, outcomes


def test_the_digest_that_a_stranger_writes_is_that_of_the_file():
    for (name, bits), original in originals().items():
        content = mutate((name, bits, [], [], [], True, [], []))
        mutated, whole = (each[8 + int.from_bytes(each[:8], "little") :] for each in (content, original))
        assert mutated == whole
