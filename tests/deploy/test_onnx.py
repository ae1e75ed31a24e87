"""A network as one graph: onnxruntime and torch.export compute its logits, with the adapter inside or as inputs."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import script
from torch import nn

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import (
    AdapterError,
    ConfigError,
    NetworkError,
    OutputFolderError,
    UnknownKeyError,
)

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
GOLDEN = Path(__file__).parents[1] / "golden"
X = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(4))


class Small(nn.Module):
    """Norm layers of three kinds, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.GroupNorm(2, 8)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.norm(self.body(x).mean((2, 3))))


def small(train_step, steps=1, **config):
    torch.manual_seed(0)
    usual = {"seed": 3, "train_head": True, "data_config": {"input_size": [3, 16, 16]}}
    model = get_bn_only_model(Small(), BNOnlyConfig(**usual | config))
    return train_step(model, 16, steps=steps)


def run(file, images, arrays=()):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy(), **dict(arrays)})[0]


def differ(found, model, images):
    with torch.no_grad():
        expected = model(images).numpy()
    return np.abs(found - expected).max() / max(1, np.abs(expected).max())


@pytest.fixture(scope="module")
def backbone(train_step, tmp_path_factory):
    return export(small(train_step), tmp_path_factory.mktemp("graph") / "net.onnx", "onnx", adapter="inputs")


def test_one_backbone_file_with_three_adapters_gives_three_adapters_logits(backbone, train_step, tmp_path):
    found = []
    for steps in (1, 2, 3):
        model = small(train_step, steps)
        with np.load(export(model, tmp_path / f"{steps}.npz", "npz")) as arrays:
            assert len(arrays) == 8
            found.append(run(backbone, X, arrays))
        assert (tmp_path / f"{steps}.npz").stat().st_size < 4_000
        assert differ(found[-1], model, X) < 1e-4
    assert min(np.abs(one - other).max() for one, other in zip(found, found[1:] + found[:1], strict=True)) > 1e-3


def test_the_graph_has_everything_inside_for_batches_of_any_size(train_step, tmp_path, capsys):
    model = small(train_step)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    file = export(model, tmp_path / "new" / "net.onnx", format="onnx")
    assert "in onnxruntime the logits of 3 random images differ by at most" in capsys.readouterr().out
    for images in (X, X[:1]):
        assert differ(run(file, images), model, images) < 1e-4
    about = json.loads(ort.InferenceSession(file).get_modelmeta().custom_metadata_map["bn_only_config"])
    assert about["seed"] == 3
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_torch_export_runs_it_with_the_same_bits(train_step, tmp_path):
    model = small(train_step)
    inside = torch.export.load(export(model, tmp_path / "net.pt2", "pt2")).module()
    assert torch.equal(inside(X), model(X))
    shared = export(model, tmp_path / "shared.pt2", "pt2", adapter="inputs")
    other = small(train_step, 3)
    assert shared.read_bytes() != export(other, tmp_path / "other.pt2", "pt2").read_bytes()
    with np.load(export(other, tmp_path / "a.npz", "npz")) as arrays:
        adapter = {key: torch.from_numpy(value) for key, value in arrays.items()}
    torch.testing.assert_close(torch.export.load(shared).module()(X, adapter), other(X))


def test_a_backbone_file_holds_no_adapter(train_step, tmp_path):
    """Whichever of two adapters it was written with, the weights in it are the same; none of its own is in it."""
    held = []
    for steps in (1, 2):
        model = small(train_step, steps)
        with zipfile.ZipFile(export(model, tmp_path / f"{steps}.pt2", "pt2", adapter="inputs")) as file:
            held.append({name: file.read(name) for name in file.namelist() if "/data/" in name})
        own = model.base_model.model.norm.bn_only_layers["default"].weight.detach().numpy().tobytes()
        assert not any(own in content for content in held[-1].values())
    assert held[0] == held[1]


def test_an_adapter_of_another_network_is_refused_by_the_runtime(backbone, train_step, tmp_path):
    torch.manual_seed(0)
    other = get_bn_only_model(Small(), BNOnlyConfig(seed=4, train_head=True)).eval()
    with (
        np.load(export(other, tmp_path / "other.npz", "npz")) as arrays,
        pytest.raises(ValueError, match=r"Required inputs|Invalid input"),
    ):
        run(backbone, X, arrays)


def test_a_compact_file_gives_the_arrays_of_its_backbone(tmp_path):
    model = load_bn_only_model(GOLDEN / "adapter-v2")
    compact = load_bn_only_model(export(model, tmp_path / "a.safetensors", "compact", bits=16))
    files = [export(each, tmp_path / name, "npz") for each, name in ((model, "a.npz"), (compact, "b.npz"))]
    with np.load(files[0]) as ours, np.load(files[1]) as theirs:
        assert [*ours] == [*theirs]
        assert all(np.allclose(ours[key], theirs[key], atol=1e-3 * np.abs(ours[key]).max()) for key in ours)


