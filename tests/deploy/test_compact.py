"""Compact adapters: one small file, which loads to a verified network, with the same bits each time."""

import json
import re
import struct
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import each_once
from huggingface_hub import HfApi
from safetensors.numpy import load as parse
from safetensors.numpy import save
from torch import nn

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.fold import copies, parameters
from bn_affine_adapters.cli import main
from bn_affine_adapters.deploy.qr import MAX_BYTES
from bn_affine_adapters.errors import (
    AdapterError,
    AdapterFileError,
    AdapterTensorError,
    ConfigError,
    DataError,
    FingerprintError,
    FormatVersionError,
    OutputFolderError,
    UnknownKeyError,
)
from bn_affine_adapters.settings import COMPACT_NAME
from bn_affine_adapters.sharing.compact import BITS, METADATA, TENSOR

GOLDEN = Path(__file__).parents[1] / "golden"
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
# name: (architecture, creation arguments, configuration)
NETWORKS = {
    "batch norm": ("test_resnet", {"num_classes": 3}, {"seed": 7, "data_config": {"input_size": [3, 32, 32]}}),
    "head": ("test_resnet", {"num_classes": 3}, {"seed": 7, "train_head": True, "label_names": ["a", "b", "c"]}),
    "layer norm": ("test_convnext", {"num_classes": 3}, {"seed": 7, "layer_scale": "train"}),
    "group norm": ("test_vit", {"num_classes": 3, "img_size": 32}, {"seed": 7, "data_config": None}),
    "given weights": ("test_resnet", {"num_classes": 3}, {}),
    "control": ("test_resnet", {}, {"seed": 7, "control": "two_weights", "train_gamma": False, "train_beta": False}),
    "module": ("test_resnet", {}, {"seed": 7, "extra_trainable_modules": ["layer4.0.downsample"]}),
}


def trained(train_step, name="batch norm", steps=2):
    architecture, args, config = NETWORKS[name]
    torch.manual_seed(0)
    model = get_bn_only_model(timm.create_model(architecture, **args), BNOnlyConfig(**config))
    return train_step(model, steps=steps)


@pytest.fixture(scope="module")
def model(train_step):
    return trained(train_step)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("compact") / "small.safetensors", format="compact")


def base_of(name):
    """Return the network that an adapter without a seed is loaded on; None with a seed."""
    architecture, args, config = NETWORKS[name]
    torch.manual_seed(0)
    return None if "seed" in config else timm.create_model(architecture, **args)


def values(model, name="default"):
    return parameters(copies(model.get_base_model(), name, model.peft_config[name]))


