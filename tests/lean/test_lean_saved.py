"""What lean training keeps for backward, to the byte: where hooks on saved tensors see it, and nowhere else."""

import weakref

import pytest
import torch
from lean_tensors import drawn, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bn_affine_adapters.lean import LEVELS, dispatch, saved_bytes
from bn_affine_adapters.lean.backends import constants as k


class Two(nn.Module):
    """norm, ReLU, convolution, norm, residual, ReLU."""

    def __init__(self, level):
        super().__init__()
        self.level = level
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).requires_grad_(False)
        self.made = []

    def forward(self, z, residual):
        if self.level == "smallest":
            return dispatch.pair("smallest", self.norms[0], k.RELU, self.conv, self.norms[1], k.RELU, z, residual)
        h = dispatch.norm(self.level, self.norms[0], k.RELU, z)
        z2 = dispatch.conv(self.conv, h)
        self.made = [weakref.ref(h)]
        return dispatch.norm(self.level, self.norms[1], k.RELU, z2, residual)


def hidden(y):
    """Return the tensors that the graph behind y holds in its nodes' attributes, unseen by hooks on saved tensors."""
    found, seen, ahead = [], set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        held = [*getattr(node, "__dict__", {}).values()]
        while held:
            value = held.pop()
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                held += value
            elif isinstance(value, dict):
                held += value.values()
        ahead += [after for after, _ in node.next_functions]
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_saved_is_known_to_the_byte(backend, level):
    """A tensor for each norm layer, a bit a value where there is a mask, eight numbers a channel: nothing else."""
    values = 8 * 16 * 12 * 12
    bits, table = values // 8, 8 * 16 * 4
    expected = {
        "exact": 2 * 4 * values + bits + 2 * table,  # of the first, whose mask the input has, no mask
        "rounded": 2 * 2 * values + 2 * bits + 2 * table,
        "smallest": values + 2 * bits + 2 * table,  # of the second, only its mask
    }
    network = Two(level)
    z, residual = (rows(drawn(8, 16, 12, 12, seed=seed, dtype=torch.float32)).requires_grad_(True) for seed in (0, 1))
    y, found = saved_bytes(network, lambda: network(z, residual))
    assert found == expected[level]
    assert not hidden(y)
    assert all(ref() is None for ref in network.made)  # the convolution's input is gone


def test_a_tensor_hidden_in_an_attribute_is_found():
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = ({"x": [x.detach()]},)
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    assert len(hidden(Hides.apply(drawn(3, grad=True)) + 1)) == 1


def test_what_was_kept_in_8_bits_is_restored_in_cpp(cpp, monkeypatch):
    """Backward runs the kernels that forward ran: none in PyTorch's operators beside those in C++."""
    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.extend([str(operator)] if operator.namespace == "bnaa" else [])
            return operator(*args, **(kwargs or {}))

    z = rows(drawn(2, 16, 6, 6, dtype=torch.float32)).requires_grad_(True)
    y = Two("smallest")(z, None)
    with Recorded():
        y.sum().backward()
    assert called == ["bnaa.restore.default", *["bnaa.sums.default", "bnaa.input_gradient.default"] * 2]


def test_a_second_derivative_is_refused(backend):
    """And not computed wrong, without what was rounded or dropped."""
    x = drawn(2, 4, 6, 6, dtype=torch.float32, grad=True)
    norms, conv = [nn.BatchNorm2d(4) for _ in range(2)], nn.Conv2d(4, 4, 3).requires_grad_(False)
    layers = {
        "NormAct": lambda: dispatch.norm("exact", norms[0], k.SILU, x),
        "NormActConv": lambda: dispatch.pair("smallest", norms[0], k.RELU, conv, norms[1], k.RELU, x),
        "PooledNorm": lambda: dispatch.pooled("exact", norms[0], k.RELU, nn.MaxPool2d(2), x.detach()),
        "FrozenConv": lambda: dispatch.conv(conv, x),
        "MaxPool": lambda: dispatch.max_pool(nn.MaxPool2d(2), x),
        "GlobalPool": lambda: dispatch.avg_pool(x, x.shape[-2:]),
        "RowNorm": lambda: dispatch.norm("rounded", nn.GroupNorm(2, 4), k.GELU, x),
        "KeptAct": lambda: dispatch.activation("smallest", nn.GELU(), x),
        "RoundedAttention": lambda: dispatch.attention(x, x * 2, x * 3),
    }
    for name, layer in layers.items():
        y = layer()
        assert name in type(y.grad_fn).__name__
        leaf = norms[0].weight if name == "PooledNorm" else x
        weight = torch.ones_like(y).requires_grad_(True)
        (dx,) = torch.autograd.grad(y, leaf, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.square().sum().backward()
