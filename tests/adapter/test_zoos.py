"""Networks of Transformers and torchvision are rebuilt from the adapter alone, and nothing else is built."""

import copy
import json
import shutil

import pytest
import timm
import torch
import torchvision
from PIL import Image
from tables import check_answers
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, predict, recalibrate
from bn_affine_adapters.adapter.limits import build_within
from bn_affine_adapters.adapter.rebuild import create
from bn_affine_adapters.errors import (
    AdapterError,
    BaseRequiredError,
    FingerprintError,
    RebuildError,
    TooLargeError,
    UnknownArchitectureError,
)
from bn_affine_adapters.norms.find import logits_of
from bn_affine_adapters.settings import MAX_PARAMETERS, TRANSFORMERS, creation_call

transformers = pytest.importorskip("transformers")

VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}
TINY = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ViT": VIT,
    "DeiT": VIT,
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 32},
    "Swin": {
        "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4,
    },
    "Beit": VIT | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "TimmWrapper": {"architecture": "test_resnet", "model_args": {"channels": [8, 8, 16, 16]}},
}  # fmt: skip
NAMES = ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
SLOW = ["swin_t", "convnext_tiny", "efficientnet_b0", "densenet121", "regnet_x_400mf", "vgg11_bn", "maxvit_t"]
MORE = ["ViT", "ConvNextV2", "TimmWrapper", "torchvision:resnet18"]  # one each of what differs


def of_transformers(family, **settings):
    kind = getattr(transformers, f"{family}ForImageClassification")
    return kind(kind.config_class(**{"num_labels": 4, **TINY[family], **settings}))


def network(name, classes=4):
    """A network, and the architecture that its adapter has to name."""
    zoo, _, own = name.rpartition(":")
    if zoo:
        return torchvision.models.get_model(own, weights=None, num_classes=classes), name
    return of_transformers(name, num_labels=classes), None


def wrapped(name, classes=4, **settings):
    base, architecture = network(name, classes)
    config = BNOnlyConfig(**{"seed": 3, "train_head": True, "architecture": architecture, **settings})
    return get_bn_only_model(base, config).eval()


def images(count=4, seed=1, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def size_of(model):
    """The size of images: MaxViT takes one alone, and of 32 pixels RegNet's last layers see one each, and overflow."""
    named = str(model.peft_config["default"].architecture)
    return next((size for name, size in {"maxvit": 224, "regnet": 64}.items() if name in named), 32)


@torch.no_grad()
def logits(model):
    return logits_of(model.eval()(images(size=size_of(model))))


def trained(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    F.cross_entropy(logits_of(model(images(size=size_of(model)))), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    return model.eval()


CASES = [*TINY, *(f"torchvision:{name}" for name in NAMES)]


def test_all_classes_are_tried():
    assert tuple(f"{family}ForImageClassification" for family in TINY) == TRANSFORMERS


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(f"torchvision:{each}", marks=pytest.mark.slow) for each in SLOW)]
)
def test_trained_and_rebuilt_from_the_adapter_alone(name, tmp_path):
    model = trained(before := wrapped(name))
    expected = logits(model)
    assert expected.isfinite().all()
    assert not torch.equal(expected, logits(wrapped(name)))
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path)
    assert torch.equal(expected, logits(again))
    assert expected.shape == (4, 4)
    config = again.peft_config["default"]
    assert config.architecture == (name if ":" in name else f"transformers:{name}ForImageClassification")
    assert len(config.head_layers) == 1
    ours, theirs = before.get_base_model(), again.get_base_model()
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_drawn_from_the_seed_alone(name):
    """Two networks of other weights become the same; and a network that the seed fills has no value left as NaN."""
    torch.manual_seed(0)
    one = wrapped(name)
    torch.manual_seed(1)
    other = wrapped(name)
    for (key, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
        assert a.isfinite().all()


def test_layer_scales_and_response_norms_are_known_by_their_names_there():
    for family, ends in (("ConvNext", "layer_scale_parameter"), ("Beit", "lambda_1")):
        model = wrapped(family)
        scales = model.peft_config["default"].layer_scales
        assert any(name.endswith(ends) for name in scales)
        values = dict(model.get_base_model().named_parameters())
        assert all(bool((values[name] == 1).all()) for name in scales)
        free = wrapped(family, layer_scale="train")
        assert any(parameter.requires_grad for name, parameter in free.named_parameters() if f"{ends}_scale" in name)
    assert any(name.endswith("grn") for name in wrapped("ConvNextV2").peft_config["default"].norm_layers)


@pytest.mark.parametrize("name", MORE)
def test_weights_that_were_given_are_verified_as_those_of_timm(name, tmp_path, refused):
    base, architecture = network(name)
    original = copy.deepcopy(base)
    model = get_bn_only_model(base, BNOnlyConfig(architecture=architecture))
    trained(model).save_pretrained(tmp_path)
    assert torch.equal(logits(load_bn_only_model(tmp_path, copy.deepcopy(original))), logits(model))
    with refused(BaseRequiredError, "given weights", "model=base"):
        load_bn_only_model(tmp_path)
    wrong = copy.deepcopy(original)
    kinds = nn.Linear | nn.Conv2d
    frozen = next(module for module in wrong.modules() if isinstance(module, kinds) and len(module.weight) > 4)
    with torch.no_grad():
        frozen.weight.flatten()[0] += 1e-3
    with refused(FingerprintError, "frozen weights differ"):
        load_bn_only_model(tmp_path, wrong)


def test_another_configuration_is_another_network(tmp_path, refused):
    wrapped("ViT").save_pretrained(tmp_path)
    with refused(RebuildError, "is not the network given", "transformers.ViTForImageClassification("):
        load_bn_only_model(tmp_path, of_transformers("ViT", layer_norm_eps=1e-3))
    base = of_transformers("Swin")
    base.config.window_size = 2
    with refused(RebuildError, "window_size"):
        get_bn_only_model(base, BNOnlyConfig(seed=0))
    model = wrapped("MobileNetV2")
    model.get_base_model().config.tf_padding = False  # read in each forward
    with refused(AdapterError, "configuration was", "tf_padding"):
        model.save_pretrained(tmp_path / "changed")


def test_a_class_that_is_not_on_the_list_loads_with_model_as_before(tmp_path):
    settings = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "sr_ratios": [2, 1]}
    more = {"num_attention_heads": [1, 2], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    kind = transformers.SegformerForImageClassification
    base = kind(transformers.SegformerConfig(**settings, **more, num_labels=4))
    again = copy.deepcopy(base)
    model = get_bn_only_model(base, BNOnlyConfig(seed=3))
    assert model.peft_config["default"].architecture == "custom"
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(load_bn_only_model(tmp_path, again)), logits(model))


