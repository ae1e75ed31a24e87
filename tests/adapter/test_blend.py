"""Blended adapters: parameters are averaged, statistics pooled as those of a mixture, heads matched by class name."""

import copy

import pytest
import timm
import torch

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.errors import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:This adapter belongs to weights")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLASSES = {"one": ["cat", "dog", "fox"], "two": ["fox", "cat", "dog"]}


def trained(train_step, name="test_resnet", **settings):
    """Return a network with two trained adapters of the same classes in another order; the second has fewer layers."""
    network = timm.create_model(name, num_classes=3)
    own = {"seed": 0, "train_head": True, **settings}
    model = get_bn_only_model(network, BNOnlyConfig(**own, label_names=CLASSES["one"]), "one")
    train_step(model, steps=5)
    norms = model.peft_config["one"].norm_layers[1:]
    model.add_adapter("two", BNOnlyConfig(**own, label_names=CLASSES["two"], norm_layers=norms))
    model.set_adapter("two")
    return train_step(model, steps=5)


@pytest.fixture(scope="module")
def made(train_step):
    return trained(train_step)


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


@torch.no_grad()
def answer(model, name):
    model.set_adapter(name)
    return model.eval()(IMAGES)


def layers(model, names):
    """Yield the copies of a norm layer that adapters have, or the base layer."""
    for layer in adapter_layers(model):
        if layer.canonical_name != "fc":
            yield [
                layer.base_layer,
                *(layer.bn_only_layers[n] if n in layer.configs else layer.base_layer for n in names),
            ]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_the_whole_weight_of_one_gives_that_one(weights, model):
    model.add_weighted_adapter(["one", "two"], list(weights), "blend")
    assert model.active_adapter == "two"
    expected = answer(model, "one" if weights[0] else "two")
    names = CLASSES["one" if weights[0] else "two"]
    order = [names.index(name) for name in model.peft_config["blend"].label_names]
    assert torch.allclose(answer(model, "blend"), expected[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.3)])
def test_parameters_are_averaged_and_the_base_has_what_is_left(weights, model):
    model.add_weighted_adapter(["one", "two"], list(weights), "blend")
    shares, count = [1 - sum(weights), *weights], 0
    for base, one, two, blend in layers(model, ["one", "two", "blend"]):
        for key in ("weight", "bias", "running_mean"):
            expected = sum(share * getattr(m, key) for share, m in zip(shares, (base, one, two), strict=True))
            assert torch.allclose(getattr(blend, key), expected, rtol=1e-5, atol=1e-6)
            count += 1
    assert count == 3 * len(model.peft_config["one"].norm_layers) > 10
    assert model.peft_config["blend"].norm_layers == model.peft_config["one"].norm_layers


def test_statistics_are_those_of_all_values_together(model):
    samples = [torch.randn(1000, 4) * 2 + 1, torch.randn(1000, 4) * 0.5 - 3, torch.randn(1000, 4)]
    shares = [2, 5, 3]  # in tenths
    layer = next(layer for layer in adapter_layers(model) if "two" in layer.configs)
    modules = (layer.base_layer, layer.bn_only_layers["one"], layer.bn_only_layers["two"])
    for module, sample in zip(modules, samples, strict=True):
        module.running_mean[:4] = sample.mean(0)
        module.running_var[:4] = sample.var(0, correction=0)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.3], "blend")
    whole = torch.cat([sample.repeat(share, 1) for sample, share in zip(samples, shares, strict=True)])
    blend = layer.bn_only_layers["blend"]
    assert torch.allclose(blend.running_mean[:4], whole.mean(0), atol=1e-5)
    assert torch.allclose(blend.running_var[:4], whole.var(0, correction=0), rtol=1e-5)


def test_heads_are_averaged_class_by_class(model):
    model.add_weighted_adapter(["one", "two"], [0.25, 0.25], "blend")
    head = next(layer for layer in adapter_layers(model) if layer.canonical_name == "fc").bn_only_layers
    expected = (head["one"].weight + head["two"].weight[[1, 2, 0]]) / 2
    assert torch.allclose(head["blend"].weight, expected)
    assert model.peft_config["blend"].label_names == CLASSES["one"]


def test_the_head_of_one_adapter_can_be_asked_for(model):
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "blend", head="two")
    head = next(layer for layer in adapter_layers(model) if layer.canonical_name == "fc").bn_only_layers
    assert torch.equal(head["blend"].weight, head["two"].weight)
    assert model.peft_config["blend"].label_names == CLASSES["two"]