@pytest.mark.parametrize("control", ["two_weights", pytest.param("input_affine", marks=pytest.mark.slow)])
def test_a_control_is_an_input(control, train_step, tmp_path):
    off = {"train_gamma": False, "train_beta": False, "train_head": False}
    model = small(train_step, control=control, **off)
    program = torch.export.load(export(model, tmp_path / "net.pt2", "pt2", adapter="inputs")).module()
    with np.load(export(model, tmp_path / "a.npz", "npz")) as arrays:
        assert any(key.endswith((".values", ".scale")) for key in arrays)
        found = program(X, {key: torch.from_numpy(value) for key, value in arrays.items()})
    torch.testing.assert_close(found, model(X))


# -- what is refused


class Evo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), timm.layers.EvoNorm2dB0(8)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


class Chooses(nn.Module):
    """Takes another path for other pixels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.norm(x)
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Eigenvalues(nn.Module):
    """Uses an operator that torch.export takes, and ONNX lacks."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.linalg.eigvalsh(self.norm(x)).mean(2)


def wrapped(network, **data):
    return get_bn_only_model(network, BNOnlyConfig(seed=0, data_config={"input_size": [3, 16, 16]} | data)).eval()


def test_what_cannot_be_exported_is_refused(train_step, tmp_path, refused):
    model, target = small(train_step), tmp_path / "net.onnx"
    with refused(ConfigError, "format has no such value", "onnx, pt2, npz"):
        export(model, target, "tflite")
    with refused(ConfigError, "adapter has no such value", "inside, inputs"):
        export(model, target, "onnx", adapter="outside")
    with refused(ConfigError, "bits: for the compact format", "format=onnx"):
        export(model, target, "onnx", bits=4)
    with refused(ConfigError, "adapter: for the onnx format", "onnx or pt2"):
        export(model, tmp_path / "x", "timm", adapter="inputs")
    with refused(UnknownKeyError, "'adaptor'", "nearest key is 'adapter'"):
        export(model, target, "onnx", adaptor="inputs")
    with refused(ConfigError, "which images", "input_size"):
        export(small(train_step, data_config=None), target, "onnx")
    target.write_text("here")
    for format in ("onnx", "pt2", "npz"):
        with refused(OutputFolderError, "exists"):
            export(model, target, format)
    assert target.read_text() == "here"
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("format", ["onnx", "npz"])
def test_a_norm_that_does_not_fold_is_no_input(format, tmp_path, refused):
    options = {"adapter": "inputs"} if format == "onnx" else {}
    with refused(AdapterError, "do not fold into gamma and beta", "norm is a EvoNorm2dB0 with running_var"):
        export(wrapped(Evo()), tmp_path / "x", format, **options)
    assert not [*tmp_path.iterdir()]


def test_a_network_without_a_graph_is_refused_with_what_failed(tmp_path, refused, capsys):
    with refused(NetworkError, "torch.export does not take", "data-dependent"):
        export(wrapped(Chooses()), tmp_path / "x", "pt2")
    with refused(NetworkError, "ONNX cannot express", "_linalg_eigh"):
        export(wrapped(Eigenvalues()), tmp_path / "x", "onnx")
    with refused(ConfigError, "does not take images of data_config's size [3, 16, 16]"):
        export(wrapped(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 20))), tmp_path / "x", "pt2")
    assert not [*tmp_path.iterdir()]
    assert capsys.readouterr().out == "", "PyTorch prints whole graphs"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(missing, train_step, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with refused(ConfigError, "not installed", missing, "pip install 'bn-affine-adapters[onnx]'"):
        export(small(train_step), tmp_path / "x", "onnx")


def test_without_onnxruntime_it_is_written_and_said(train_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = export(small(train_step), tmp_path / "x.onnx", "onnx")
    assert "not run: onnxruntime is not installed" in capsys.readouterr().out
    assert file.stat().st_size > 1000


def test_a_graph_with_other_logits_is_not_written(train_step, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("bn_affine_adapters.deploy.graphs.TOLERANCE", -1.0)
    with refused(AdapterError, "other logits", "allowed is -"):
        export(small(train_step), tmp_path / "x", "pt2")
    assert not [*tmp_path.iterdir()]


# -- the command line, and timm's families


ALONE = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
print(session.run(["logits"], {"images": x, **np.load(sys.argv[2])})[0].tolist())
assert not {"torch", "bn_affine_adapters"} & set(sys.modules)
"""


def test_the_command_line_writes_what_onnxruntime_alone_runs(tmp_path):
    from click.testing import CliRunner

    from bn_affine_adapters.cli import main

    adapter, net, arrays = str(GOLDEN / "adapter-v2"), str(tmp_path / "net.onnx"), str(tmp_path / "digits.npz")
    for command in ([net, "--format", "onnx", "--inputs"], [arrays, "--format", "npz"]):
        result = CliRunner().invoke(main, ["export", adapter, *command])
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[-1] == command[0]
    done = subprocess.run([sys.executable, "-c", ALONE, net, arrays], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    expected = load_bn_only_model(adapter)(torch.from_numpy(images))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-4, atol=1e-4)


RUNTIMES = script("benchmarks/runtimes")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES.FAMILIES)
def test_timms_families_run_in_onnxruntime_in_both_forms(name):
    found = RUNTIMES.measured(name)
    assert max(found.inside, found.inputs) < 1e-4
    assert found.adapter_bytes < found.backbone_bytes / 10


def test_ten_families_are_tried():
    assert len({name.partition("_")[0] for name in RUNTIMES.FAMILIES}) == 10
