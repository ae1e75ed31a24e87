"""What is exported loads in timm alone, or in PEFT alone, with the same logits; the model stays as it was."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import timm
import torch
from conftest import each_once
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, reinit_
from bn_affine_adapters.adapter.layer import BNOnlyLayer
from bn_affine_adapters.errors import AdapterError, ConfigError, NoSpaceError, OutputFolderError, RebuildError
from bn_affine_adapters.norms.find import norm_layers

FILES = {
    "timm": {"config.json", "model.safetensors"},
    "ln_tuning": {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME},
}
NAME = "test_resnet"
ALONE = {  # architecture, creation arguments, configuration, size of the images; no part of this package is imported
    "resnet": (NAME, {"num_classes": 5}, {"seed": 3}, 32),
    "one-channel": (NAME, {"in_chans": 1, "num_classes": 4}, {"seed": 3}, 32),
    "five-channels": (NAME, {"in_chans": 5, "num_classes": 4}, {"seed": 3}, 32),
    "given-weights": (NAME, {"num_classes": 5}, {}, 32),
    "head": (NAME, {"num_classes": 3}, {"seed": 3, "train_head": True}, 32),
    "strides": ("resnet18", {"output_stride": 8, "num_classes": 3}, {"seed": 3}, 64),
    "pooling": (NAME, {"global_pool": "max", "drop_rate": 0.1}, {"seed": 3}, 32),
    "activation": ("test_efficientnet", {"act_layer": "relu", "bn_eps": 0.01}, {"seed": 3}, 32),
    "layer-norm": ("test_convnext", {"num_classes": 5}, {"seed": 3, "train_head": True}, 32),
    "image-size": ("test_vit", {"img_size": 64, "num_classes": 5}, {"seed": 3}, 64),
    "no-classes": ("test_vit", {"img_size": 32, "num_classes": 0}, {"seed": 3}, 32),
    "other-images": ("test_vit", {"num_classes": 5}, {"seed": 3, "data_config": {"input_size": [3, 32, 32]}}, 160),
    "any-size": ("test_vit", {"dynamic_img_size": True}, {"seed": 3, "data_config": {"input_size": [3, 64, 64]}}, 64),
    "int-size": ("efficientvit_m0", {"num_classes": 5}, {"seed": 3}, 224),
    "tied": ("coat_lite_tiny", {"num_classes": 3}, {"seed": 3}, 224),
}
# The paper's networks, for which timm needs this package, are loaded so in tests/sharing/test_hub.py.

LOAD = """
import json, sys
import torch
torch.set_num_threads(1)
import timm
from safetensors.torch import load_file, save_file
where = sys.argv[1]
found = {}
for case in json.load(open(f"{where}/cases.json")):
    for source in ("hf-hub:us", f"local-dir:{where}"):
        try:
            model = timm.create_model(f"{source}/{case}", pretrained=True).eval()
        except Exception as error:
            print(source, case, repr(error), file=sys.stderr)
            continue
        with torch.no_grad():
            logits = model(load_file(f"{where}/{case}.images")["images"])
        found[f"{source.partition(':')[0]} {case}"] = logits.contiguous()
