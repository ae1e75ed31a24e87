"""Every door of PEFT opens on a timm network, and nothing moves but what the adapter trains."""

import copy
import pickle
import warnings

import peft
import pytest
import timm
import torch
from conftest import each_once
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from bn_affine_adapters import BNOnlyConfig, BNOnlyPeftModel, get_bn_only_model, load_bn_only_model, shortcut_convs
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.errors import AdapterError, AdapterNameError, ConfigError, FingerprintError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAME = "cifar_resnet14"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def _no_warning_on_a_normal_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def wrapped(name=NAME, arguments=None, **settings):
    model = timm.create_model(name, **(arguments or {}))
    return get_bn_only_model(model, BNOnlyConfig(**{"seed": 0, **settings}))


def two_adapters(train_step):
    """Adapter default: 10 classes; two: 3 classes, another start, other norm layers; both trained."""
    model = train_step(wrapped(train_head=True))
    settings = {"norm_layers": model.peft_config["default"].norm_layers[2:], "model_args": {"num_classes": 3}}
    model.add_adapter("two", BNOnlyConfig(seed=0, train_head=True, **settings))
    model.set_adapter("two")
    return train_step(model)


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def adapter_state(model, name):
    found = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.clone() for key, tensor in found.items()}


def moved(model, before):
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# -- PEFT's doors


def test_get_peft_model_and_from_pretrained_return_our_model(tmp_path, train_step):
    model = peft.get_peft_model(timm.create_model(NAME), BNOnlyConfig(seed=0))
    assert type(model) is BNOnlyPeftModel
    train_step(model).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(timm.create_model(NAME), tmp_path)
    assert type(again) is BNOnlyPeftModel
    assert not again.training
    assert not trained(again)
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_folder_with_a_named_adapter_loads_from_its_subfolder(tmp_path, train_step):
    model = train_step(get_bn_only_model(timm.create_model(NAME), BNOnlyConfig(seed=0), adapter_name="task_1"))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(timm.create_model(NAME), tmp_path, subfolder="task_1")
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_an_adapter_loaded_as_trainable_trains_on(tmp_path, train_step):
    model = train_step(wrapped(train_head=True))
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, is_trainable=True)
    assert trained(again) == trained(model)
    assert moved(train_step(again), state(model))


def test_counts_are_those_of_the_network_as_it_runs(capsys, train_step):
    model = two_adapters(train_step)
    counts = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        counts[name] = model.get_nb_trainable_parameters()
    assert counts == {"default": (1_120 + 650, 175_258), "two": (1_120 - 4 * 16 + 195, 175_258 - 650 + 195)}
    with model.disable_adapter():
        assert model.get_nb_trainable_parameters() == (0, 175_258)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 1,251 || all params: 174,803 ||")


def test_status_tells_layers_adapters_and_method(train_step):
    model = two_adapters(train_step)
    layers, status = model.get_layer_status(), model.get_model_status()
    assert len(layers) == status.num_adapter_layers == 16
    assert {layer.module_type for layer in layers} == {"bn_only.BNOnlyLayer"}
    assert layers[0].available_adapters == ["default"]
    assert layers[-1].available_adapters == ["default", "two"]
    assert status.active_adapters == ["two"]
    assert status.enabled is True
    assert status.requires_grad == {"default": False, "two": True}
    assert status.base_model_type == "CifarResNet"
    assert status.peft_types == {"default": "BN_ONLY", "two": "BN_ONLY"}


@pytest.mark.parametrize("when", ["inactive", "active", "disabled"])
def test_deleting_an_adapter_leaves_the_others_and_none_of_its_tensors(when, train_step):
    model = two_adapters(train_step)
    answer = model(IMAGES)
    if when == "active":
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="Setting active adapter to two"):
            model.delete_adapter("default")
    elif when == "disabled":
        with model.disable_adapter():
            model.delete_adapter("default")
    else:
        model.delete_adapter("default")
    assert model.active_adapter == "two"
    assert not [key for key in model.state_dict() if ".default." in key]
    assert torch.equal(model(IMAGES), answer)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