@pytest.mark.parametrize(
    "settings", [{}, {"control": "two_weights"}, {"extra_trainable_modules": ["layer1.0"]}], ids=str
)
def test_a_blend_is_saved_and_loads_as_what_it_computes(settings, tmp_path, train_step):
    model = trained(train_step, **settings)
    model.add_weighted_adapter(["one", "two"], [0.4, 0.4], "blend")
    expected = answer(model, "blend")
    model.save_pretrained(tmp_path, selected_adapters=["blend"])
    loaded = load_bn_only_model(tmp_path / "blend")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), expected)
    assert torch.equal(answer(model, "blend"), expected)


def test_between_base_and_adapter_lies_every_scale(model):
    for scale in (0, 0.5, 1):
        model.scale_adapter("one", scale, f"one_{scale * 10:.0f}")
    assert torch.allclose(answer(model, "one_10"), answer(model, "one"), atol=1e-5)
    for base, one, none, half in layers(model, ["one", "one_0", "one_5"]):
        assert torch.allclose(none.weight, base.weight)
        assert torch.allclose(none.running_var, base.running_var)
        assert torch.allclose(half.bias, (base.bias + one.bias) / 2, atol=1e-6)
    head = next(layer for layer in adapter_layers(model) if layer.canonical_name == "fc").bn_only_layers
    assert torch.equal(head["one_0"].weight, head["one"].weight)


def test_without_running_statistics_any_weight_will_do(train_step):
    model = trained(train_step, "test_convnext", layer_scale="train")
    model.add_weighted_adapter(["one"], [1.5], "more")
    model.add_weighted_adapter(["one", "two"], [2, -1], "away")
    scale = model.get_submodule("base_model.model.stages.0.blocks.0.gamma_scale")
    copies = scale.bn_only_layers
    expected = 1.5 * copies["one"].weight - 0.5 * scale.base_layer.weight
    assert torch.allclose(copies["more"].weight, expected, atol=1e-6)
    assert torch.allclose(copies["away"].weight, 2 * copies["one"].weight - copies["two"].weight, atol=1e-6)


REFUSED = {
    "unknown": (AdapterError, (["one", "tow"], [0.5, 0.5], "blend"), ("'tow'", "nearest name is 'two'")),
    "taken": (AdapterError, (["one", "two"], [0.5, 0.5], "one"), ("already",)),
    "too much": (AdapterError, (["one", "two"], [1, 1], "blend"), ("no running statistics", "sum 2")),
    "negative": (AdapterError, (["one", "two"], [1.5, -0.5], "blend"), ("no running statistics",)),
    "a weight too few": (ConfigError, (["one", "two"], [1], "blend"), ("a weight for each",)),
    "twice": (ConfigError, (["one", "one"], [0.5, 0.5], "blend"), ("different adapters",)),
    "none": (ConfigError, ([], [], "blend"), ("list of different",)),
    "not finite": (ConfigError, (["one"], [float("nan")], "blend"), ("finite",)),
    "no weight for heads": (ConfigError, (["one", "two"], [0, 0], "blend"), ("sum to 0",)),
    "another method": (ConfigError, (["one"], [1], "blend", "svd"), ("combination_type",)),
    "no such head": (ConfigError, (["one"], [1], "blend", "linear", "two"), ("head",)),
    "a bad name": (AdapterError, (["one"], [1], "a.b"), ("cannot be the name",)),
}


@pytest.mark.parametrize(("kind", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_blended_is_refused_and_leaves_no_adapter(kind, arguments, words, model, refused):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        model.add_weighted_adapter(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert [*model.peft_config] == ["one", "two"]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("labels", [None, ["a", "b", "c"]])
def test_heads_of_other_classes_are_refused(labels, model, refused):
    model.add_adapter("three", BNOnlyConfig(seed=0, train_head=True, label_names=labels))
    with refused(AdapterError, "same class names", "three", "head='one'"):
        model.add_weighted_adapter(["one", "three"], [0.5, 0.5], "blend")
    model.add_weighted_adapter(["one", "three"], [0.5, 0.5], "blend", head="three")
    assert model.peft_config["blend"].label_names == labels


def test_adapters_of_different_controls_are_refused(model, refused):
    model.add_adapter("three", BNOnlyConfig(seed=0, train_head=True, control="input_affine"))
    with refused(AdapterError, "controls", "input_affine"):
        model.add_weighted_adapter(["one", "three"], [0.5, 0.5], "blend", head="one")