import peft
base = timm.create_model("test_resnet", num_classes=5)
base.load_state_dict(load_file(f"{where}/base.safetensors"))
model = peft.PeftModel.from_pretrained(base, f"{where}/stock")
found["stock"] = model(load_file(f"{where}/resnet.images")["images"]).detach()
assert "bn_affine_adapters" not in sys.modules
save_file(found, f"{where}/found.safetensors")
"""


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def wrapped(name, arguments, config, **more):
    return get_bn_only_model(timm.create_model(name, **arguments), BNOnlyConfig(**config, model_args=arguments, **more))


@pytest.fixture(scope="module")
def trained(train_step):
    """Build and train a case; return the model and images for it."""

    def build(name, arguments, config, size, **more):
        model = wrapped(name, arguments, config, **more)
        channels = arguments.get("in_chans", 3)
        return train_step(model, size, channels, steps=1), images(size, channels)

    return build


def into_cache(folder, cache, name):
    """Lay a folder out as huggingface_hub caches a repository, for a load without a network."""
    repository = cache / f"models--us--{name}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    os.symlink(folder, repository / "snapshots" / commit)


@pytest.fixture(scope="module")
def alone(trained, train_step, tmp_path_factory):
    """The logits here, and in an interpreter without this package: of timm, and of PEFT on a base with own weights."""
    where, here = tmp_path_factory.mktemp("alone"), {}
    for case, values in ALONE.items():
        model, batch = trained(*values)
        with torch.no_grad():
            here[case] = model(batch)
        save_file({"images": batch}, where / f"{case}.images")
        into_cache(export(model, where / case), where / "cache", case)
    (where / "cases.json").write_text(json.dumps(list(ALONE)))
    base = timm.create_model(NAME, num_classes=5)
    save_file(state(base), where / "base.safetensors")
    model = train_step(get_bn_only_model(base, BNOnlyConfig(train_head=True)))
    export(model, where / "stock", "ln_tuning")
    here["stock"] = model(images()).detach()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(where / "cache")}
    command = [sys.executable, "-c", LOAD, str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return here, load_file(where / "found.safetensors"), done.stderr


@pytest.mark.parametrize("source", ["hf-hub", "local-dir"])
@pytest.mark.parametrize("case", ALONE)
def test_timm_loads_the_export_in_a_fresh_interpreter_with_equal_logits(case, source, alone):
    here, there, errors = alone
    assert f"{source} {case}" in there, errors
    assert here[case].unique().numel() > 1, "these logits would be equal anyway"
    assert torch.equal(there[f"{source} {case}"], here[case])


def reload(folder):
    content = json.loads((folder / "config.json").read_text())
    cfg = {**content["pretrained_cfg"], "file": str(folder / "model.safetensors")}
    return timm.create_model(content["architecture"], pretrained=True, pretrained_cfg=cfg, **content["model_args"])


def test_the_timm_folder_says_how_to_build_the_network_and_what_it_is_shown(tmp_path):
    data = {"input_size": [1, 48, 48], "mean": [0.4], "std": [0.2], "interpolation": "nearest"}
    data |= {"crop_pct": 0.75, "crop_mode": "squash"}
    arguments = {"in_chans": 1, "num_classes": 2}
    model = wrapped(NAME, arguments, {"seed": 0, "data_config": data, "label_names": ["cat", "dog"]})
    content = json.loads((export(model, tmp_path / "out") / "config.json").read_text())
    assert content["architecture"] == NAME
    assert content["num_classes"] == content["pretrained_cfg"]["num_classes"] == 2
    assert content["model_args"] == model.peft_config["default"].model_args == arguments
    assert content["label_names"] == ["cat", "dog"]
    assert {key: content["pretrained_cfg"][key] for key in data} == data
    resolved = timm.data.resolve_model_data_config(reload(tmp_path / "out"))
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in resolved.items()} == data


@pytest.mark.parametrize(("seed", "kept"), [(None, True), (0, False)])
def test_a_network_drawn_from_a_seed_does_not_claim_where_other_weights_come_from(seed, kept, tmp_path):
    base = timm.create_model(NAME)
    base.pretrained_cfg |= {"license": "apache-2.0", "label_offset": 1, "test_input_size": (3, 99, 99)}
    model = get_bn_only_model(base, BNOnlyConfig(seed=seed))
    cfg = json.loads((export(model, tmp_path / "out") / "config.json").read_text())["pretrained_cfg"]
    assert ("license" in cfg) == kept
    assert not {"label_offset", "test_input_size", "hf_hub_id"} & set(cfg)


@pytest.mark.parametrize("format", FILES)
def test_an_export_is_two_files_that_others_may_read_and_no_pickle(format, tmp_path):
    folder = export(wrapped(NAME, {}, {"seed": 0}), tmp_path / "new" / "out", format)
    assert folder == tmp_path / "new" / "out"
    assert {path.name for path in folder.iterdir()} == FILES[format]
    assert {path.name for path in folder.parent.iterdir()} == {"out"}
    (tmp_path / "like").mkdir()
    assert folder.stat().st_mode == (tmp_path / "like").stat().st_mode
    with safe_open(folder / next(name for name in FILES[format] if "safetensors" in name), "pt") as file:
        assert len(list(file.keys())) > 10


# -- the model is untouched


def second(model):
    model.add_adapter("two", BNOnlyConfig(seed=3, train_head=True, model_args={"num_classes": 7}))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".two." in name:
            nn.init.uniform_(parameter)


STATES = {
    "training": lambda model: model.train(),
    "evaluating": lambda model: model.eval(),
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "two adapters": second,
    "frozen": lambda model: model.requires_grad_(False),
    "channels-last": lambda model: model.to(memory_format=torch.channels_last),
    "some modules in another mode": lambda model: model.get_submodule("base_model.model.layer1").eval(),
}


def fingerprint(model):
    return {
        "state": {key: (tensor.data_ptr(), tensor.stride()) for key, tensor in model.state_dict().items()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "gradients": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "layers": [(m.merged_adapters, m.disable_adapters, m.active_adapters) for m in model.modules()
                   if isinstance(m, BNOnlyLayer)],
        "configurations": {name: config.to_dict() for name, config in model.peft_config.items()},
        "base": {key: repr(value) for key, value in vars(model.get_base_model()).items() if key[0] != "_"},
        "generator": torch.get_rng_state().tolist(),
    }  # fmt: skip


@each_once(change=STATES, format=list(FILES))
def test_the_model_is_untouched_in_every_state_and_the_export_is_its_adapter(change, format, tmp_path, trained):
    model, batch = trained(*ALONE["head"])
    answer = model(batch)
    change(model)
    before, bits = fingerprint(model), state(model)
    assert before["layers"]
    folder = export(model, tmp_path / "out", format)
    assert fingerprint(model) == before
    assert all(torch.equal(tensor, bits[key]) for key, tensor in model.state_dict().items())
    if format == "timm":
        assert torch.equal(reload(folder).eval()(batch), answer)
    else:
        base = reinit_(timm.create_model(NAME, num_classes=3), 3)
        assert torch.equal(peft.PeftModel.from_pretrained(base, folder)(batch), answer)


def test_an_inactive_adapter_is_exported_by_its_name_with_its_own_head(tmp_path, trained):
    model, batch = trained(*ALONE["head"])
    second(model)
    timm_folder = export(model, tmp_path / "timm", adapter_name="two")
    stock_folder = export(model, tmp_path / "stock", "ln_tuning", adapter_name="two")
    model.save_pretrained(tmp_path / "ours")
    model.set_adapter("two")
    answer = model.eval()(batch)
    assert answer.shape == (2, 7)
    again = reload(timm_folder).eval()
    assert again.num_classes == 7
    assert torch.equal(again(batch), answer)
    base = load_bn_only_model(tmp_path / "ours" / "two").unload()
    assert torch.equal(peft.PeftModel.from_pretrained(base, stock_folder)(batch), answer)


def test_a_network_in_bfloat16_comes_back_with_the_same_values(tmp_path, trained):
    model, batch = trained(*ALONE["resnet"])
    model = model.bfloat16()
    again = reload(export(model, tmp_path / "out")).eval()
    assert next(again.parameters()).dtype == torch.float32
    assert torch.equal(again.bfloat16()(batch.bfloat16()), model(batch.bfloat16()))


# -- PEFT alone


STOCK = {
    "batch norm": (NAME, {"num_classes": 5}, {"seed": 3}, 32),
    "head": (NAME, {"num_classes": 5, "in_chans": 1}, {"seed": 3, "train_head": True}, 32),
    "fused activations": ("test_efficientnet", {"num_classes": 5}, {"seed": 3, "train_head": True}, 32),
    "layer norm": ("test_convnext", {"num_classes": 5}, {"seed": 3, "train_head": True}, 32),
    "vit": ("test_vit", {"img_size": 32, "num_classes": 5}, {"seed": 3}, 32),
    "ours": ("cifar_resnet14", {}, {"seed": 3, "train_head": True}, 32),
    "one ambiguous name": (NAME, {}, {"seed": 3, "norm_layers": ["bn1"]}, 32),
    "its own base_layer": ("dla46x_c", {"num_classes": 5}, {"seed": 3}, 64),
    "a head of parts": ("levit_128s", {"num_classes": 5}, {"seed": 3, "train_head": True}, 224),
    "shortcuts": ("resnet18", {}, {"seed": 3, "extra_trainable_modules": ["layer2.0.downsample"]}, 32),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@each_once(case=STOCK, adapter_name=["default", "other"])
def test_stock_peft_loads_the_export_on_the_rebuilt_base_with_equal_logits(case, adapter_name, tmp_path, trained):
    name, arguments, config, size = case
    model, batch = trained(name, arguments, config, size)
    model.save_pretrained(tmp_path / "ours")
    folder = export(model, tmp_path / "out", "ln_tuning")
    bases = [load_bn_only_model(tmp_path / "ours").unload()]
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        about = json.loads(file.metadata()["bn_only_config"])
    ones = about["layer_scales"] if about["layer_scale"] == "one" else ()
    bases += [reinit_(timm.create_model(about["architecture"], **about["model_args"]), about["seed"], ones=ones)]
    for base in bases:
        with torch.no_grad():
            assert not torch.equal(base.eval()(batch), model(batch)), "the adapter would not be noticed"
            stock = peft.PeftModel.from_pretrained(base, folder, adapter_name=adapter_name)
            assert type(stock) is peft.PeftModel
            assert torch.equal(stock(batch), model(batch))
        swapped = {n for n, m in stock.get_base_model().named_modules() if isinstance(m, LNTuningLayer)}
        owned = model.peft_config["default"].target_modules
        assert {n for n in owned if not any(s == n or s.startswith(f"{n}.") for s in swapped)} == set()
        assert {s for s in swapped if not any(s == n or s.startswith(f"{n}.") for n in owned)} == set()
        assert len(swapped) >= len(owned)


def test_a_list_of_names_would_have_hit_norm_layers_that_the_adapter_does_not_own(trained):
    base = timm.create_model(NAME)
    stock = peft.get_peft_model(base, peft.LNTuningConfig(target_modules=["bn1"]))
    assert sum(isinstance(module, LNTuningLayer) for module in stock.modules()) > 1


def test_running_statistics_travel_and_a_merge_gives_the_plain_network(tmp_path, trained):
    model, batch = trained(*ALONE["head"])
    folder = export(model, tmp_path / "out", "ln_tuning")
    base = reinit_(timm.create_model(NAME, num_classes=3), 3)
    assert torch.equal(base.bn1.running_mean, torch.zeros_like(base.bn1.running_mean))
    plain = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    expected = model.merge_and_unload()
    assert not torch.equal(plain.bn1.running_mean, torch.zeros_like(plain.bn1.running_mean))
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in plain.state_dict().items())
    assert torch.equal(plain(batch), expected.eval()(batch))


def test_the_stock_configuration_names_no_base_for_a_seed(tmp_path):
    content = json.loads(
        (export(wrapped(NAME, {}, {"seed": 0}), tmp_path / "a", "ln_tuning") / CONFIG_NAME).read_text()
    )
    assert content["peft_type"] == "LN_TUNING"
    assert content["base_model_name_or_path"] is None
    assert content["modules_to_save"] is None
    base = timm.create_model(NAME)
    base.name_or_path = "us/base"
    folder = export(get_bn_only_model(base, BNOnlyConfig()), tmp_path / "b", "ln_tuning")
    assert json.loads((folder / CONFIG_NAME).read_text())["base_model_name_or_path"] == "us/base"


def test_stock_peft_loads_the_export_on_a_given_base_in_a_fresh_interpreter(alone):
    here, there, _ = alone
    assert torch.equal(there["stock"], here["stock"])


# -- what is refused, before anything is written


class Reads(nn.Module):
    """Use a norm layer's tensors, or its eps, instead of calling it."""

    def __init__(self, what):
        super().__init__()
        self.what, self.norm, self.head = what, nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        norm = self.norm
        if self.what == "nothing":
            return self.head(norm(x))
        eps = norm.eps if self.what == "eps" else 1e-5
        return self.head(nn.functional.layer_norm(x, (3,), norm.weight, norm.bias, eps))