def test_deleting_the_last_adapter_leaves_the_base():
    model = wrapped().eval()
    with model.disable_adapter():
        base = model(IMAGES)
    model.delete_adapter("default")
    assert not trained(model)
    assert torch.equal(model.base_model.model(IMAGES), base)
    model.add_adapter("two", BNOnlyConfig(seed=0))  # the backbone is still there to be adapted again
    model.set_adapter("two")
    assert torch.equal(model.eval()(IMAGES), wrapped().eval()(IMAGES))


def test_the_same_config_object_wraps_two_networks(train_step):
    config = BNOnlyConfig(seed=0, train_head=True)
    before = config.to_dict()
    models = [get_bn_only_model(timm.create_model(name), config) for name in (NAME, "test_resnet")]
    assert config.to_dict() == before
    assert config.fresh
    assert [model.peft_config["default"].architecture for model in models] == [NAME, "test_resnet"]


# -- merging, unloading


def test_merge_adapter_and_unmerge_adapter_are_exact(train_step):
    model = train_step(wrapped(train_head=True))
    before, answer = state(model), model(IMAGES)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert torch.equal(model(IMAGES), answer)
    model.unmerge_adapter()
    assert not moved(model, before)
    assert torch.equal(model(IMAGES), answer)


@pytest.mark.parametrize("head", [False, True], ids=["bn", "bn+head"])
def test_merge_and_unload_gives_a_plain_network_with_equal_logits(head, train_step):
    model = train_step(wrapped(train_head=head, arguments={"num_classes": 5}))
    answer = model(IMAGES)
    plain = model.merge_and_unload()
    fresh = timm.create_model(NAME, num_classes=5)
    assert type(plain) is type(fresh)
    assert plain.state_dict().keys() == fresh.state_dict().keys()
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert not hasattr(plain, "peft_config")
    assert torch.equal(plain.eval()(IMAGES), answer)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), answer)
    assert type(get_bn_only_model(plain, BNOnlyConfig(seed=1))) is BNOnlyPeftModel


def test_an_adapter_that_is_not_active_can_be_merged_by_name(train_step):
    model = train_step(wrapped())
    model.add_adapter("two", BNOnlyConfig(seed=0, norm_init="ones"))
    model.set_adapter("two")
    answer = train_step(model)(IMAGES)
    model.set_adapter("default")
    assert torch.equal(model.merge_and_unload(adapter_names=["two"])(IMAGES), answer)


def test_an_adapter_of_fewer_layers_than_another_merges(train_step):
    model = two_adapters(train_step)
    model.add_adapter("three", BNOnlyConfig(seed=0, norm_layers=["bn1"]))
    model.set_adapter("three")
    answer = train_step(model)(IMAGES)
    model.merge_adapter()
    assert torch.equal(model(IMAGES), answer)
    model.unmerge_adapter()
    assert torch.equal(model.merge_and_unload()(IMAGES), answer)


def test_merge_and_unload_after_merge_adapter_keeps_what_was_trained(train_step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = train_step(wrapped())
        answer = model(IMAGES)
        model.merge_adapter()
        assert torch.equal(model.merge_and_unload()(IMAGES), answer)


OWNED = {
    "bn": {},
    "bn+head": {"train_head": True},
    "a whole module": {"extra_trainable_modules": ["blocks.0"]},
    "two weights": {"control": "two_weights", "train_gamma": False, "train_beta": False},
    "input affine": {"control": "input_affine"},
}
MERGED = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "by name": lambda model: model.merge_adapter(["default"]),
    "safely": lambda model: model.merge_adapter(safe_merge=True),
    "over another": lambda model: merge_over_another(model),
}


def merge_over_another(model):
    model.merge_adapter(["two"])
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter(["default"])


