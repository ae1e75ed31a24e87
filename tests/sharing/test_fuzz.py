"""Mutated adapters: each loads to a verified network or raises our error; none crashes, hangs, or takes the memory.

BNAA_FUZZ=10000 runs so many, BNAA_FUZZ_SEED=1 others. They are loaded in a process of their own, which may die.
"""

import ctypes
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import peft
import psutil
import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load as parse

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.limits import BUILD_SECONDS
from bn_affine_adapters.adapter.rebuild import verify
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.settings import bare

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc/self")

COUNT = int(os.environ.get("BNAA_FUZZ", "150"))
SEED = int(os.environ.get("BNAA_FUZZ_SEED", "0"))
LOADS = 30  # a mutated adapter may take the constructor's limit, and so many times what an honest one takes here
BYTES = 1_000_000_000
# name: (architecture, creation arguments, configuration, side of an image)
BASES = {
    "cifar": ("cifar_resnet14", {}, {}, 32),
    "resnet": ("test_resnet", {"num_classes": 3}, {"train_head": True}, 32),
    "efficientnet": ("test_efficientnet", {"num_classes": 3}, {"train_head": True, "label_names": ["a", "b", "c"]}, 32),
    "vit": ("test_vit", {"num_classes": 3, "img_size": 32}, {}, 32),
    "control": ("test_resnet", {}, {"control": "two_weights", "train_gamma": False, "train_beta": False}, 32),
}
DOORS = ("load", "load", "load", "load", "load", "load", "given", "peft", "peft", "add")


# -- what is loaded: real adapters, and what is done to them


@cache
def originals():
    """The files of `adapters`, made once."""
    with tempfile.TemporaryDirectory() as folder:
        return adapters(Path(folder))


def adapters(folder):
    for name, (architecture, args, config, _) in BASES.items():
        torch.manual_seed(0)
        network = timm.create_model(architecture, **args)
        get_bn_only_model(network, BNOnlyConfig(seed=0, **config)).save_pretrained(folder / name)
    return {n: [(folder / n / f).read_bytes() for f in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)] for n in BASES}


