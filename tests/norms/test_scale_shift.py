"""Stacked scales and shifts: entries of several copies of a norm layer pass it together, and none is ever stale."""

import copy

import pytest
import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from bn_affine_adapters.norms.scale_shift import _KINDS, BATCH, LAST, ScaleShift, kind_of

CHANNELS, NAMES = 8, ("base", "one", "two")
ROWS = torch.tensor([1, 0, 2, 1, 1])


def layer(kind, **settings):
    if issubclass(kind, nn.GroupNorm):
        groups = {"num_groups": 2} if "num_groups" in kind.__init__.__annotations__ else {}
        return kind(2, CHANNELS, **settings) if kind is nn.GroupNorm else kind(CHANNELS, **groups, **settings)
    return kind(CHANNELS, **settings)


def filled(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def copies(kind, **settings):
    return {name: filled(layer(kind, **settings), seed) for seed, name in enumerate(NAMES)}


def shape_of(kind):
    if _KINDS[kind] == LAST:
        return (5, 3, CHANNELS)
    dimensions = {nn.BatchNorm1d: (4,), nn.BatchNorm3d: (2, 3, 4)}.get(kind, (3, 4))
    return (5, CHANNELS, *dimensions)


def apart(modules, x):
    return torch.cat([modules[NAMES[row]](x[n : n + 1]) for n, row in enumerate(ROWS.tolist())])


@torch.no_grad()
def right(stacked, modules, x):
    expected = apart(modules, x)
    return torch.allclose(stacked(x, ROWS), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: f"{kind.__module__.split('.')[0]}.{kind.__name__}")
def test_each_entry_gets_the_scale_and_shift_of_its_own_copy(kind):
    modules = copies(kind)
    x = torch.randn(shape_of(kind), generator=torch.Generator().manual_seed(1))
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    assert right(stacked, modules, x)
    double = {name: copy.deepcopy(module).double() for name, module in modules.items()}
    with torch.no_grad():
        exact, found = apart(double, x.double()), ScaleShift.built(NAMES, double.__getitem__)(x.double(), ROWS)
    low = "Fp32" in kind.__name__  # these compute in float32 whatever they get
    assert torch.allclose(found, exact, rtol=1e-5 if low else 1e-12, atol=1e-5 if low else 1e-12)


def test_all_of_timms_norm_layers_are_known_or_run_copy_by_copy():
    assert len(_KINDS) >= 30
    assert {kind_of(layer(kind).eval()) for kind in _KINDS} == {*_KINDS.values()}
    for kind in (timm.layers.EvoNorm2dS0, timm.layers.FilterResponseNormTlu2d, GlobalResponseNorm):
        assert kind_of(layer(kind)) is None


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU], ids=["ReLU", "PReLU"])
def test_a_fused_activation_runs_behind_unless_it_has_parameters_of_its_own(act):
    modules = copies(timm.layers.BatchNormAct2d, act_layer=act)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    if act is nn.PReLU:
        assert stacked is None
    else:
        assert right(stacked, modules, torch.randn(5, CHANNELS, 3, 4) - 2)