@each_once(owned=OWNED, merge=MERGED)
def test_every_path_reaches_the_adapters_own_tensors_while_it_is_merged(owned, merge, tmp_path, train_step):
    model = train_step(wrapped(**owned))
    model.add_adapter("two", BNOnlyConfig(seed=0, **owned))
    mine, all_of_it, answer = adapter_state(model, "default"), state(model), model(IMAGES)
    theirs = adapter_state(model, "two")
    merge(model)
    assert torch.equal(model(IMAGES), answer)
    assert not moved(model, all_of_it)
    for name, expected in {"default": mine, "two": theirs}.items():
        found = adapter_state(model, name)
        assert found.keys() == expected.keys()
        assert len(found) > 10
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    model.save_pretrained(tmp_path)
    saved = load_bn_only_model(tmp_path)
    assert torch.equal(saved(IMAGES), answer)
    # What is loaded while merged is loaded into the adapter, and the base stays.
    doubled = {key: tensor * 2 if "num_batches" not in key else tensor for key, tensor in mine.items()}
    peft.set_peft_model_state_dict(model, doubled)
    ours = {
        key.replace(".bn_only_layers.", ".bn_only_layers.default.") for key in mine if doubled[key].ne(mine[key]).any()
    }
    assert moved(model, all_of_it) == ours != set()
    model.load_adapter(tmp_path, "default")
    assert not moved(model, all_of_it)
    model.load_state_dict(all_of_it)
    assert torch.equal(model(IMAGES), answer)
    model.unmerge_adapter()
    assert not moved(model, all_of_it)
    assert torch.equal(model(IMAGES), answer)


def test_a_training_step_while_merged_trains_the_adapter(train_step):
    model, same = wrapped(), wrapped()
    model.merge_adapter()
    train_step(model)
    train_step(same)
    assert not moved(model, state(same))


def test_a_merged_adapter_runs_on_every_layer_even_where_another_is_active(train_step):
    model = two_adapters(train_step)  # adapter two owns fewer layers
    answer = model(IMAGES)
    model.set_adapter("default")
    model.merge_adapter(["two"])
    assert torch.equal(model(IMAGES), answer)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_no_adapter_or_a_broken_one_is_refused_before_anything_changes(how, refused):
    model = wrapped()
    with refused(AdapterError, "typo", "default"):
        getattr(model, how)(adapter_names=["typo"])
    with refused(AdapterError, "default"):
        getattr(model, how)(adapter_names="default")
    layers = list(adapter_layers(model))
    nn.init.constant_(layers[-1].weight, torch.nan)
    with refused(AdapterError, layers[-1].canonical_name, "finite"):
        getattr(model, how)(safe_merge=True)
    assert len(layers) == 15
    assert not any(layer.merged for layer in layers)
    assert list(adapter_layers(model)) == layers


def test_unload_gives_the_redrawn_network_back(train_step):
    redrawn = get_bn_only_model(timm.create_model(NAME), BNOnlyConfig(seed=0)).unload().state_dict()
    plain = train_step(wrapped(train_head=True)).unload()
    assert len(redrawn) == len(plain.state_dict()) > 0
    assert all(torch.equal(tensor, redrawn[key]) for key, tensor in plain.state_dict().items())


def test_adding_an_adapter_while_another_is_merged_is_refused(refused):
    model = wrapped()
    model.merge_adapter()
    with refused(AdapterError, "merged", "unmerge_adapter"):
        model.add_adapter("two", BNOnlyConfig(seed=0))
    assert list(model.peft_config) == ["default"]


# -- two adapters on one network


def test_two_adapters_with_different_class_counts_reload_exactly(tmp_path, train_step):
    model = two_adapters(train_step)
    answers = {"two": model(IMAGES)}
    model.set_adapter("default")
    answers["default"] = model(IMAGES)
    assert {name: answer.shape[1] for name, answer in answers.items()} == {"default": 10, "two": 3}
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(IMAGES), answers["default"])
    assert torch.equal(load_bn_only_model(tmp_path / "two")(IMAGES), answers["two"])
    other = wrapped(arguments={"num_classes": 7})
    other.load_adapter(tmp_path / "two", "loaded")
    other.set_adapter("loaded")
    assert torch.equal(other(IMAGES), answers["two"])


def test_a_saved_file_holds_only_its_own_adapter(tmp_path, train_step):
    model = two_adapters(train_step)
    model.save_pretrained(tmp_path)
    sizes = {}
    for name, folder in (("default", tmp_path), ("two", tmp_path / "two")):
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        config = model.peft_config[name]
        layers = {key.removeprefix("base_model.model.").split(".bn_only_layers.")[0] for key in tensors}
        assert layers == set(config.target_modules)
        mine = [tensor for key, tensor in model.state_dict().items() if f".bn_only_layers.{name}." in key]
        assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in mine)
        sizes[name] = len(tensors)
    assert sizes == {"default": 15 * 5 + 2, "two": 13 * 5 + 2}