@pytest.mark.parametrize(("what", "word"), [("nothing", ""), ("weight", "output 0"), ("eps", "AttributeError")])
def test_a_network_that_stock_peft_would_run_otherwise_is_refused(what, word, tmp_path, refused):
    model = get_bn_only_model(Reads(what), BNOnlyConfig(data_config={"input_size": [3, 8, 8]})).eval()
    for norm in norm_layers(model).values():
        assert isinstance(norm, nn.LayerNorm)
    if not word:
        assert export(model, tmp_path / "out", "ln_tuning").is_dir()
        return
    with refused(AdapterError, "Stock PEFT", word):
        export(model, tmp_path / "out", "ln_tuning")
    assert not list(tmp_path.iterdir())


def test_a_network_of_own_code_is_no_network_of_timm(tmp_path, refused):
    model = get_bn_only_model(Reads("nothing"), BNOnlyConfig(architecture="custom"))
    with refused(RebuildError, "own code", "'custom'", "ln_tuning"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    folder = export(model, tmp_path / "out", "ln_tuning")  # of an unknown size of images: only tensors are compared
    assert {path.name for path in folder.iterdir()} == FILES["ln_tuning"]


@pytest.mark.parametrize("change", ["tensor", "module"])
def test_a_network_that_timm_would_build_otherwise_is_refused(change, tmp_path, refused):
    model = wrapped(NAME, {}, {"seed": 0})
    if change == "module":
        model.get_base_model().maxpool = nn.Identity()
    else:
        model.get_base_model().register_buffer("extra", torch.ones(1))
    with refused(RebuildError, "timm does not load", "output 0" if change == "module" else "extra"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FILES)
def test_images_that_the_network_does_not_take_are_refused(format, tmp_path, refused):
    model = wrapped("test_convnext", {}, {"seed": 0, "data_config": {"input_size": [3, 1, 1]}})
    with refused(ConfigError, "[3, 1, 1]"):
        export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"format": "tflite"}, ConfigError, ["'tflite'", "timm, ln_tuning"]),
        ({"adapter_name": "three"}, AdapterError, ["three", "default, two"]),
        ({}, AdapterError, ["2: default, two"]),
    ],
    ids=["format", "adapter", "two active"],
)
def test_a_choice_that_does_not_exist_is_refused(more, kind, words, tmp_path, refused):
    model = wrapped(NAME, {"num_classes": 3}, {"seed": 3})
    second(model)
    model.base_model.set_adapter(["default", "two"])
    with refused(kind, *words):
        export(model, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


@each_once(what=["folder", "file"], format=list(FILES))
def test_what_is_there_is_never_overwritten(what, format, tmp_path, refused):
    file = tmp_path / "out" / "thesis.txt" if what == "folder" else tmp_path / "out"
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with refused(OutputFolderError, str(tmp_path / "out"), "thesis.txt" if what == "folder" else "a file"):
        export(wrapped(NAME, {}, {"seed": 0}), tmp_path / "out", format)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("format", FILES)
def test_an_empty_folder_is_filled_where_it_is(format, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert export(wrapped(NAME, {}, {"seed": 0}), ".", format) == Path(".")
    assert {path.name for path in Path(".").iterdir()} == FILES[format]
    assert os.path.samefile(".", tmp_path / "out")


FULL = [OSError(errno.ENOSPC, "No space left"), SafetensorError("os error 28"), OSError(5)]


@each_once(error=FULL, format=list(FILES), exists={"new": False, "empty": True})
def test_a_full_disk_leaves_nothing(error, exists, format, tmp_path, monkeypatch, refused):
    def fails(*args, **kwargs):
        raise error

    if exists:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("safetensors.torch.save_file", fails)
    monkeypatch.setattr("bn_affine_adapters.deploy.exporting.save_file", fails)
    model = wrapped(NAME, {}, {"seed": 0})
    if error.args == (5,):
        with pytest.raises(OSError, match="5") as caught:
            export(model, tmp_path / "out", format)
        assert caught.value is error
    else:
        with refused(NoSpaceError, str(tmp_path / "out"), str(error)):
            export(model, tmp_path / "out", format)
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if exists else [])
