"""An activation more is an entry and a function a back end: Mish is added here, and an unknown one runs plain."""

import copy
import logging

import pytest
import torch
from lean_tensors import distance, drawn
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters.lean import LEVELS, lean_, saved_bytes
from bn_affine_adapters.lean.backends import constants, cpp, gpu, of_layer, portable
from bn_affine_adapters.lean.known import ACTIVATIONS

MISH = portable.Activation(F.mish, torch.ops.aten.mish_backward)
BOUNDS = {"exact": 1e-12, "rounded": 0.01, "smallest": 0.03}  # of gradients, as a share of them


class Network(nn.Module):
    """Mish behind norm layers, in a chain whose last convolution may be computed again, and behind no norm layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.rows, self.act = nn.LayerNorm(8), nn.Mish()
        self.convs.requires_grad_(False)
        for norm in (*self.norms, self.rows):
            nn.init.normal_(norm.weight, 1, 0.3)

    def forward(self, x):
        x = self.act(self.norms[0](self.convs[0](x)))
        y = self.act(self.norms[1](self.convs[1](x)))
        x = self.act(self.norms[2](self.convs[2](y)) + x)
        x = F.mish(self.rows(x.mean((2, 3))))
        return self.act(x * 2)


def gradients(network):
    images, dy = drawn(4, 3, 9, 7, grad=True), drawn(4, 8, seed=1)
    y, saved = saved_bytes(network, lambda: network(images))
    leaves = [images, *(p for p in network.parameters() if p.requires_grad)]
    return y.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(y, leaves, dy)]), saved


@pytest.fixture
def mish(monkeypatch):
    """Add Mish."""
    monkeypatch.setitem(ACTIVATIONS, nn.Mish, "mish")
    monkeypatch.setitem(ACTIVATIONS, F.mish, "mish")
    monkeypatch.setitem(portable.ACTIVATIONS, "mish", MISH)


@pytest.mark.parametrize("level", LEVELS)
def test_mish_is_an_entry_and_a_function(backend, mish, level, caplog):
    """C++, which does not know it, leaves it to PyTorch's operators; the gradients are autograd's."""
    network = Network().double()
    plain = copy.deepcopy(network)
    report = lean_(network, level, (3, 9, 7))
    assert (report.norms, report.convs) == (4, 3)
    assert report.recomputed == (level == "smallest")
    assert of_layer(drawn(2, 3, 4, 4), "mish") is portable
    assert "mish" not in cpp.ACTIVATIONS | gpu.ACTIVATIONS
    (y, found, saved), (wanted_y, wanted, all_saved) = gradients(network), gradients(plain)
    assert distance(y, wanted_y) < 1e-12
    assert distance(found, wanted) < BOUNDS[level]
    assert saved < 0.75 * all_saved
    assert not caplog.text


@pytest.mark.parametrize("level", LEVELS)
def test_without_a_function_it_runs_plain_and_the_log_says_so(backend, monkeypatch, level, caplog):
    monkeypatch.setitem(ACTIVATIONS, nn.Mish, "mish")
    monkeypatch.setitem(ACTIVATIONS, F.mish, "mish")
    network = Network().double()
    plain = copy.deepcopy(network)
    with caplog.at_level(logging.WARNING):
        report = lean_(network, level, (3, 9, 7))
    assert "no back end knows mish" in caplog.text
    assert report.norms == 4
    (y, found, saved), (wanted_y, wanted, all_saved) = gradients(network), gradients(plain)
    assert distance(y, wanted_y) < 1e-12
    assert distance(found, wanted) < BOUNDS[level]
    assert saved < all_saved


@pytest.mark.usefixtures("cpp")
def test_every_back_end_names_what_it_knows():
    names = {name for key, name in vars(constants).items() if isinstance(name, str) and not key.startswith("__")}
    assert len(names) == 7
    assert set(portable.ACTIVATIONS) == gpu.ACTIVATIONS == names
    assert set(ACTIVATIONS.values()) == names
    taken = {name for name in names if of_layer(drawn(2, 3, 4, 4), name) is torch.ops.bnaa}
    assert taken == cpp.ACTIVATIONS == names - {constants.GELU, constants.GELU_TANH}