@pytest.mark.parametrize(
    ("seed", "weight_init"), [(1, "kaiming_normal"), (None, "kaiming_normal"), (0, "binary")], ids=str
)
def test_adapters_on_one_network_agree_on_its_weights(seed, weight_init, refused):
    model = wrapped().eval()
    before = state(model)
    with refused(AdapterError, str(seed), "network of its own"):
        model.add_adapter("two", BNOnlyConfig(seed=seed, weight_init=weight_init))
    assert list(model.peft_config) == ["default"]
    assert not moved(model, before)


@pytest.mark.parametrize("name", ["default", "two"])
def test_an_adapter_of_another_seed_is_refused_from_a_file(name, tmp_path, refused):
    wrapped(seed=1).save_pretrained(tmp_path)
    with refused(AdapterError, "seed"):
        wrapped().load_adapter(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (NAME, {"model_args": {"num_classes": 3}}),
        (NAME, {"norm_init": "ones", "norm_layers": ["bn1"]}),
        ("resnet18", {"model_args": {"output_stride": 8}}),
        ("resnet18", {"architecture": "resnet34"}),
    ],
    ids=["classes-without-a-head", "other-frozen-norm-layers", "other-strides", "other-architecture"],
)
def test_an_adapter_that_its_network_cannot_be_rebuilt_for_is_refused(name, settings, tmp_path):
    model = wrapped(name).eval()
    try:
        model.add_adapter("two", BNOnlyConfig(seed=0, **settings))
    except ConfigError:
        return
    model.set_adapter("two")
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_bn_only_model(tmp_path / "two")(images), model(images))


def test_frozen_norm_layers_are_those_that_were_drawn_though_their_adapter_is_gone(tmp_path):
    model = wrapped()
    model.add_adapter("two", BNOnlyConfig(seed=0, norm_init="ones"))
    model.set_adapter("two")
    model.delete_adapter("default")
    try:
        model.add_adapter("three", BNOnlyConfig(seed=0, norm_init="ones", norm_layers=["bn1"]))
    except ConfigError:
        return
    model.set_adapter("three")
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path / "three")(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize(
    "name",
    ["layer1", "bn1", "running_mean", "weight", "train", "keys", "a.b", "a/b", "a\\b", "a\n", "", "bn", "base_layer"],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_name_that_would_clash_is_refused(name, refused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own about a name inside the prefix
        base = timm.create_model("test_resnet")
        before = state(base)
        with refused(AdapterNameError, repr(name), "task_1"):
            get_bn_only_model(base, BNOnlyConfig(seed=0), adapter_name=name)
        assert not moved(base, before)
        model = wrapped("test_resnet")
        with refused(AdapterNameError, repr(name)):
            model.add_adapter(name, BNOnlyConfig(seed=0))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["default", "task_1", "domain-2", "Größe", "with space", "x" * 100])
def test_a_good_adapter_name_saves_and_loads(name, tmp_path):
    model = get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0), adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path if name == "default" else tmp_path / name, adapter_name=name)
    assert again.active_adapters == [name]
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_seed_with_norm_init_keep_starts_from_the_gamma_and_beta_given():
    base = timm.create_model(NAME)
    nn.init.constant_(base.bn1.weight, 0.25)
    nn.init.constant_(base.bn1.bias, 0.5)
    start = get_bn_only_model(base, BNOnlyConfig(seed=0, norm_init="keep")).get_base_model().bn1
    assert start.weight.unique().tolist() == [0.25]
    assert start.bias.unique().tolist() == [0.5]


# -- what moves, and what does not

CONDITIONS = {  # settings; which of gamma, beta, head and shortcuts train
    "bn": ({}, "gamma beta"),
    "bn+head": ({"train_head": True}, "gamma beta head"),
    "head": ({"train_gamma": False, "train_beta": False, "train_head": True}, "head"),
    "gamma": ({"train_beta": False}, "gamma"),
    "beta": ({"train_gamma": False}, "beta"),
    "bn+shortcut+head": ({"train_head": True, "shortcuts": True}, "gamma beta head shortcuts"),
    "shortcut+head": (
        {"train_gamma": False, "train_beta": False, "train_head": True, "shortcuts": True},
        "head shortcuts",
    ),
}
MOVING = [(name, key) for name in (NAME, "test_efficientnet") for key in CONDITIONS]
MOVING = [(name, key) for name, key in MOVING if name == NAME or "shortcut" not in key]