@pytest.mark.parametrize("name", MORE)
def test_predict_recalibrate_lean_compact_and_mixed_batches(name, tmp_path):
    data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    model = wrapped(name, data_config=data, label_names=["a", "b", "c", "d"])
    best = predict(model, Image.new("RGB", (40, 36), (90, 10, 200)), top_k=1)[0]
    pixels = torch.tensor([90, 10, 200]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1
    with torch.no_grad():
        assert best.label == "abcd"[int(logits_of(model(pixels)).argmax())]
    file = export(model, tmp_path / "small.safetensors", format="compact")
    assert torch.allclose(logits(load_bn_only_model(file)), logits(model), rtol=0.1, atol=0.1)
    other = BNOnlyConfig(seed=3, train_head=True, norm_init="ones", model_args={"num_classes": 2})
    model.add_adapter("other", other)
    together = model(images(2), adapter_names=["default", "other"])
    assert [len(each) for each in together] == [4, 2]
    assert torch.allclose(together[0], logits(model)[0], atol=1e-5)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        recalibrate(model, [images(16, 2)])
    assert model.set_lean("exact").share is not None  # it was tried, and keeps the output
    trained(model)


def test_the_size_of_the_images_is_that_of_the_configuration():
    model = wrapped("ViT", data_config={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert model.peft_config["default"].data_config["input_size"] == [3, 32, 32]
    assert wrapped("ViT").peft_config["default"].data_config is None  # mean and std are known to nobody
    assert wrapped("TimmWrapper").peft_config["default"].data_config["mean"] == [0.5, 0.5, 0.5]  # of test_resnet


@pytest.mark.parametrize("name", MORE)
def test_the_call_that_an_error_or_a_card_shows_builds_the_network(name):
    config = wrapped(name).peft_config["default"]
    call = creation_call(config.architecture, config.model_args)
    built = eval(call, {"transformers": transformers, "torchvision": torchvision, "timm": timm})
    outline = create(config.architecture, config.model_args, "meta")
    assert [(n, p.shape) for n, p in built.named_parameters()] == [(n, p.shape) for n, p in outline.named_parameters()]


# -- what a stranger's file could ask for


def asked(name, /, **args):
    settings = {"architecture": name, "model_args": args, "seed": 0, "backbone_fingerprint": "0"}
    return lambda: build_within(BNOnlyConfig(**settings), MAX_PARAMETERS)


def of(family, /, **args):
    return asked(f"transformers:{family}ForImageClassification", **args)


RELATIVE = {"use_relative_position_bias": True}
REFUSED = [
    ("`transformers:GPT2LMHeadModel`, a class that is not on the list", asked("transformers:GPT2LMHeadModel")),
    ("`transformers:AutoModelForImageClassification`", asked("transformers:AutoModelForImageClassification")),
    ("`transformers:models.vit.ViTForImageClassification`", asked("transformers:models.vit.ViTForImageClassification")),
    ("`torchvision:fasterrcnn_resnet50_fpn`, which loads a backbone", asked("torchvision:fasterrcnn_resnet50_fpn")),
    ('`torchvision:resnet18` with `weights="DEFAULT"`', asked("torchvision:resnet18", weights="DEFAULT")),
    ("`torchvision:resnet18` with `pretrained=True`", asked("torchvision:resnet18", pretrained=True)),
    ("`evil:resnet18`", asked("evil:resnet18")),
    ("`trust_remote_code=True`", of("ViT", trust_remote_code=True)),
    ('`auto_map=["me/x--code.Model"]`', of("ViT", auto_map=["me/x--code.Model"])),
    ('`attn_implementation="me/kernels"`, which loads code from the Hub', of("ViT", attn_implementation="me/kernels")),
    ('`_name_or_path="me/x"`', of("ViT", _name_or_path="me/x")),
    ('`quantization_config={"load_in_8bit": true}`, nested', of("ViT", quantization_config={"load_in_8bit": True})),
    ('`hidden_size="x"`', of("ViT", hidden_size="x")),
    ('`hidden_act="os.system"`', of("ViT", hidden_act="os.system")),
    ("`hidden_size=1_000_000_000`", of("ViT", hidden_size=10**9)),
    ("`num_hidden_layers=1_000_000`", of("ViT", num_hidden_layers=10**6)),
    ("`image_size=20_000, patch_size=1`", of("ViT", image_size=20_000, patch_size=1)),
    (
        "BEiT with a window of 5,000 x 5,000",
        of("Beit", image_size=20_000, patch_size=4, use_relative_position_bias=True),
    ),
    ("a head of 1,000,000,000 classes", of("ResNet", num_classes=10**9)),
    ("`TimmWrapper` of `vit_giant_patch14_dinov2`", of("TimmWrapper", architecture="vit_giant_patch14_dinov2")),
    ("`TimmWrapper` of `hf-hub:me/x`", of("TimmWrapper", architecture="hf-hub:me/x")),
    ("`TimmWrapper` of `local-dir:/tmp/x`", of("TimmWrapper", architecture="local-dir:/tmp/x")),
    ("`TimmWrapper` with `pretrained=True`", of("TimmWrapper", architecture="resnet18", pretrained=True)),
    (
        "`TimmWrapper` with `model_args={}`, nested",
        of("TimmWrapper", model_args={}),
    ),
    ("`TimmWrapper` without an architecture", of("TimmWrapper")),
]


@pytest.fixture
def imported():
    """What is imported once is not part of a refusal's time."""
    asked("transformers:ResNetForImageClassification", num_classes=2)()
    asked("torchvision:resnet18", num_classes=2)()


def test_what_a_file_may_not_ask_for(imported):
    check_answers("other-networks.md", "bad input", REFUSED)


@pytest.mark.slow
def test_a_constructor_of_many_layers_is_stopped(imported, refused):
    with refused(TooLargeError, "num_hidden_layers=20000"):
        of("ViT", **{**VIT, "num_hidden_layers": 20_000})()


@pytest.mark.parametrize("edit", [{"architecture": "transformers:ViTModel"}, {"model_args": {"num_classes": 10**10}}])
def test_a_file_is_refused_before_anything_is_built(edit, tmp_path, monkeypatch):
    wrapped("ViT").save_pretrained(tmp_path / "honest")
    folder = shutil.copytree(tmp_path / "honest", tmp_path / "changed")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", lambda *args: pytest.fail("it was built"))
    with pytest.raises((UnknownArchitectureError, TooLargeError)):
        load_bn_only_model(folder)


def test_pretrained_weights_are_read_from_a_file_for_timm_alone(tmp_path, refused):
    from bn_affine_adapters.adapter.rebuild import create_pretrained

    with refused(BaseRequiredError, "model=base"):
        create_pretrained("torchvision:resnet18", {}, tmp_path / "model.safetensors")
    with refused(RebuildError, "timm cannot build a network of own code or of another library"):
        export(wrapped("ResNet"), tmp_path / "plain", format="timm")
