"""What the package relies on inside PEFT: a release that moves one of these fails here, by name."""

import inspect

import peft
import pytest
import timm
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from torch import nn

from bn_affine_adapters import BNOnlyConfig, BNOnlyPeftModel, get_bn_only_model
from bn_affine_adapters.adapter.layer import BNOnlyLayer
from bn_affine_adapters.adapter.tuner import BNOnlyTuner
from bn_affine_adapters.settings import BN_ONLY, PEFT_KEYS

ANY = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def own_methods(ours, theirs):
    """The names of the methods and properties of ``theirs`` that ``ours`` overrides, __init__ excepted."""
    there = {name for kind in theirs.__mro__ if kind not in (nn.Module, object) for name in vars(kind)}
    return sorted(name for name in vars(ours) if name in there and not (name.startswith("__") or name == "_abc_impl"))


def function(owner, name):
    found = inspect.getattr_static(owner, name)
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def takes(method):
    """Names of a method's parameters in order, and whether it takes any others by position and by name."""
    parameters = inspect.signature(method).parameters.values()
    names = [p.name for p in parameters if p.kind not in ANY and p.name not in ("self", "cls")]
    return names, {p.kind for p in parameters if p.kind in ANY}


REGISTRIES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": (lambda: peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, BNOnlyConfig),
    "PEFT_TYPE_TO_TUNER_MAPPING": (lambda: peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, BNOnlyTuner),
    "PEFT_TYPE_TO_PREFIX_MAPPING": (lambda: peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, BNOnlyTuner.prefix),
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": (lambda: peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, BNOnlyPeftModel),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_is_a_dict_that_takes_a_string(name):
    registry, ours = REGISTRIES[name]
    assert type(registry()) is dict
    assert registry()["BN_ONLY"] is registry()[BN_ONLY] is ours
    assert len(registry()) > 5, "PEFT's own methods are elsewhere now"


@pytest.mark.parametrize("module", ["mapping", "mapping_func", "peft_model", "auto", "utils.save_and_load"])
def test_modules_that_look_a_method_up_share_our_registries(module):
    found = __import__(f"peft.{module}", fromlist=["_"])
    names = [name for name in REGISTRIES if hasattr(found, name)]
    assert names, f"peft.{module} looks nothing up any more"
    assert all(getattr(found, name) is REGISTRIES[name][0]() for name in names)


def test_the_method_is_not_one_of_pefts_own():
    assert "BN_ONLY" not in set(PeftType)
    assert BN_ONLY.value == BN_ONLY.name == "BN_ONLY"
    assert hash(BN_ONLY) == hash("BN_ONLY")


@pytest.mark.parametrize("entry", [peft.get_peft_model, PeftModel.from_pretrained], ids=lambda entry: entry.__name__)
def test_both_doors_choose_the_model_class_by_task_type(entry):
    source = inspect.getsource(entry)
    assert "MODEL_TYPE_TO_PEFT_MODEL_MAPPING" in source
    assert "task_type" in source


def test_the_configuration_has_only_keys_that_are_listed():
    theirs = set(inspect.signature(peft.PeftConfig.__init__).parameters) - {"self"}
    assert theirs
    assert not theirs - PEFT_KEYS, "add them to PEFT_KEYS"
    assert theirs <= set(BNOnlyConfig().to_dict())


OVERRIDES = [
    (ours, theirs, name)
    for ours, theirs in ((BNOnlyTuner, BaseTuner), (BNOnlyLayer, BaseTunerLayer), (BNOnlyPeftModel, PeftModel))
    for name in own_methods(ours, theirs)
]


def test_every_override_that_matters_is_one():
    found = {name for _, _, name in OVERRIDES}
    print(f"{len(OVERRIDES)} overrides: {', '.join(sorted(found))}")
    tuner = {"prefix", "tuner_layer_cls", "inject_adapter", "_prepare_adapter_config", "_check_target_module_exists"}
    tuner |= {"_create_and_replace", "_cast_adapter_dtype", "_unload_and_optionally_merge"}
    tuner |= {"_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"}
    layer = {"adapter_layer_names", "other_param_names", "merged_adapters", "set_adapter", "set_requires_grad"}
    layer |= {"enable_adapters", "merge", "unmerge", "weight", "bias"}
    model = {"get_nb_trainable_parameters", "save_pretrained", "create_or_update_model_card", "load_adapter"}
    missing = (tuner | layer | model) - found - {"prefix", "tuner_layer_cls", "merged_adapters"}
    assert not missing, "PEFT has no such name any more"
    assert set(BaseTuner.__annotations__) >= {"prefix", "tuner_layer_cls"}


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDES, ids=lambda value: getattr(value, "__name__", value))
def test_an_override_takes_what_peft_hands_it(ours, theirs, name):
    mine, base = function(ours, name), function(theirs, name)
    if not inspect.isfunction(base):
        assert type(mine) is type(base), f"{name} was a {type(base).__name__}"
        return
    (names, rest), (wanted, _) = takes(mine), takes(base)
    by_name = {p.name for p in inspect.signature(base).parameters.values() if p.kind is p.KEYWORD_ONLY}
    taken = {*names, *(by_name if inspect.Parameter.VAR_KEYWORD in rest else ())}
    missing = [] if len(rest) == 2 else [one for one in wanted if one not in taken]
    assert not missing, f"PEFT passes {missing}"
    shared = [one for one in wanted if one in names and one not in by_name]
    assert names[: len(shared)] == shared, "the order changed"


def test_the_comparison_of_signatures_can_fail():
    assert takes(lambda self, model, *args, **kwargs: None) == (["model"], set(ANY))
    assert takes(BaseTuner.inject_adapter)[0] != takes(BNOnlyTuner._create_and_replace)[0]


@pytest.mark.parametrize(
    "name", ["_active_adapter", "_disable_adapters", "active_adapters", "disable_adapters", "merged", "merged_adapters"]
)
def test_a_tuner_layer_has(name):
    assert hasattr(BaseTunerLayer, name)


@pytest.mark.parametrize("name", ["active_adapter", "active_adapters", "disable_adapter_layers", "set_adapter"])
def test_a_tuner_has(name):
    model = get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0))
    assert hasattr(model.base_model, name)
    assert model.base_model.model is model.get_base_model()


def test_names_of_files_and_helpers_are_as_ever():
    files = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    assert files == ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    assert takes(check_adapters_to_merge)[0] == ["module", "adapter_names"]
    assert "save_embedding_layers" in takes(PeftModel.save_pretrained)[0]
    assert "torch_device" in takes(PeftModel.load_adapter)[0]
    assert {"config", "is_trainable", "adapter_name"} <= set(takes(PeftModel.from_pretrained)[0])


def test_state_dict_hooks_are_called_on_our_tuner(monkeypatch, tmp_path):
    called = []
    for name in ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        hook = getattr(BNOnlyTuner, name)
        monkeypatch.setattr(
            BNOnlyTuner, name, lambda *args, hook=hook, name=name, **kw: called.append(name) or hook(*args, **kw)
        )
    model = get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0))
    model.save_pretrained(tmp_path)
    assert set(called) == {"_get_adapter_state_dict", "_remove_adapter_name_from_key"}
    called.clear()
    model.load_adapter(tmp_path, "two")
    assert "_remap_adapter_state_dict_for_load" in called