def condition(name, key):
    """The model of a condition, and the tensors that it may move, told from a plain network by type alone."""
    settings, what = CONDITIONS[key]
    settings, plain = dict(settings), timm.create_model(name)
    shortcuts = shortcut_convs(plain) if settings.pop("shortcuts", False) else []
    wanted = {f"{shortcut}.weight" for shortcut in shortcuts}
    assert len(wanted) == 2 * ("shortcuts" in what)
    for layer, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            wanted |= {f"{layer}.{buffer}" for buffer in BUFFERS}
            wanted |= {f"{layer}.weight"} if "gamma" in what else set()
            wanted |= {f"{layer}.bias"} if "beta" in what else set()
        if "head" in what and module is plain.get_classifier():
            wanted |= {f"{layer}.weight", f"{layer}.bias"}
    copies = {"base_model.model.{}.bn_only_layers.default.{}".format(*key.rsplit(".", 1)) for key in wanted}
    return wrapped(name, extra_trainable_modules=shortcuts, **settings), copies


@pytest.mark.parametrize(("name", "key"), MOVING)
def test_a_training_step_moves_nothing_but_what_the_condition_trains(name, key, train_step):
    model, expected = condition(name, key)
    before = state(model)
    train_step(model)
    assert moved(model, before) == expected
    assert len(expected) >= 3 * 13, "fewer tensors than the running statistics of 13 norm layers"


@pytest.mark.parametrize("leak", ["a convolution", "the base of a norm layer", "a gamma that stays"])
def test_the_check_of_what_moves_can_fail(leak, train_step):
    model, expected = condition(NAME, "bn")
    first = model.get_base_model().bn1
    if leak == "a convolution":
        next(p for name, p in model.named_parameters() if "conv" in name).requires_grad_(True)
    elif leak == "the base of a norm layer":
        first.base_layer.train = lambda mode: setattr(first.base_layer, "training", True)
        first.bn_only_layers.default.register_forward_pre_hook(lambda _, args: (first.base_layer(*args), None)[1])
    else:
        first.bn_only_layers.default.weight.requires_grad_(False)
    before = state(model)
    train_step(model)
    assert moved(model, before) != expected


def test_statistics_of_inactive_disabled_and_foreign_norm_layers_never_move(train_step):
    model = two_adapters(train_step).train()
    before = state(model)
    model(IMAGES)
    names = {key for key in before if key.endswith(BUFFERS)}
    mine = {key for key in names if ".two." in key}
    assert len(names) == 15 * 3 * 2 + 13 * 3
    assert len(mine) == 13 * 3
    assert moved(model, before) == mine
    before = state(model)
    with model.disable_adapter():
        model.train()
        model(IMAGES)
    assert not moved(model, before)
    model(IMAGES)
    assert moved(model, before) == mine


def test_norm_layers_outside_the_adapter_are_frozen_whole(train_step):
    chosen = wrapped().peft_config["default"].norm_layers[:2]
    model = wrapped(norm_layers=chosen)
    before = state(model)
    train_step(model)
    layers = {key.split(".bn_only_layers.")[0].removeprefix("base_model.model.") for key in moved(model, before)}
    assert layers == set(chosen)


# -- gradients and modes


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradients_are_as_before_after_disabling_even_nested(trainable, tmp_path):
    wrapped().save_pretrained(tmp_path)
    model = load_bn_only_model(tmp_path, is_trainable=trainable)
    before = trained(model)
    assert len(before) == 30 * trainable
    with model.disable_adapter():
        with model.disable_adapter():
            assert not trained(model)
        assert not trained(model)
    assert trained(model) == before


def test_a_gamma_frozen_by_hand_stays_frozen_and_another_adapter_takes_over():
    model = wrapped()
    model.add_adapter("two", BNOnlyConfig(seed=0))
    model.get_parameter(trained(model)[0]).requires_grad_(False)
    before = trained(model)
    with model.disable_adapter():
        pass
    assert trained(model) == before
    assert len(before) == 29
    with model.disable_adapter():
        model.set_adapter("two")
        assert not trained(model)
    assert len(trained(model)) == 30
    assert all(".two." in name for name in trained(model))


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode_and_train_and_eval_reach_every_copy(training):
    model = get_bn_only_model(timm.create_model(NAME).train(training), BNOnlyConfig(seed=0))
    assert model.training is training
    for mode in (training, not training, training):
        copies = [m for name, m in model.named_modules() if name.endswith(".bn_only_layers.default")]
        bases = [m for name, m in model.named_modules() if name.endswith(".base_layer")]
        assert len(copies) == len(bases) == 15
        assert {m.training for m in copies} == {mode}
        assert {m.training for m in bases} == {False}
        assert model.get_base_model().training is mode
        model.train(not mode)
        assert model.training is not mode


