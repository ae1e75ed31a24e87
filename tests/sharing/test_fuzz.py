"""Mutated adapters, at every door: each is a verified network or our error; none crashes, hangs, or takes the memory.

The files of a folder are mutated, and what they are: links, FIFOs, sparse files. No door reads or changes what lies
outside the folder. BNAA_FUZZ=10000 runs so many, BNAA_FUZZ_SEED=1 others. They are opened in a process of their own,
which may die.
"""

import ctypes
import faulthandler
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from io import StringIO
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import timm
import torch
from doors import DOORS, WRITING
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load as parse

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.adapter.limits import BUILD_SECONDS
from bn_affine_adapters.adapter.rebuild import verify
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.settings import bare
from bn_affine_adapters.sharing.handwritten import marked

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
    "mask": ("test_resnet", {}, {"control": "signed_mask", "train_gamma": False, "train_beta": False}, 32),
}
LOADING = ("load", "given", "peft", "beside")
CHOICES = [*["load"] * 4, *DOORS]
SECRET = "what lies outside the folder"


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
NAMES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md", "results.json", "gamma.png", ".eval_results", "x"]
NAME = st.sampled_from(NAMES)
TARGETS = ["../outside/{}", "/absolute/outside/{}", "..", ".", "{}", "x", "not/there", "/dev/zero", "/proc/self/mem"]
CARD = ["", "text", "---\n---\n", "---\na: &a [x, x]\nb: *a\n---\n", "---\na: &a [*a]\n---\n", "---\ntags: x\n---\n"]
CARD += ["---\na: " + "[" * 5000, "---\na: " + "[" * 5000 + "]" * 5000 + "\n---\n", "---\n? [x]\n: x\n---\n"]
CARD += ["---\na: 0x" + "f" * 9999 + "\n---\n", "---\na: .nan\nmodel-index: 5\n---\n", "\n" * 10**5, "\ud800"]
CARD += ["---\nmodel-index:\n- name: x\n  results: [{}, 5, [x]]\n---\n" + marked("x"), marked("x") + "x"]
CARD += ["<!-- bn-adapters:begin -->\n" * 999]
LINE = st.fixed_dictionaries({"dataset": TEXT, "top1": st.sampled_from(NUMBERS)}, optional={
    "split": ANY, "top5": ANY, "command": TEXT, "recipe": ANY, "seed": ANY})  # fmt: skip
ON_FOLDER = st.one_of(
    st.tuples(st.just("link"), NAME, st.sampled_from(TARGETS)),
    st.tuples(st.just("FIFO"), NAME),
    st.tuples(st.just("folder"), NAME),
    st.tuples(st.just("sparse"), NAME, st.sampled_from([10**4, 10**7, 7 * 10**8, 3 * 10**9, 10**12])),
    st.tuples(st.just("values"), st.sampled_from([10**4, 10**6, 2**27, 2**29, 2**34])),
    st.tuples(st.just("remove"), NAME),
    st.tuples(st.just("card"), st.sampled_from(CARD)),
    st.tuples(st.just("results"), st.lists(LINE, max_size=3) | ANY),
)
ON_FILES = st.lists(ON_FOLDER, min_size=1, max_size=3)
CASES = st.tuples(
    st.sampled_from(sorted(BASES)),
    st.sampled_from(CHOICES),
    st.lists(ON_CONFIG, max_size=3) | st.just([]),
    RARELY,
    st.lists(ON_HEADER, max_size=2) | st.just([]),
    RARELY,
    ON_FILES | st.just([]) | st.just([]),
) | st.tuples(st.sampled_from(sorted(BASES)), st.sampled_from([*DOORS, *WRITING]), *[st.just([])] * 4, ON_FILES)


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
    base, _, on_config, on_text, on_header, on_bytes, _ = case
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