@each_once(name=[*NETWORKS], bits=[16, 8, 4])
def test_a_compact_file_loads_to_the_network_that_was_exported(name, bits, train_step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bn_affine_adapters.deploy.compact.STEPS", 3)  # of the fit, which takes long
    model = trained(train_step, name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = export(model, tmp_path / "small.safetensors", format="compact", bits=bits, images=X)
    loaded = load_bn_only_model(made, base_of(name))
    worst = (model(X) - loaded(X)).abs().max().item()
    assert worst <= {16: 2e-2, 8: 1, 4: 10}[bits] * model(X).abs().max().item(), worst
    said = re.fullmatch(rf"[\d,]+ bytes, {bits} bits; largest .* logits (\S+) on 2 images\n", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(worst, rel=0.02, abs=1e-4)
    assert loaded.peft_config["default"].backbone_fingerprint == model.peft_config["default"].backbone_fingerprint
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = load_bn_only_model(made, base_of(name))
    assert torch.equal(loaded(X), again(X))
    assert len(values(loaded)) == len(values(model)) > 4


def test_the_fit_keeps_the_logits_better_than_plain_rounding(model, tmp_path, monkeypatch, capsys):
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    errors = []
    for steps in (0, 40):
        monkeypatch.setattr("bn_affine_adapters.deploy.compact.STEPS", steps)
        made = export(model, tmp_path / f"{steps}.safetensors", format="compact", bits=4, images=images)
        errors.append((load_bn_only_model(made)(images) - model(images)).square().mean().item())
    assert errors[1] < 0.7 * errors[0], errors
    assert "on 64 images" in capsys.readouterr().out


def test_random_images_are_named_as_such(model, tmp_path, capsys):
    test = [(X, torch.tensor([0, 1]))]
    export(model, tmp_path / "x.safetensors", format="compact", test=test)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("on 16 random images")
    assert second.startswith("accuracy ")
    assert second.endswith(" after, 2 images")


def test_it_loads_from_a_folder_and_from_the_hub(model, file, hub, alice, tmp_path):
    expected = load_bn_only_model(file)(X)
    made = export(model, tmp_path, format="compact")
    assert made == tmp_path / COMPACT_NAME
    assert made.read_bytes() == file.read_bytes()
    assert torch.equal(load_bn_only_model(tmp_path)(X), expected)
    api = HfApi(token=alice)
    api.create_repo("alice/small")
    for name in (COMPACT_NAME, f"inside/{COMPACT_NAME}"):
        api.upload_file(repo_id="alice/small", path_or_fileobj=file, path_in_repo=name)
    assert torch.equal(load_bn_only_model("alice/small")(X), expected)
    assert torch.equal(load_bn_only_model("alice/small", subfolder="inside")(X), expected)
    assert torch.equal(load_bn_only_model("alice/small", local_files_only=True)(X), expected)


def test_a_whole_adapter_beside_it_comes_first(model, file, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / COMPACT_NAME).write_bytes(file.read_bytes())
    assert not load_bn_only_model(tmp_path).peft_config["default"].compact
    assert load_bn_only_model(tmp_path / COMPACT_NAME).peft_config["default"].compact


def test_what_is_saved_again_is_an_adapter_with_folded_statistics(file, tmp_path, train_step):
    loaded = load_bn_only_model(file)
    loaded.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, is_trainable=True).eval()
    assert torch.equal(again(X), loaded(X))
    norms = [m for m in again.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad]
    assert all(not norm.running_mean.any() for norm in norms)
    assert all(torch.equal(norm.running_var, torch.full_like(norm.running_var, 1 - norm.eps)) for norm in norms)
    assert len(norms) > 4
    train_step(again, steps=1)


def test_it_is_not_trained(file, refused):
    with refused(AdapterError, "for inference", "is_trainable=True"):
        load_bn_only_model(file, is_trainable=True)
    loaded = load_bn_only_model(file)
    with refused(AdapterError, "for inference", "training mode"):
        loaded.train()(X)
    with refused(AdapterError, "for inference", "training mode"):
        loaded.get_base_model()(X)
    assert loaded.eval()(X).isfinite().all()


# -- what is refused when it is written


class Evo(nn.Module):
    """Divides by statistics that come after no linear function of its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = timm.layers.EvoNorm2dB0(8)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


def test_what_cannot_be_exported_is_refused(model, file, tmp_path, refused):
    target = tmp_path / "x.safetensors"
    for bits in (5, 0, 8.0, True, "8", None):
        with refused(ConfigError, "no such number of bits", "4, 6, 8, 16"):
            export(model, target, format="compact", bits=bits)
    with refused(OutputFolderError, "exists"):
        export(model, file, format="compact")
    with refused(ConfigError, "bits: for the compact format"):
        export(model, tmp_path / "plain", bits=4)
    evo = get_bn_only_model(Evo(), BNOnlyConfig(seed=0))
    with refused(AdapterError, "fold into gamma and beta", "norm is a EvoNorm2dB0 with running_var"):
        export(evo, target, format="compact", images=X)
    plain = get_bn_only_model(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8)), BNOnlyConfig(seed=0)
    )
    with refused(AdapterError, "fold into gamma and beta", "1 is a BatchNorm2d"):
        export(plain, target, format="compact", images=X)
    unknown = get_bn_only_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), BNOnlyConfig(seed=0))
    with refused(ConfigError, "which images"):
        export(unknown, target, format="compact")
    assert not target.exists()


def test_values_that_no_file_holds_are_refused(train_step, tmp_path, refused):
    model = trained(train_step)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad)
    for value in (float("nan"), float("inf"), 1e30):
        norm.bias.data[0] = value
        with refused(AdapterTensorError):
            export(model, tmp_path / "x.safetensors", format="compact")


def test_a_network_of_ones_own_code_is_compared_with_its_settings(train_step, tmp_path, refused):
    def network(eps=1e-5):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    model = train_step(get_bn_only_model(network(), BNOnlyConfig(seed=0)))
    made = export(model, tmp_path / "x.safetensors", format="compact", images=X, bits=16)
    torch.testing.assert_close(load_bn_only_model(made, network())(X), model(X), rtol=1e-3, atol=1e-3)
    with refused(FingerprintError, "another class or setting"):
        load_bn_only_model(made, network(1e-2))
    rewrite(made, made, lambda content: content.pop("traits_fingerprint"))
    with refused(ConfigError, "traits_fingerprint"):
        load_bn_only_model(made, network())


# -- what is refused when it is read


def parts(file):
    """Return the settings and the bytes of a compact file."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][METADATA]), bytearray(parse(content)[TENSOR])


def rewrite(file, target, on_settings=lambda content: None, on_bytes=lambda data: None, digest=False):
    """Write a compact file with other settings or bytes; with ``digest``, the values have the digest of the file."""
    content, data = parts(file)
    on_settings(content)
    on_bytes(data)
    if digest:
        found = sha256(b"".join(struct.pack("<f", value) for value in decoded(content["bits"], data))).digest()
        data[48:64] = found[:16]
    target.write_bytes(save({TENSOR: np.frombuffer(bytes(data), np.uint8)}, {METADATA: json.dumps(content)}))
    return target


def sizes_of_golden():
    network = timm.create_model("cifar_resnet14", num_classes=10)
    return [size for m in network.modules() if isinstance(m, nn.BatchNorm2d) for size in (m.num_features,) * 2]


def decoded(bits, data, sizes=None):
    """Decode a compact file's values as docs/adapter-format.md says, without numpy's or our help."""
    sizes = sizes or SMALL_SIZES
    grid = 2 if bits < 8 else 1
    numbers = struct.unpack_from(f"<{grid * len(sizes)}e", data, 64)
    stream = int.from_bytes(data[64 + 2 * grid * len(sizes) :], "little")

    def float32(number):
        return struct.unpack("<f", struct.pack("<f", number))[0]

    found, place = [], 0
    for index, size in enumerate(sizes):
        for _ in range(size):
            code = stream >> (place * bits) & (2**bits - 1)
            value = float32((code - 2 ** (bits - 1)) * numbers[grid * index])
            found.append(float32(value + numbers[grid * index + 1]) if grid == 2 else value)
            place += 1
    return found


SMALL_SIZES = [
    size
    for m in timm.create_model("test_resnet").modules()
    if isinstance(m, nn.BatchNorm2d)
    for size in (m.num_features,) * 2
]


@pytest.mark.parametrize("bits", BITS)
def test_another_reader_finds_the_same_bits(bits, model, tmp_path, monkeypatch):
    monkeypatch.setattr("bn_affine_adapters.deploy.compact.STEPS", 3)
    made = export(model, tmp_path / "x.safetensors", format="compact", bits=bits, images=X)
    tensors = values(load_bn_only_model(made)).values()
    ours = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.equal(ours, torch.tensor(decoded(bits, parts(made)[1])))
    assert max(len(tensor.unique()) for tensor in tensors) <= 2**bits


BROKEN = {
    "version": (FormatVersionError, "newer format", {"on_settings": lambda c: c.update(version=2)}),
    "no-version": (ConfigError, "version", {"on_settings": lambda c: c.pop("version")}),
    "bits": (ConfigError, "bits", {"on_settings": lambda c: c.update(bits=7)}),
    "other-bits": (AdapterTensorError, "another number of values", {"on_settings": lambda c: c.update(bits=16)}),
    "key": (UnknownKeyError, "nearest", {"on_settings": lambda c: c.update(sede=7)}),
    "fingerprint": (UnknownKeyError, "", {"on_settings": lambda c: c.update(backbone_fingerprint="0" * 64)}),
    "verify": (UnknownKeyError, "", {"on_settings": lambda c: c.update(verify="off")}),
    "seed": (FingerprintError, "frozen weights", {"on_settings": lambda c: c.update(seed=8)}),
    "other-network": (
        FingerprintError,
        "names or shapes",
        {"on_settings": lambda c: c.update(architecture="test_vit")},
    ),
    "no-network": (ConfigError, "network", {"on_settings": lambda c: c.pop("architecture")}),
    "backbone": (FingerprintError, "frozen weights", {"on_bytes": lambda d: d.__setitem__(0, d[0] ^ 1)}),
    "no-backbone": (ConfigError, "network", {"on_bytes": lambda d: d.__setitem__(slice(0, 16), bytes(16))}),
    "frozen": (
        FingerprintError,
        "head or norm layers",
        {"on_bytes": lambda d: d.__setitem__(slice(16, 32), bytes(16))},
    ),
    "layout": (FingerprintError, "names or shapes", {"on_bytes": lambda d: d.__setitem__(slice(32, 48), bytes(16))}),
    "digest": (AdapterTensorError, "other values", {"on_bytes": lambda d: d.__setitem__(63, d[63] ^ 1)}),
    "value": (AdapterTensorError, "other values", {"on_bytes": lambda d: d.__setitem__(-1, d[-1] ^ 1)}),
    "cut": (AdapterTensorError, "another number of values", {"on_bytes": lambda d: d.__delitem__(-1)}),
    "longer": (AdapterTensorError, "another number of values", {"on_bytes": lambda d: d.append(0)}),
    "head-alone": (AdapterFileError, "whole compact", {"on_bytes": lambda d: d.__delitem__(slice(63, None))}),
    "infinite": (AdapterTensorError, "not finite", {"on_bytes": lambda d: d.__setitem__(slice(64, 66), b"\x00\x7c")}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_compact_file_is_refused(case, file, tmp_path, refused):
    kind, word, how = BROKEN[case]
    broken = rewrite(file, tmp_path / "x.safetensors", **how)
    with refused(kind, word):
        load_bn_only_model(broken)


def test_a_network_given_is_as_before_when_its_compact_file_is_refused(file, tmp_path, refused):
    broken = rewrite(file, tmp_path / "x.safetensors", on_bytes=lambda data: data.__setitem__(-1, data[-1] ^ 1))
    network = timm.create_model("test_resnet", num_classes=3)
    names = [name for name, _ in network.named_modules()]
    with refused(AdapterTensorError):
        load_bn_only_model(broken, network)
    assert [name for name, _ in network.named_modules()] == names
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert load_bn_only_model(file, network)(X).isfinite().all()


def test_what_becomes_infinite_in_the_network_given_is_refused(file, tmp_path, refused):
    step = np.float16(60000).tobytes()
    large = rewrite(
        file, tmp_path / "x.safetensors", on_bytes=lambda d: d.__setitem__(slice(64, 66), step), digest=True
    )
    assert load_bn_only_model(large)
    network = timm.create_model("test_resnet", num_classes=3).half()
    with refused(AdapterTensorError, "not finite"):
        load_bn_only_model(large, network)


def test_what_takes_no_compact_file_says_so(file, tmp_path):
    from click.testing import CliRunner

    (tmp_path / COMPACT_NAME).write_bytes(file.read_bytes())
    result = CliRunner().invoke(main, ["diff", str(tmp_path), "x"])
    assert result.exit_code == 2, result.output
    assert "a compact adapter" in result.output
    assert "save_pretrained" in result.output


def test_a_compact_file_is_no_further_adapter_of_a_model(file, tmp_path, refused):
    loaded = load_bn_only_model(file)
    with refused(AdapterFileError, "a compact adapter", "save_pretrained"):
        loaded.load_adapter(file, "two")
    loaded.save_pretrained(tmp_path)
    loaded.load_adapter(tmp_path, "two")
    loaded.set_adapter("two")
    assert torch.equal(loaded(X), load_bn_only_model(file)(X))
    again = export(loaded, tmp_path / "again.safetensors", format="compact", adapter_name="two")
    assert torch.equal(load_bn_only_model(again)(X), loaded(X))


# -- the command line, QR codes, sizes


def test_the_command_line_exports_validates_and_verifies(
    tmp_path, monkeypatch, each_run_begins_as_in_a_process_of_its_own
):
    from click.testing import CliRunner

    made, runner = tmp_path / "digits.safetensors", CliRunner()
    adapter = str(GOLDEN / "adapter-v2")
    result = runner.invoke(main, ["export", adapter, str(made), "--format", "compact", "--dataset", "digits"])
    assert result.exit_code == 0, result.output
    assert "largest difference of the logits" in result.output
    assert "on 400 images" in result.output
    assert "after, 359 images" in result.output
    after = result.output.split(" before, ")[1].split(" %")[0]
    assert f"accuracy  {after} % top-1" in runner.invoke(main, ["validate", str(made)]).output
    assert runner.invoke(main, ["verify", str(made)]).exit_code == 0
    missing = ["export", adapter, str(tmp_path / "x"), "--format", "compact", "--dataset", str(tmp_path / "nowhere")]
    result = runner.invoke(main, missing)
    assert result.exit_code == 2
    assert result.output.startswith(f"{DataError.__name__}: ")


def test_a_qr_code_is_the_file(tmp_path, capsys):
    pytest.importorskip("segno")
    zxingcpp = pytest.importorskip("zxingcpp")
    from PIL import Image

    model = load_bn_only_model(GOLDEN / "adapter-v2")
    made = export(model, tmp_path / "a.safetensors", format="compact", qr=tmp_path / "a.png")
    (found,) = zxingcpp.read_barcodes(Image.open(tmp_path / "a.png"))
    read = tmp_path / "read.safetensors"
    read.write_bytes(found.bytes)
    assert read.read_bytes() == made.read_bytes()
    images = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
    assert torch.equal(load_bn_only_model(read)(images), load_bn_only_model(made)(images))


def test_a_qr_code_that_cannot_be_written_is_refused(model, tmp_path, refused):
    pytest.importorskip("segno")
    target = tmp_path / "x.safetensors"
    large = get_bn_only_model(timm.create_model("cifar_resnet56", num_classes=10), BNOnlyConfig(seed=0)).eval()
    middle = get_bn_only_model(timm.create_model("cifar_resnet32", num_classes=10), BNOnlyConfig(seed=0)).eval()
    with refused(ConfigError, "does not fit into one QR code", "with bits=16", "bits=4 or 6 or 8 would fit"):
        export(middle, target, format="compact", bits=16, qr=tmp_path / "x.png")
    with refused(ConfigError, "too many", "would fit") as caught:
        export(large, target, format="compact", bits=8, qr=tmp_path / "x.png")
    size = int(caught.value.seen.split(" ")[0].replace(",", ""))
    assert f"{size - MAX_BYTES:,} too many" in caught.value.seen
    with refused(ConfigError, ".png or .svg"):
        export(model, target, format="compact", qr=tmp_path / "x.jpg")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("architecture", "classes", "most"),
    [
        ("cifar_resnet14", 10, 1_700),
        pytest.param("cifar_resnet110", 10, 10_000, marks=pytest.mark.slow),
        pytest.param("resnet50", 1000, 62_000, marks=pytest.mark.slow),
    ],
)
def test_the_file_is_small(architecture, classes, most, tmp_path):
    network = timm.create_model(architecture, num_classes=classes)
    model = get_bn_only_model(network, BNOnlyConfig(seed=0)).eval()
    images = torch.randn(1, 3, 64, 64)
    size = export(model, tmp_path / "x.safetensors", format="compact", images=images).stat().st_size
    assert size <= most, size


# -- what was written once stays readable


@pytest.mark.parametrize("bits", [8, 4])
def test_the_golden_files_give_the_same_bits(bits):
    file = GOLDEN / f"compact-v1-{bits}bits.safetensors"
    expected = json.loads((GOLDEN / "compact-v1.json").read_text())[str(bits)]
    content, data = parts(file)
    assert content["version"] == 1
    loaded = load_bn_only_model(file)
    ours = torch.cat([tensor.flatten() for tensor in values(loaded).values()])
    assert torch.equal(ours, torch.tensor(decoded(bits, data, sizes_of_golden())))
    assert sha256(ours.numpy().astype("<f4").tobytes()).hexdigest() == expected["values"]
    images = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
    torch.testing.assert_close(loaded(images)[0], torch.tensor(expected["logits"]), rtol=1e-3, atol=1e-3)