# -- around the model


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_answers_and_trains_alike_and_apart(how, train_step):
    model = train_step(wrapped(train_head=True))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(other) is BNOnlyPeftModel
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert trained(other) == trained(model)
    before = state(model)
    train_step(other)
    assert not moved(model, before)
    assert moved(other, before)


def test_a_compiled_model_answers_alike_after_every_switch(train_step):
    model = two_adapters(train_step)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for name in ("two", "default"):
        model.set_adapter(name)
        assert torch.equal(compiled(IMAGES), model(IMAGES))
    with model.disable_adapter():
        assert torch.equal(compiled(IMAGES), model(IMAGES))


def test_autocast_to_bfloat16_runs_forward_and_backward():
    model = wrapped().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_network_keeps_its_dtype_and_the_fingerprint_of_its_seed(dtype, tmp_path, train_step):
    model = get_bn_only_model(timm.create_model(NAME).to(dtype), BNOnlyConfig(seed=0, train_head=True))
    fingerprint = wrapped(train_head=True).peft_config["default"].backbone_fingerprint
    assert model.peft_config["default"].backbone_fingerprint == fingerprint
    train_step(model).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME).values()} == {dtype, torch.int64}
    again = peft.PeftModel.from_pretrained(timm.create_model(NAME).to(dtype), tmp_path)
    assert {t.dtype for t in again.state_dict().values()} == {dtype, torch.int64}
    assert torch.equal(again(IMAGES.to(dtype)), model(IMAGES.to(dtype)))


def test_a_change_of_a_cast_network_is_still_noticed(tmp_path):
    base = timm.create_model(NAME).bfloat16()
    with pytest.warns(UserWarning, match="belongs to weights that nobody else can have"):
        get_bn_only_model(copy.deepcopy(base), BNOnlyConfig()).save_pretrained(tmp_path)
    assert type(load_bn_only_model(tmp_path, copy.deepcopy(base))) is BNOnlyPeftModel
    with torch.no_grad():
        base.blocks[0].conv1.weight.view(torch.int16)[0, 0, 0, 0] ^= 1  # the last bit of one value
    with pytest.raises(FingerprintError, match=r"blocks\.0\.conv1\.weight \(torch\.bfloat16\)"):
        load_bn_only_model(tmp_path, base)


def test_synchronised_norm_layers_save_what_plain_ones_load(tmp_path, train_step):
    model = train_step(wrapped())
    answer = model(IMAGES)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 30
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(IMAGES), answer)


def test_saving_asks_no_network_about_the_base(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args: asked.append(args))
    base = timm.create_model(NAME)
    base.name_or_path = "someone/something"
    model = get_bn_only_model(base, BNOnlyConfig(seed=0))
    model.save_pretrained(tmp_path)
    assert not asked
    with pytest.warns(UserWarning, match="config file"):
        model.save_pretrained(tmp_path, save_embedding_layers="auto")
    assert asked, "PEFT asks elsewhere now: this test no longer looks"


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("dla34", {}, 32),  # has an attribute base_layer of its own
        ("levit_128s", {}, 224),  # a norm layer in each of two heads
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, 32),  # get_classifier() is a tuple
        ("resnetv2_18", {}, 32),  # a name list hits nn.Identity
        ("repvit_m0_9", {}, 32),  # a head inside the head
    ],
)
def test_networks_that_break_the_stock_method_work(name, arguments, size, tmp_path, train_step):
    model = wrapped(name, {"num_classes": 3, **arguments}, train_head=True)
    images = torch.randn(2, 3, size, size)
    kinds = [type(m) for m in timm.create_model(name, num_classes=3, **arguments).modules()]
    answer = train_step(model, size)(images)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(images), answer)
    plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == kinds
    assert torch.equal(plain(images), answer)