SMALL = (
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "test_convnext",
    "test_byobnet",
    "cifar_resnet20",
    "cifar_vgg11",
)
TEXTS = ["", "x", "bn1", "fc", "conv1", "conv1.0", "layer1", "(a+)+$", ".*", "../../x", "/etc/passwd", "hf-hub:x/y"]
TEXTS += ["local-dir:/tmp", "resnet18.hf-hub:x", "https://x/y", "\x1b[31m", "a\nb", "\ud800", "é" * 99, "a" * 99_999]
TEXTS += ["0", "full", "off", "BN_ONLY", "LORA", "custom", "relu", "avg", "cpu", *SMALL]
TEXT = st.sampled_from(TEXTS)
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 1000, 99_999, 10**6, 2**31, 2**40, 2**63, 2**64, 10**30, 10**400]
NUMBERS += [0.0, -0.5, 0.1, 1e-300, 1e300, float("nan"), float("inf"), True, False]
ANY = st.recursive(
    st.none() | st.sampled_from(NUMBERS) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = """
num_classes in_chans img_size global_pool drop_rate drop_path_rate act_layer norm_layer output_stride patch_size depth
depths embed_dim num_heads layers channels block stem_type stem_width mlp_ratio window_size bn_eps qkv_bias pretrained
checkpoint_path pretrained_cfg features_only feature_cfg class_token pos_embed block_args cardinality x
"""
TYPES = "F64 F32 F16 BF16 I64 I32 I8 U8 BOOL F8_E4M3 F8_E5M2 U64 C64 F4 X"
ARGS = st.sampled_from(ARGUMENTS.split())
KEYS = st.sampled_from([*sorted(BNOnlyConfig(seed=0).to_dict()), "verify", "cls", "self", "runtime_config", "x"])
AT = st.integers(0, 2**16)
ON_CONFIG = st.one_of(
    st.tuples(st.just("set"), KEYS, ANY),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("swap"), KEYS, KEYS),
    st.tuples(st.just("wrap"), KEYS, st.sampled_from([1, 5, 100, 900, 20_000])),
    st.tuples(st.just("repeat"), KEYS, st.sampled_from([2, 1000, 100_000])),
    st.tuples(st.just("digit"), KEYS, AT),
    st.tuples(st.just("item"), KEYS, AT, TEXT),
    st.tuples(st.just("drop"), KEYS, AT),
    st.tuples(st.just("argument"), ARGS, ANY),
    st.tuples(st.just("small number"), ARGS, st.integers(-2, 64)),
    st.tuples(st.just("architecture"), st.sampled_from(SMALL)),
)
TEXT_BYTES = st.tuples(st.sampled_from(["flip", "cut", "double", "insert"]), AT, st.integers(0, 255))
RARELY = st.one_of(st.just([]), st.just([]), st.just([]), st.just([]), st.just([]), st.tuples(TEXT_BYTES))
DTYPES = st.sampled_from(TYPES.split()) | ANY
SIZES = st.lists(st.sampled_from([0, 1, 2, 16, 2**20, 2**40, 2**63, 2**64, -1]), max_size=4) | ANY
ON_HEADER = st.one_of(
    st.tuples(st.just("dtype"), AT, DTYPES),
    st.tuples(st.just("shape"), AT, SIZES),
    st.tuples(st.just("data_offsets"), AT, st.lists(st.sampled_from([0, 4, 64, 10**6, 2**63, -4]), max_size=3) | ANY),
    st.tuples(st.just("rename"), AT, TEXT | st.sampled_from(["base_model.model.conv1.weight", "a" * 10**6])),
    st.tuples(st.just("bare"), AT),
    st.tuples(st.just("exchange"), AT, AT),
    st.tuples(st.just("forget"), AT),
    st.tuples(st.just("empty"), TEXT, SIZES),
    st.tuples(st.just("metadata"), ANY),
    st.tuples(st.just("as double"), AT, st.sampled_from([1e300, 0.5, float("nan")])),
    st.tuples(st.just("fill"), AT, st.integers(0, 255)),
    st.tuples(st.just("length"), st.sampled_from([0, 1, -1, 100, 10**6, 2**40, 2**63])),
)
CASES = st.tuples(
    st.sampled_from(sorted(BASES)),
    st.sampled_from(DOORS),
    st.lists(ON_CONFIG, max_size=3),
    RARELY,
    st.lists(ON_HEADER, max_size=2) | st.just([]),
    RARELY,
)


