"""What a call cannot use is refused before anything changes; what it can use is accepted."""

import numpy as np
import peft
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, predict, reinit_
from bn_affine_adapters.errors import AdapterError, ConfigError, NetworkError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small():
    return timm.create_model("test_resnet", num_classes=3)


def wrapped(**settings):
    return get_bn_only_model(small(), BNOnlyConfig(**{"seed": 0, **settings})).eval()


def two_heads():
    """Adapter default has 3 classes, two has 5."""
    model = wrapped(train_head=True)
    model.add_adapter("two", BNOnlyConfig(seed=0, train_head=True, model_args={"num_classes": 5}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    wrapped().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["resnet18", None, small, {"model": 1}])
def test_only_a_network_is_wrapped(model, folder, refused):
    with refused(NetworkError, type(model).__name__, "timm.create_model"):
        get_bn_only_model(model)
    if model is not None:
        with refused(NetworkError, type(model).__name__):
            load_bn_only_model(folder, model=model)


def test_only_a_configuration_of_this_method_is_taken(refused):
    with refused(ConfigError, "dict", "BNOnlyConfig(**config)"):
        get_bn_only_model(small(), {"seed": 0})
    with refused(ConfigError, "LoraConfig"):
        get_bn_only_model(small(), peft.LoraConfig())
    with refused(ConfigError, "int 3"):
        get_bn_only_model(small(), 3)


DOORS = {
    "get_bn_only_model": lambda model, folder: get_bn_only_model(model, BNOnlyConfig(seed=0)),
    "load_bn_only_model": lambda model, folder: load_bn_only_model(folder, model=model),
    "peft": lambda model, folder: peft.get_peft_model(model, BNOnlyConfig(seed=0)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [False, True], ids=["the model", "its network"])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_network_is_wrapped_once_and_stays_as_it_was(door, inner, folder, refused):
    model = wrapped()
    nn.init.constant_(model.bn1.weight, 0.3)
    answer, modules = model(IMAGES), [*model.modules()]
    with refused(NetworkError, "default", "add_adapter"):
        door(model.get_base_model() if inner else model, folder)
    assert [*model.modules()] == modules
    assert torch.equal(model(IMAGES), answer)
    assert type(get_bn_only_model(model.unload(), BNOnlyConfig(seed=0))) is type(model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_type_is_given_as_such_or_by_name(dtype, folder):
    assert {p.dtype for p in load_bn_only_model(folder, dtype=dtype).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["auto", "int8", "nn", torch.int8, 3, ""])
def test_another_type_is_refused(dtype, folder, refused):
    with refused(ConfigError, repr(dtype), "bfloat16"):
        load_bn_only_model(folder, dtype=dtype)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint64(3), np.int8(3)])
def test_a_seed_of_numpy_is_an_integer(seed):
    config = BNOnlyConfig(seed=seed)
    assert type(config.seed) is int
    assert config == BNOnlyConfig(seed=3)
    expected = reinit_(small(), 3).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in reinit_(small(), seed).state_dict().items())


@pytest.mark.parametrize("seed", [np.int64(-1), np.float64(3), np.bool_(True), "3", 3.0])
def test_another_seed_is_refused(seed, refused):
    with refused(ConfigError, "seed="):
        BNOnlyConfig(seed=seed)


@pytest.mark.parametrize(
    "model", [small, lambda: DistributedDataParallel, lambda: nn.Sequential(wrapped()), lambda: "adapter"]
)
def test_predict_needs_an_adapter(model, refused):
    with refused(ConfigError, "load_bn_only_model"):
        predict(model(), Image.new("RGB", (64, 64)))


def test_predict_takes_a_compiled_model_and_none_without_adapters(refused):
    model, photo = wrapped(), Image.effect_noise((64, 64), 90)
    assert predict(torch.compile(model, backend="eager"), photo) == predict(model, photo)
    model.delete_adapter("default")
    with refused(ConfigError, "BNOnlyPeftModel"):
        predict(model, photo)


# -- adapter_names


@pytest.mark.parametrize("state", ["enabled", "compiled"])
def test_what_peft_would_ignore_is_refused(state, refused):
    model = two_heads()
    run = torch.compile(model, backend="eager") if state == "compiled" else model
    with refused(AdapterError, "alora_offsets"):
        run(IMAGES, alora_offsets=[1])
    assert torch.equal(run(IMAGES, adapter_names=None), run(IMAGES))
    with pytest.raises(TypeError, match="adapter_names"):
        model.base_model(IMAGES, adapter_names=["default", "two"])


def test_every_door_of_peft_refuses_it(refused):
    model = wrapped()
    model.get_base_model().generate = model.get_base_model().forward
    with refused(AdapterError, "adapter_names"):
        model.generate(IMAGES, adapter_names=["default", "default"])


