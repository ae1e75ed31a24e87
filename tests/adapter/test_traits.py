"""The digests of format 2: of the settings of somebody's own network, and of the tensors beside a configuration."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import timm
import torch
from conftest import each_once
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.rebuild import create
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.adapter.traits import computed, digest, traits, traits_of
from bn_affine_adapters.errors import AdapterTensorError, ConfigError, FingerprintError
from bn_affine_adapters.settings import FORMAT_VERSION, bare
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.contents import read_tensors
from bn_affine_adapters.sharing.folder import read_config
from bn_affine_adapters.sharing.hub import push_folder

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Leak(nn.Module):
    """An activation with a setting of its own."""

    def __init__(self, slope=0.1):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return nn.functional.leaky_relu(x, self.slope)


class Own(nn.Module):
    """A network of somebody's own code."""

    def __init__(self, eps=1e-5, act=nn.ReLU, slope=0.1, momentum=0.1, drop=0.0, norm=nn.BatchNorm2d, **act_args):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), norm(8, eps=eps, momentum=momentum)
        self.act, self.leak, self.drop, self.fc = act(**act_args), Leak(slope), nn.Dropout(drop), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.drop(self.act(self.leak(self.bn(self.stem(x)))).mean((2, 3))))


def edit(folder, **values):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture(params=[0, None], ids=["seed", "given"])
def own(request, tmp_path):
    """A network of somebody's own code, an adapter of it, and what it answers."""
    base = Own()
    model = get_bn_only_model(copy.deepcopy(base), BNOnlyConfig(seed=request.param)).eval()
    model.save_pretrained(tmp_path)
    return base, tmp_path, model(IMAGES)


DIFFERENT = {
    "eps": ({"eps": 1e-3}, "bn, now BatchNorm(8, eps=0.001"),
    "activation": ({"act": nn.GELU}, "act, now GELU(approximate='none')"),
    "setting": ({"slope": -0.3}, "leak, now Leak()"),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_another_setting_of_ones_own_network_is_refused(change, own, refused):
    base, folder, answer = own
    changes, words = DIFFERENT[change]
    other = Own(**changes)
    other.load_state_dict(base.state_dict())
    with refused(FingerprintError, "a module has another class or setting", words):
        load_bn_only_model(folder, other)
    loaded = load_bn_only_model(folder, other, verify="off")  # which computes something else
    assert not torch.equal(loaded(IMAGES), answer)


ALIKE = {
    "itself": {},
    "momentum": {"momentum": 0.5},
    "dropout": {"drop": 0.5},
    "inplace": {"inplace": True},
    "synchronised": {"norm": nn.SyncBatchNorm},
}


@pytest.mark.parametrize("change", ALIKE)
def test_what_computes_the_same_is_no_false_alarm(change, own):
    base, folder, answer = own
    other = Own(**ALIKE[change])
    other.load_state_dict(base.state_dict())
    other.device, other.name_or_path = "cuda:0", "somewhere"
    assert torch.equal(load_bn_only_model(folder, other)(IMAGES), answer)


def test_another_version_of_torch_or_timm_only_warns(own):
    base, folder, answer = own
    versions = json.loads((folder / CONFIG_NAME).read_text())["versions"]
    edit(folder, versions={**versions, "timm": "1.0.0"})
    other = Own(eps=1.1e-5)
    other.load_state_dict(base.state_dict())
    with pytest.warns(UserWarning, match=r"(?s)another class or setting.*first that differs is bn.*timm 1\.0\.0 ->"):
        load_bn_only_model(folder, other)
    assert torch.equal(load_bn_only_model(folder, base)(IMAGES), answer)


def test_a_network_of_timm_is_compared_with_what_this_timm_builds(tmp_path):
    model = get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0))
    model.save_pretrained(tmp_path)
    edit(tmp_path, traits_fingerprint="ab" * 32, traits_digests="0123")
    for base in (None, timm.create_model("test_resnet")):
        assert torch.equal(load_bn_only_model(tmp_path, base)(IMAGES), model.eval()(IMAGES))


def test_the_formats_are_those_that_are_documented():
    model, config = Own(), BNOnlyConfig(head_layers=["fc"])
    lines = {
        "": {"class": "Own", "extra_repr": ""},
        "act": {"class": "ReLU", "extra_repr": ""},
        "drop": {"class": "Dropout"},
        "fc": {"class": "Linear"},
        "leak": {"class": "Leak", "extra_repr": "", "slope": 0.1},
        "stem": {
            "class": "Conv2d", "extra_repr": "3, 8, kernel_size=(3, 3), stride=(1, 1)", "in_channels": 3,
            "out_channels": 8, "transposed": False, "groups": 1, "padding_mode": "zeros",
        },
    }  # fmt: skip
    found = traits(model)
    assert found.pop("bn")["class"] == "BatchNorm"  # its settings depend on the version of torch
    written = [f"{name}\t{json.dumps(lines[name], sort_keys=True)}\n".encode() for name in sorted(lines)]
    ours = digest(found, config)
    assert ours.full == hashlib.sha256(b"bnaffine-traits-v1\n" + b"".join(written)).hexdigest()
    assert ours.modules == "".join(hashlib.sha256(line).hexdigest()[:4] for line in written)
    tensors = {"b": torch.tensor(3), "a": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)}
    text = "bnaffine-tensors-v1\n"
    text += f"a\tbfloat16\t1,2\t{hashlib.sha256(bytes([0x80, 0x3F, 0x00, 0x40])).hexdigest()}\n"
    text += f"b\tint64\t\t{hashlib.sha256(bytes([3, 0, 0, 0, 0, 0, 0, 0])).hexdigest()}\n"
    assert digest_of(tensors) == hashlib.sha256(text.encode()).hexdigest()