def write_folder(originals, case, target):
    """Write a mutated adapter; beside it lies a folder "outside" with files of the same names."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name, content in zip((CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), mutate(originals, case), strict=True):
        (target / name).write_bytes(content)
    for op in case[-1]:
        # What PEFT itself reads before it comes to this package is bounded by nobody.
        if op[:2] != ("sparse", CONFIG_NAME) or case[1] != "peft":
            with suppress(OSError):  # an earlier change left nothing that this one fits
                change_folder(target, *op)


def change_folder(target, op, *how):
    names = {"values": SAFETENSORS_WEIGHTS_NAME, "card": "README.md", "results": "results.json"}
    path = target / (names.get(op) or how[0])
    if op not in ("sparse", "values") or not path.is_file() or path.is_symlink():
        path.unlink(missing_ok=True)
    if op == "link":
        path.symlink_to(how[1].format(path.name).replace("/absolute", str(target.parent)))
    elif op == "FIFO":
        os.mkfifo(path)
    elif op == "folder":
        path.mkdir()
    elif op == "sparse":
        path.touch()
        os.truncate(path, how[1])
    elif op == "values" and path.stat().st_size < 10**8:
        claim(path, how[0])
    elif op == "card":
        path.write_bytes(how[0].encode(errors="surrogatepass"))
    elif op == "results":
        path.write_text(json.dumps(how[0]))


def claim(path, values):
    """Let a norm layer's gamma claim so many values, as many as the file then has."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    with suppress(ValueError):  # mutated before
        header, end = json.loads(content[8 : 8 + size]), len(content) - 8 - size
        entry = {"dtype": "F32", "shape": [values], "data_offsets": [end, end + 4 * values]}
        head = json.dumps({**header, "base_model.model.bn1.bn_only_layers.alpha": entry}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
        os.truncate(path, 8 + len(head) + end + 4 * values)


def lay_outside(target):
    """Lay files outside a folder that no door may read or change; return them."""
    outside = target.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    for name, content in zip((CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), originals()["cifar"], strict=True):
        (outside / name).write_bytes(content)
    (outside / "README.md").write_text(SECRET)
    (outside / "results.json").write_text(json.dumps([{"dataset": SECRET, "top1": 50}]))
    return {path: path.read_bytes() for path in outside.rglob("*")}


# -- opening, in a process of its own


def enter(folder, base, door, token=None):
    """Return "loaded", "read", the class of our error, or what is wrong; folder holds one made from BASES[base]."""
    architecture, args, *_ = BASES[base]
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(StringIO()) as printed:
            warnings.simplefilter("always")
            found = DOORS[door](folder, partial(timm.create_model, architecture, **args), token)
    except BNAdapterError as error:
        whole = error.what and error.seen and error.do and "\x1b" not in str(error)
        return type(error).__name__ if whole else f"not as our errors are: {error!r}"
    except Exception as error:
        if door == "peft" and _before_us(error, folder):
            return "refused by PEFT itself"
        return "foreign: " + "".join(traceback.format_exception(error))[-3000:]
    if door not in LOADING:
        return "strange output" if SECRET in printed.getvalue() or "\x1b" in printed.getvalue() else "read"
    missing = [str(w.message)[:300] for w in caught if "missing" in str(w.message)]
    return (
        f"warned: {missing[0]}" if missing else network_problem(found, "two" if door == "beside" else "default", base)
    )


def network_problem(model, name, base):
    """Return "loaded" if a model is the verified network of the adapter of this name, or what is wrong with it."""
    model.set_adapter(name)
    found = model.peft_config[name]
    if found.verify != "full" or found.fresh:
        return f"not verified: verify={found.verify}"
    verify(model.get_base_model(), found)
    channels, side = found.model_args.get("in_chans", 3), BASES[base][-1]
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
    path = Path(folder) / CONFIG_NAME
    if not path.is_file() or path.stat().st_size > BYTES:
        return True
    try:
        return json.loads(path.read_text())["peft_type"] != "BN_ONLY"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # OSError: a link to a file like /proc/self/mem
        return True


def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def serve(loader, pipe):
    """Open what is asked for, and answer (outcome, processor seconds, growth of the peak in bytes)."""
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True  # its client remembers what a Hub had that is new again
    gc.collect()
    gc.freeze()  # what was imported, or forked from a process that has fuzzed for long, is no part of a load
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        gc.collect()
        gc.freeze()  # so that the next collection need not go through it again
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
    """A process that opens folders; another one takes its place when it dies or is killed because it hangs.

    Bounds are of processor time, so that a busy machine hangs nothing; one that takes none for long only waits.
    """

    def __init__(self, loader=enter, limit=None, method="spawn", idle=30.0):
        self.loader, self.method, self.process, self.idle = loader, method, None, idle
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
        clock = psutil.Process(self.process.pid)
        used, last, since = sum(clock.cpu_times()[:2]), 0.0, time.monotonic()
        try:
            while not self.pipe.poll(0.1):
                seconds = sum(clock.cpu_times()[:2]) - used
                if seconds > last:
                    last, since = seconds, time.monotonic()
                waits = time.monotonic() - since
                if seconds > 3 * self.limit or waits > self.idle:
                    self.stop()
                    return f"hang: over {seconds:.1f} s, and {waits:.1f} s of waiting", seconds, 0
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
    doors: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    grown: int = 0

    @property
    def count(self):
        return self.outcomes.total()

    def __str__(self):
        found = ", ".join(f"{n:,} {outcome}" for outcome, n in self.outcomes.most_common())
        found += "; " + ", ".join(f"{n:,} at {door}" for door, n in self.doors.most_common())
        return f"{self.count:,} adapters: {found}; slowest {self.seconds:.2f} s, most memory {self.grown / 1e6:.0f} MB"


REFUSED = {kind.__name__ for kind in BNAdapterError.__subclasses__()}
REFUSED |= {kind.__name__ for family in BNAdapterError.__subclasses__() for kind in family.__subclasses__()}


def complaint(outcome, seconds, grown, limit):
    """Return what is wrong with how one adapter was loaded, or None."""
    if not outcome.startswith(("loaded", "read", "refused by PEFT")) and outcome not in REFUSED:
        return outcome
    if seconds > limit:
        return f"{outcome} after {seconds:.1f} s of processor time, of {limit:.1f}"
    return f"{outcome} with {grown / 1e6:.0f} MB more" if grown > BYTES else None


def trespass(target, outside, hub):
    """Return what was done outside the folder, or taken from there, or None."""
    if {path: path.read_bytes() for path in target.parent.glob("outside/**/*")} != outside:
        return "a file outside was changed"
    written = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    held = [path.read_bytes() for path in written if path.stat().st_size < 10**8]
    held += [hub.content(blob) for repo in hub.repos.values() for blob in repo.tree().values()]
    return "a file outside was read" if any(SECRET.encode() in content for content in held) else None


def fuzz(count, folder, server, hub, phases=(Phase.generate, Phase.shrink)):
    """Open so many mutated adapters; raise AssertionError with the first that is not as it should be."""
    summary = Summary()
    target = folder / "mutated"
    outside, token = lay_outside(target), hub.token("alice")

    @seed(SEED)
    @settings(max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(case=CASES)
    def check(case):
        write_folder(originals(), case, target)
        outcome, seconds, grown = server.ask(str(target), case[0], case[1], token)
        summary.outcomes[outcome.partition(":")[0]] += 1
        summary.doors[case[1]] += 1
        summary.seconds, summary.grown = max(summary.seconds, seconds), max(summary.grown, grown)
        if summary.count % 1000 == 0:
            print(summary, flush=True)
        wrong = complaint(outcome, seconds, grown, server.limit) or trespass(target, outside, hub)
        if wrong:  # so that the next case is told by itself
            lay_outside(target)
            hub.reset()
        assert wrong is None, f"{wrong}\nthe adapter lies in {target}, made by write_folder(originals(), {case!r}, ...)"

    check()
    return summary


# -- the tests


@pytest.fixture(scope="module")
def server():
    """A process that loads for all tests, which takes longer to start than most loads."""
    found = Server()
    yield found
    found.stop()


def test_mutated_adapters_load_to_a_verified_network_or_are_refused(server, hub, tmp_path, record_property):
    summary = fuzz(COUNT, tmp_path, server, hub)
    record_property("mutated adapters", summary.count)
    print(f"{summary}; limit {server.limit:.1f} s")
    refusals = {outcome for outcome in summary.outcomes if outcome in REFUSED}
    assert summary.count >= 0.95 * COUNT
    assert summary.outcomes["loaded"] >= COUNT / 50, "hardly any mutated adapter loads: nothing is looked at in depth"
    assert summary.outcomes["read"] >= COUNT / 50, "hardly any mutated adapter is read"
    assert len(summary.doors) >= (5 if COUNT < 1000 else len(DOORS))
    assert len(refusals) >= (5 if COUNT < 1000 else 10), refusals  # Hypothesis draws other cases by version
    assert summary.seconds > 0
    assert summary.grown > 0


def test_the_adapters_come_in_before_they_are_mutated(server, hub, alice, tmp_path):
    adapters(tmp_path)
    found = {(base, door): server.ask(str(tmp_path / base), base, door, alice)[0] for base in BASES for door in DOORS}
    assert found == {(base, door): "loaded" if door in LOADING else "read" for base, door in found}
    assert len(found) == 54


LIMIT = 0.4  # of what follows, in seconds of processor time


def crashing(*request):
    faulthandler.disable()  # or it prints the stack of the whole suite
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*request):
    while True:
        pass


def waiting(folder, *request):
    os.mkfifo(f"{folder}/pipe")
    Path(folder, "pipe").read_bytes()


def foreign(*request):
    raise KeyError("stranger")


def greedy(*request):
    return "loaded" if len(bytearray(b"1") * (BYTES + BYTES // 10)) else ""


def slow(*request):
    end = time.process_time() + 1.5 * LIMIT
    while time.process_time() < end:
        pass
    return "loaded"


def overwriting(folder, *request):
    Path(folder, "../outside/README.md").write_text("owned")
    return "read"


def leaking(folder, *request):
    shutil.copy(Path(folder, "../outside/README.md"), folder)
    return "read"


def silent(*request):
    return "not verified: verify=off"


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (crashing, "crash: exit code -11"),
        (hanging, "hang: over 1."),
        (waiting, r"hang: over 0\.\d s, and 1\.\d s of waiting"),
        (foreign, "foreign: KeyError: 'stranger'"),
        (greedy, "MB more"),
        (slow, r"loaded after 0\.[6-9] s of processor time, of 0\.4"),
        (silent, "not verified"),
        (overwriting, "a file outside was changed"),
        (leaking, "a file outside was read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_fuzzer_notices(loader, words, hub, tmp_path):
    # Forked, because these load nothing and need not import what a load needs.
    server = Server(loader, 10 if loader is greedy else LIMIT, method="fork", idle=1.0)
    try:
        with pytest.raises(AssertionError, match=words) as caught:
            fuzz(1, tmp_path, server, hub, phases=[Phase.generate])
    finally:
        server.stop()
    assert "made by write_folder(originals(), (" in str(caught.value)