def change_config(content, op, key, *how):
    value = content.get(key)
    if op == "set":
        content[key] = how[0]
    elif op == "delete":
        content.pop(key, None)
    elif op == "swap":
        content[key], content[how[0]] = content.get(how[0]), value
    elif op == "wrap":  # deeper than json itself writes
        content[key] = f"@{how[0]}@"
    elif op == "repeat" and isinstance(value, list | str):
        content[key] = value * min(how[0], 1 + 300_000 // (1 + len(value)))
    elif op == "digit" and isinstance(value, str) and value:
        at = how[0] % len(value)
        content[key] = value[:at] + "0123456789abcdef"[how[0] % 16] + value[at + 1 :]
    elif op == "item" and isinstance(value, list):
        value.insert(how[0] % (len(value) + 1), how[1])
    elif op == "drop" and isinstance(value, list) and value:
        value.pop(how[0] % len(value))
    elif op in ("argument", "small number"):
        args = content.get("model_args")
        content["model_args"] = {**(args if isinstance(args, dict) else {}), key: how[0]} if how else None
    elif op == "architecture":
        content["architecture"] = key


def change_header(header, data, op, *how):
    """Change a header in place and return (bytes of the tensors, what is added to the header's length)."""
    names = [name for name in header if isinstance(header[name], dict) and name != "__metadata__"]
    name = names[how[0] % len(names)] if names and isinstance(how[0], int) else None
    if op in ("dtype", "shape", "data_offsets") and name:
        header[name] = {**header[name], op: how[1]}
    elif op == "rename" and name:
        header[how[1]] = header.pop(name)
    elif op == "bare" and name:
        header[name.removeprefix("base_model.model.")] = header.pop(name)
    elif op == "exchange" and name:
        other = names[how[1] % len(names)]
        header[name], header[other] = header[other], header[name]
    elif op == "forget" and name:
        del header[name]
    elif op == "empty":
        header[how[0]] = {
            "dtype": "F32",
            "shape": [0, *how[1]] if isinstance(how[1], list) else [0],
            "data_offsets": [0, 0],
        }
    elif op == "metadata":
        header["__metadata__"] = how[0]
    elif op == "as double" and name and "shape" in header[name]:
        part = torch.full([8], how[1], dtype=torch.float64).numpy().tobytes()
        header[name] = {"dtype": "F64", "shape": [8], "data_offsets": [len(data), len(data) + 64]}
        data += part
    elif op == "fill" and name:
        start, end = header[name].get("data_offsets") if isinstance(header[name].get("data_offsets"), list) else (0, 8)
        data = data[:start] + bytes([how[1]]) * len(data[start:end]) + data[end:]
    return data, how[0] if op == "length" else 0


def change_bytes(text, op, at, value):
    at %= max(len(text), 1)
    if op == "flip":
        return text[:at] + bytes([value]) + text[at + 1 :]
    return {"cut": text[:at], "double": text + text, "insert": text[:at] + bytes([value] * (1 + value)) + text[at:]}[op]


def mutate(originals, case):
    """Return the bytes of a configuration and of a safetensors file."""
    base, _, on_config, on_text, on_header, on_bytes = case
    config, tensors = originals[base]
    weights, content = mutated_tensors(tensors, on_header, on_bytes), json.loads(config)
    with suppress(Exception):  # as a stranger does who writes both files; what cannot be read has no digest
        content["tensors_digest"] = digest_of({bare(name): tensor for name, tensor in parse(weights).items()})
    for op in on_config:
        change_config(content, *op)
    text = json.dumps(content)
    for deep in (1, 5, 100, 900, 20_000):
        text = text.replace(f'"@{deep}@"', "[" * deep + "]" * deep)
    text = text.encode()
    for op in on_text:
        text = change_bytes(text, *op)
    return text, weights


def mutated_tensors(tensors, on_header, on_bytes):
    """Return the bytes of a safetensors file."""
    size = int.from_bytes(tensors[:8], "little")
    header, data, added = json.loads(tensors[8 : 8 + size]), tensors[8 + size :], 0
    for op in on_header:
        try:
            data, more = change_header(header, data, *op)
        except (TypeError, ValueError, AttributeError):  # an earlier change left nothing that this one fits
            continue
        added += more
    head = json.dumps(header).encode()
    weights = ((len(head) + added) % 2**64).to_bytes(8, "little") + head + data
    for op in on_bytes:
        weights = change_bytes(weights, *op)
    return weights


# -- loading, in a process of its own


def load(folder, base, door):
    """Return "loaded", the class of our error, or what is wrong; folder holds an adapter made from BASES[base]."""
    architecture, args, config, side = BASES[base]
    network = None if door == "load" else timm.create_model(architecture, **args)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if door in ("load", "given"):
                model, name = load_bn_only_model(folder, network), "default"
            elif door == "peft":
                model, name = peft.PeftModel.from_pretrained(network, folder), "default"
            else:
                model, name = get_bn_only_model(network, BNOnlyConfig(seed=0, **config)), "two"
                model.load_adapter(folder, name)
                model.set_adapter(name)
    except BNAdapterError as error:
        whole = error.what and error.seen and error.do and "\x1b" not in str(error)
        return type(error).__name__ if whole else f"not as our errors are: {error!r}"
    except Exception as error:
        if door == "peft" and _before_us(error, folder):
            return "refused by PEFT itself"
        return "foreign: " + "".join(traceback.format_exception(error))[-3000:]
    missing = [str(w.message)[:300] for w in caught if "missing" in str(w.message)]
    if missing:
        return f"warned: {missing[0]}"
    found = model.peft_config[name]
    if found.verify != "full" or found.fresh:
        return f"not verified: verify={found.verify}"
    verify(model.get_base_model(), found)
    channels = found.model_args.get("in_chans", 3)
    try:
        logits = model.eval()(torch.zeros(1, channels, side, side))
    except Exception as error:  # a setting that changes no tensor and verifies, such as another stride
        return f"loaded, but takes no image of {side}: {type(error).__name__}"
    return "loaded" if logits.shape[0] == 1 and logits.is_floating_point() else f"strange logits {tuple(logits.shape)}"


def _before_us(error, folder):
    """Tell whether PEFT refused a file before it came to this method: no JSON, or not this method's."""
    frames = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    if any(parts[0] == "bn_affine_adapters" for parts in frames):
        return False
    try:
        return json.loads((Path(folder) / CONFIG_NAME).read_text())["peft_type"] != "BN_ONLY"
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def serve(loader, pipe):
    """Load what is asked for, and answer (outcome, processor seconds, growth of the peak in bytes)."""
    torch.set_num_threads(1)
    pipe.send("ready")  # what was imported is no part of a load
    while (request := pipe.recv()) is not None:
        gc.collect()
        gc.freeze()  # so that the next collection need not go through all that was imported
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = kilobytes("VmRSS"), time.process_time()
        try:
            outcome = loader(*request)
        except BaseException as error:
            outcome = f"foreign: {type(error).__name__}: {error}"
        seconds, peak = time.process_time() - start, kilobytes("VmHWM")
        pipe.send((outcome, seconds, 1024 * max(peak - before, 0)))


class Server:
    """A process that loads; another one takes its place when it dies or is killed because it hangs.

    Bounds are of processor time, so that a busy machine hangs nothing.
    """

    def __init__(self, loader=load, limit=None, method="spawn"):
        self.loader, self.method, self.process = loader, method, None
        self.limit = limit or self.honest_limit()

    def honest_limit(self):
        """Return the seconds that a load may take here, told from the adapters before they are mutated."""
        self.limit = 1000 * BUILD_SECONDS
        with tempfile.TemporaryDirectory() as folder:
            adapters(Path(folder))
            _, taken = ([self.ask(f"{folder}/{base}", base, "load") for base in BASES] for _ in range(2))
        assert {outcome for outcome, *_ in taken} == {"loaded"}, taken  # the first time something is imported
        return BUILD_SECONDS + LOADS * max(seconds for _, seconds, _ in taken)

    def start(self):
        context = multiprocessing.get_context(self.method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.loader, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"

    def ask(self, *request):
        if self.process is None:
            self.start()
        self.pipe.send(request)
        clock, start = psutil.Process(self.process.pid), time.monotonic()
        used = sum(clock.cpu_times()[:2])
        try:
            while not self.pipe.poll(0.1):
                seconds = sum(clock.cpu_times()[:2]) - used
                if seconds > 3 * self.limit or time.monotonic() - start > 600:  # one that only waits
                    self.stop()
                    return f"hang: over {seconds:.1f} s", seconds, 0
            return self.pipe.recv()
        except (EOFError, OSError, psutil.Error):
            self.process.join(60)
            code = self.process.exitcode
            self.stop()
            return f"crash: exit code {code}", 0.0, 0

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join(60)
            self.pipe.close()
            self.process = None


@dataclass
class Summary:
    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    grown: int = 0

    @property
    def count(self):
        return self.outcomes.total()

    def __str__(self):
        found = ", ".join(f"{n:,} {outcome}" for outcome, n in self.outcomes.most_common())
        return f"{self.count:,} adapters: {found}; slowest {self.seconds:.2f} s, most memory {self.grown / 1e6:.0f} MB"


REFUSED = {kind.__name__ for kind in BNAdapterError.__subclasses__()}
REFUSED |= {kind.__name__ for family in BNAdapterError.__subclasses__() for kind in family.__subclasses__()}


def complaint(outcome, seconds, grown, limit):
    """Return what is wrong with how one adapter was loaded, or None."""
    if not outcome.startswith(("loaded", "refused by PEFT")) and outcome not in REFUSED:
        return outcome
    if seconds > limit:
        return f"{outcome} after {seconds:.1f} s of processor time, of {limit:.1f}"
    return f"{outcome} with {grown / 1e6:.0f} MB more" if grown > BYTES else None


def fuzz(count, folder, server, phases=(Phase.generate, Phase.shrink)):
    """Load so many mutated adapters; raise AssertionError with the first that is not as it should be."""
    summary = Summary()
    target = folder / "mutated"
    target.mkdir()

    @seed(SEED)
    @settings(max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(case=CASES)
    def check(case):
        files = mutate(originals(), case)
        for name, content in zip((CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), files, strict=True):
            (target / name).write_bytes(content)
        outcome, seconds, grown = server.ask(str(target), case[0], case[1])
        summary.outcomes[outcome.partition(":")[0]] += 1
        summary.seconds, summary.grown = max(summary.seconds, seconds), max(summary.grown, grown)
        if summary.count % 1000 == 0:
            print(summary, flush=True)
        wrong = complaint(outcome, seconds, grown, server.limit)
        assert wrong is None, f"{wrong}\nthe adapter lies in {target}, made by mutate(originals(), {case!r})"

    check()
    return summary


# -- the tests


@pytest.fixture(scope="module")
def server():
    """A process that loads for all tests, which takes longer to start than most loads."""
    found = Server()
    yield found
    found.stop()


def test_mutated_adapters_load_to_a_verified_network_or_are_refused(server, tmp_path, record_property):
    summary = fuzz(COUNT, tmp_path, server)
    record_property("mutated adapters", summary.count)
    print(f"{summary}; limit {server.limit:.1f} s")
    refusals = {outcome for outcome in summary.outcomes if outcome in REFUSED}
    assert summary.count >= 0.95 * COUNT
    assert summary.outcomes["loaded"] >= COUNT / 50, "hardly any mutated adapter loads: nothing is looked at in depth"
    assert len(refusals) >= (6 if COUNT < 1000 else 10), refusals
    assert summary.seconds > 0
    assert summary.grown > 0


def test_the_adapters_load_before_they_are_mutated(server, tmp_path):
    adapters(tmp_path)
    found = {(base, door): server.ask(str(tmp_path / base), base, door)[0] for base in BASES for door in {*DOORS}}
    assert set(found.values()) == {"loaded"}, found
    assert len(found) == 20


LIMIT = 0.4  # of what follows, in seconds of processor time


def crashing(*request):
    faulthandler.disable()  # or it prints the stack of the whole suite
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*request):
    while True:
        pass


def foreign(*request):
    raise KeyError("stranger")


def greedy(*request):
    return "loaded" if len(bytearray(b"1") * (BYTES + BYTES // 10)) else ""


def slow(*request):
    end = time.process_time() + 1.5 * LIMIT
    while time.process_time() < end:
        pass
    return "loaded"


def silent(*request):
    return "not verified: verify=off"


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (crashing, "crash: exit code -11"),
        (hanging, "hang: over 1."),
        (foreign, "foreign: KeyError: 'stranger'"),
        (greedy, "MB more"),
        (slow, r"loaded after 0\.[6-9] s of processor time, of 0\.4"),
        (silent, "not verified"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_fuzzer_notices(loader, words, tmp_path):
    # Forked, because these load nothing and need not import what a load needs.
    server = Server(loader, 10 if loader is greedy else LIMIT, method="fork")
    try:
        with pytest.raises(AssertionError, match=words) as caught:
            fuzz(1, tmp_path, server, phases=[Phase.generate])
    finally:
        server.stop()
    assert "made by mutate(originals(), (" in str(caught.value)