def test_settings_are_told_from_what_acts_in_training():
    assert computed(traits_of(nn.Dropout(0.3))) == {"class": "Dropout"}
    norm = computed(traits_of(nn.BatchNorm2d(4, momentum=None)))
    assert "momentum" not in str(norm)
    assert norm["eps"] == 1e-5


# -- the two files of an adapter belong together


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two adapters of one network."""
    folders = []
    for factor in (1.0, 2.0):
        model = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0))
        with torch.no_grad():
            model.get_base_model().bn1.weight.mul_(factor)
        model.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
        folders.append(folder)
    return folders


def network():
    return timm.create_model("test_resnet", num_classes=3)


def beside(folder):
    model = get_bn_only_model(network(), BNOnlyConfig(seed=0))
    model.load_adapter(folder, "two")
    return model


DOORS = {
    "load": load_bn_only_model,
    "given": lambda folder: load_bn_only_model(folder, network()),
    "unverified": lambda folder: load_bn_only_model(folder, verify="off"),
    "peft": lambda folder: peft.PeftModel.from_pretrained(network(), folder),
    "beside": beside,
    "inspect": lambda folder: read_tensors(folder, read_config(folder)),
    "card": lambda folder: write_card(folder, "me/x"),
    "push": lambda folder: push_folder(folder, "me/x"),
}


@pytest.mark.parametrize("door", DOORS)
def test_tensors_of_another_adapter_are_refused(door, pair, tmp_path, refused):
    folder = shutil.copytree(pair[0], tmp_path / "mixed")
    shutil.copy(pair[1] / SAFETENSORS_WEIGHTS_NAME, folder)
    with refused(AdapterTensorError, "are not those that its configuration was saved with"):
        DOORS[door](folder)


def test_a_save_that_is_killed_between_its_files_leaves_nothing_that_loads(pair, tmp_path, monkeypatch, refused):
    folder = shutil.copytree(pair[0], tmp_path / "adapter")
    model = load_bn_only_model(pair[1])
    replace, moved = os.replace, []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert [path.name for path in moved] == [SAFETENSORS_WEIGHTS_NAME]
    with refused(AdapterTensorError, "are not those that its configuration was saved with"):
        load_bn_only_model(folder)
    model.save_pretrained(folder)
    assert torch.equal(load_bn_only_model(folder)(IMAGES), model(IMAGES))


def test_metadata_and_the_order_of_tensors_are_not_part_of_the_digest(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "adapter")
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    save_file(dict(reversed(tensors.items())), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"by": "hand"})
    assert torch.equal(load_bn_only_model(folder)(IMAGES), load_bn_only_model(pair[0])(IMAGES))


@each_once(dtype=[torch.float32, torch.bfloat16, torch.float64], trains=[{}, {"train_gamma": False}])
def test_the_digest_is_that_of_the_file_after_every_save(dtype, trains, tmp_path):
    model = get_bn_only_model(network(), BNOnlyConfig(seed=0, **trains))
    model.save_pretrained(tmp_path / "one")
    load_bn_only_model(tmp_path / "one", dtype=dtype).save_pretrained(tmp_path / "two")
    load_bn_only_model(tmp_path / "two", dtype=dtype).save_pretrained(tmp_path / "three")
    for name in ("one", "two", "three"):
        tensors = load_file(tmp_path / name / SAFETENSORS_WEIGHTS_NAME)
        held = read_config(tmp_path / name).tensors_digest
        assert held == digest_of({bare(key): tensor for key, tensor in tensors.items()})


def test_tensors_that_were_changed_go_through_peft(pair, tmp_path):
    model = load_bn_only_model(pair[0])
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {key: tensor * 2 for key, tensor in state.items()})
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("key", ["tensors_digest", "traits_fingerprint", "traits_digests"])
def test_format_2_has_both_digests(key, pair, tmp_path, refused):
    folder = shutil.copytree(pair[0], tmp_path / "adapter")
    with refused(ConfigError, "lacks a digest"):
        load_bn_only_model(edit(folder, **{key: None}))


def test_an_adapter_of_format_1_is_saved_in_the_newest(own):
    base, folder, answer = own
    edit(folder, format_version=1, tensors_digest=None, traits_fingerprint=None, traits_digests=None)
    other = Own(eps=1e-3)
    other.load_state_dict(base.state_dict())
    load_bn_only_model(folder, copy.deepcopy(other))  # as ever: format 1 does not know settings
    load_bn_only_model(folder, copy.deepcopy(base)).save_pretrained(folder)
    assert read_config(folder).format_version == FORMAT_VERSION
    assert torch.equal(load_bn_only_model(folder, copy.deepcopy(base))(IMAGES), answer)
    with pytest.raises(FingerprintError):
        load_bn_only_model(folder, other)


@pytest.mark.parametrize(("name", "count"), [("cifar_resnet14", "444"), ("resnet50", "1,072")])
def test_the_digests_add_as_many_bytes_as_the_page_says(name, count):
    found = digest(traits(create(name, {}, "meta")), BNOnlyConfig())
    values = {"traits_fingerprint": found.full, "traits_digests": found.modules, "tensors_digest": found.full}
    size = sum(len(json.dumps({key: value}, indent=2)) - 2 for key, value in values.items())
    assert f"{size:,}" == count
    page = (Path(__file__).parents[2] / "docs" / "adapter-format.md").read_text()
    assert f"{count} " in page.replace("\n  ", " ")