ODD = {
    "a subclass": lambda module: setattr(module, "__class__", type("Mine", (nn.BatchNorm2d,), {})),
    "a hook": lambda module: module.register_forward_hook(lambda *_: None),
    "another forward": lambda module: setattr(module, "forward", lambda x: x),
    "no running statistics": lambda module: module.__init__(CHANNELS, track_running_stats=False),
    "a parametrised gamma": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_layer_that_may_compute_anything_else_is_not_stacked(odd):
    modules = copies(nn.BatchNorm2d)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    odd(modules["two"])
    assert ScaleShift.built(NAMES, modules.__getitem__) is None
    assert stacked.refresh_(modules.__getitem__, [0, 1])
    assert not stacked.refresh_(modules.__getitem__, [0, 2])


@torch.no_grad()
def in_place(modules):
    modules["one"].weight.mul_(3)


def trained(modules):
    layer = modules["one"]
    (layer(torch.randn(5, CHANNELS, 3, 4)) ** 2).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    layer.zero_grad()


def moved(modules):  # the kernel gives running statistics no new version
    modules["one"].train()(torch.randn(5, CHANNELS, 3, 4) + 1)
    modules["one"].eval()


def other_parameter(modules):
    modules["one"].bias = nn.Parameter(torch.ones(CHANNELS))


def other_data(modules):
    modules["one"].weight.data = torch.full((CHANNELS,), 2.0)


def loaded(modules):
    modules["one"].load_state_dict(filled(layer(nn.BatchNorm2d), 9).state_dict())


def assigned(modules):
    modules["one"].load_state_dict(filled(layer(nn.BatchNorm2d), 9).state_dict(), assign=True)


def other_module(modules):
    modules["one"] = filled(layer(nn.BatchNorm2d), 9)


def other_eps(modules):
    modules["one"].eps = 0.5


def in_the_base(modules):
    nn.init.constant_(modules["base"].running_var, 4.0)


CHANGES = (
    in_place, trained, moved, other_parameter, other_data, loaded, assigned, other_module, other_eps, in_the_base,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_folded_again(change):
    modules, x = copies(nn.BatchNorm2d), torch.randn(5, CHANNELS, 3, 4)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    before = stacked.table.clone()
    change(modules)
    with torch.no_grad():
        assert not torch.allclose(apart(modules, x), stacked(x, ROWS), rtol=1e-4, atol=1e-4)
    assert stacked.refresh_(modules.__getitem__, [0, 1, 2])
    assert right(stacked, modules, x)
    assert torch.equal(stacked.table[2], before[2])


@torch.inference_mode()
def made_in_inference_mode(modules):  # such tensors have no version
    modules["one"] = filled(layer(nn.BatchNorm2d), 9)


def uncounted(modules):  # statistics that move without a counter
    modules["one"].num_batches_tracked = None


@pytest.mark.parametrize(("kind", "change"), [(made_in_inference_mode, in_place), (uncounted, moved)])
def test_tensors_without_a_version_are_read_each_time(kind, change):
    modules, x = copies(nn.BatchNorm2d), torch.randn(5, CHANNELS, 3, 4)
    kind(modules)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    with torch.inference_mode(kind is made_in_inference_mode):
        change(modules)
    assert not right(stacked, modules, x)
    assert stacked.refresh_(modules.__getitem__, [0, 1, 2])
    assert right(stacked, modules, x)


def test_nothing_is_folded_again_without_a_change():
    modules = copies(nn.BatchNorm2d)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    version = stacked.table._version
    assert stacked.refresh_(modules.__getitem__, [0, 1, 2])
    assert stacked.table._version == version
    in_place(modules)
    stacked.refresh_(modules.__getitem__, [1, 2])
    assert stacked.table._version == version + 1


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, timm.layers.LayerNorm2d])
def test_another_type_or_eps_of_all_asks_for_a_new_stack(kind):
    modules = copies(kind)
    stacked = ScaleShift.built(NAMES, modules.__getitem__)
    for module in modules.values():
        module.double()
    assert not stacked.refresh_(modules.__getitem__, [0, 1, 2])
    if _KINDS[kind] != BATCH:
        modules = copies(kind)
        modules["two"].eps = 0.1
        assert ScaleShift.built(NAMES, modules.__getitem__) is None


def test_the_memory_format_and_half_precision_are_kept():
    modules = copies(nn.BatchNorm2d)
    x = torch.randn(5, CHANNELS, 3, 4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert ScaleShift.built(NAMES, modules.__getitem__)(x, ROWS).is_contiguous(memory_format=torch.channels_last)
        half = {name: module.bfloat16() for name, module in modules.items()}
        y = ScaleShift.built(NAMES, half.__getitem__)(x.bfloat16(), ROWS)
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), apart(half, x.bfloat16()).float(), rtol=0.02, atol=0.02)