# -- num_classes, the last adapter, one module twice


def test_num_classes_is_that_of_the_head_that_runs():
    model = two_heads()

    def right(classes):
        return model.num_classes == model.get_base_model().num_classes == model(IMAGES).shape[1] == classes

    assert right(3)
    model.set_adapter("two")
    assert right(5)
    with model.disable_adapter():
        assert right(3)
    assert right(5)
    model.set_adapter("default")
    model.merge_adapter(["two"])
    assert right(5)
    model.unmerge_adapter()
    assert right(3)
    model.set_adapter("two")
    model.delete_adapter("two")
    assert right(3)


@pytest.mark.parametrize(("how", "classes"), [("merge_and_unload", 5), ("unload", 3)])
def test_the_plain_network_has_its_own_number_of_classes(how, classes):
    model = two_heads()
    model.set_adapter("two")
    plain = getattr(model, how)()
    assert plain.num_classes == plain(IMAGES).shape[1] == classes


def test_a_base_with_another_head_has_the_adapters_classes_and_gets_its_own_back(tmp_path, refused):
    base = timm.create_model("test_resnet", num_classes=7)
    other = small()
    other.load_state_dict({**base.state_dict(), **other.get_classifier().state_dict(prefix="fc.")})
    get_bn_only_model(other, BNOnlyConfig(train_head=True)).save_pretrained(tmp_path)
    model = load_bn_only_model(tmp_path, model=base)
    assert model.num_classes == model(IMAGES).shape[1] == 3
    assert model.unload().num_classes == 7
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_bn_only_model(tmp_path, model=base)
    assert base.num_classes == 7


@pytest.mark.filterwarnings("ignore:Adapter")
def test_the_last_adapter_can_be_deleted_and_another_added(tmp_path, refused):
    model = two_heads()
    base = model.get_base_model()
    with model.disable_adapter():
        answer = model(IMAGES)
    for name in ("default", "two"):
        model.delete_adapter(name)
    assert torch.equal(model(IMAGES), answer)
    assert model.active_adapters == []
    assert model.get_nb_trainable_parameters()[0] == 0
    with refused(AdapterError, "deleted", "add_adapter"):
        model.save_pretrained(tmp_path)
    assert model.set_lean("exact").places > 5
    model.add_adapter("new", BNOnlyConfig(seed=1))
    model.set_adapter("new")
    fresh = get_bn_only_model(small(), BNOnlyConfig(seed=1)).eval()
    assert torch.equal(model(IMAGES), fresh(IMAGES))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path / "new")(IMAGES), fresh(IMAGES))
    assert model.unload() is base


class Twice(nn.Module):
    """A network whose norm layer stands in two places, with the same parent or with another."""

    def __init__(self, same_parent=True):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.block = nn.Sequential(nn.BatchNorm2d(3), self.act)
        if same_parent:
            self.again = self.norm
        else:
            self.block.append(self.norm)

    def forward(self, x):
        return self.block(self.norm(self.conv(x)))


@pytest.mark.parametrize("same_parent", [True, False])
@pytest.mark.parametrize("settings", [{}, {"norm_layers": ["norm"]}, {"extra_trainable_modules": ["norm"]}])
def test_a_module_that_the_adapter_owns_has_one_name(same_parent, settings, refused):
    network = Twice(same_parent)
    with refused(NetworkError, "norm", "two names"):
        get_bn_only_model(network, BNOnlyConfig(seed=0, architecture="custom", **settings))
    assert type(network.norm) is nn.BatchNorm2d
    # Frozen, or within one module that trains as a whole, it may have two; so may what holds no tensor.
    get_bn_only_model(Twice(True), BNOnlyConfig(norm_layers=["block.0"]))
    get_bn_only_model(Twice(True), BNOnlyConfig(norm_layers=[], extra_trainable_modules=["block"]))
    outer = nn.Sequential(Twice(True), nn.BatchNorm2d(3))
    get_bn_only_model(outer, BNOnlyConfig(norm_layers=["1"], extra_trainable_modules=["0"]))


# -- DistributedDataParallel


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
def test_a_switch_that_ddp_cannot_see_is_refused(unused, alone, refused):
    model = two_heads().train()
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    ddp(IMAGES).sum().backward()
    model.set_adapter("two")
    with refused(AdapterError, "DistributedDataParallel(model) again", "two"):
        ddp(IMAGES)
    with torch.no_grad():
        assert ddp(IMAGES).shape[1] == 5
    again = DistributedDataParallel(model, find_unused_parameters=unused)
    again(IMAGES).sum().backward()
    model.set_adapter("default")
    ddp(IMAGES).sum().backward()
    with refused(AdapterError, "default"):
        again(IMAGES)
