"""Replicates of one small network side by side: their tensors stacked, one forward and one backward for all.

A small network on a GPU waits for its host: R replicates in one launch cost little more than one.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..adapter.control import Control
from ..errors import NetworkError
from ..norms.find import has_copies, running, unwrapped


class Stacked(nn.Module):
    """R equally built networks as one module, whose tensors have a new first axis: the replicate.

    Each replicate computes what its network alone would, to rounding: logits, gradients and running statistics. Only
    draws differ: dropout and stochastic depth are drawn for all replicates together.

    What trains in the networks trains here, under the plain network's names after ``network.``. The optimiser has to be
    elementwise (SGD, Adam, with weight decay): a norm over a tensor, as in LARS or in clipping, would mix replicates.
    The loss to differentiate is the *sum* of the replicates' mean losses; then each gets its own gradient.

    For a GPU, ``torch.compile(stacked, mode="reduce-overhead", fullgraph=True)`` captures the step: running statistics
    are buffers updated in place, whose addresses stay.

    Attributes:
        networks: the networks given; they stay as they were until `write_back`.
        network: one copy of the network, as the active adapter runs it, with the stacked tensors. Never called itself.

    >>> import timm
    >>> from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
    >>> networks = [get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=i)) for i in range(5)]
    >>> stacked = Stacked(networks)
    >>> logits = stacked(torch.randn(5, 8, 3, 32, 32))
    >>> loss = 5 * nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(40, dtype=torch.long))
    >>> loss.backward()
    >>> tuple(logits.shape), tuple(stacked.network.bn1.weight.grad.shape)
    ((5, 8, 10), (5, 16))
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Copy and stack the tensors of networks that differ in nothing but their values, e.g. in their seed.

        Raises:
            NetworkError: there is no network, they differ in layers, shapes or in what trains, they share a tensor, or
                a norm layer keeps a cumulative mean, whose rate is not known before it is read from the device.
        """
        super().__init__()
        self.networks = tuple(networks)  # a tuple, so that they are no submodules of this one
        self._homes = [dict(_homes(network)) for network in self.networks]
        plain = [_plain(network) for network in self.networks]
        _check_alike(plain)
        _check_apart(self._homes)
        self.network = _with_tensors(plain[0], self._stack)
        self._held = [module for module in self.network.modules() if not module.training]
        self.train(self.networks[0].training)

    def _stack(self, name: str, tensor: Tensor) -> Tensor:
        together = torch.stack([_at(homes[name]).detach() for homes in self._homes])
        return nn.Parameter(together, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else together

    def forward(self, images: Tensor) -> Tensor:
        """Map images (R, B, C, H, W), a batch for each replicate, to logits (R, B, classes)."""
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())

        def alone(own: dict[str, Tensor], batch: Tensor) -> Tensor:
            return torch.func.functional_call(self.network, own, (batch,))

        return torch.vmap(alone, randomness="different")(tensors, images)

    def train(self, mode: bool = True) -> "Stacked":
        """Set the mode; norm layers that stay in evaluation mode in the networks do so here."""
        super().train(mode)
        for module in self._held:
            module.training = False
        return self

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy each replicate's parameters and buffers into its network, to be evaluated, saved or pushed alone.

        They go where they came from: to the adapter that was active then.
        """
        stacked = dict(_named_tensors(self.network))
        for index, homes in enumerate(self._homes):
            for name, home in homes.items():
                _at(home).copy_(stacked[name][index])


Home = tuple[nn.Module, str]  # a module, and the name of its parameter or buffer: `to` may replace a buffer


def _at(home: Home) -> Tensor:
    return getattr(*home)


def _running(module: nn.Module) -> nn.Module:
    """Return what a module runs: in the place of a wrapped layer, the active adapter's copy."""
    return running(module) if has_copies(module) else unwrapped(module)


def _homes(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Home]]:
    """Yield where each tensor lies that a network runs on, by its name in the plain network."""
    module = _running(module)
    for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield prefix + attribute, (module, attribute)
    # A control's convolution is no child of it, but each replicate has its own.
    shared = [("frozen", module.conv)] if isinstance(module, Control) else []
    for name, child in [*module.named_children(), *shared]:
        yield from _homes(child, f"{prefix}{name}.")


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _with_tensors(module: nn.Module, new: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a copy of a module with other tensors; one that is used twice still is."""
    replaced: dict[int, Tensor] = {}
    for name, tensor in _named_tensors(module):
        if id(tensor) not in replaced:
            replaced[id(tensor)] = new(name, tensor)
    return deepcopy(module, dict(replaced))


def _plain(network: nn.Module) -> nn.Module:
    """Return the plain network in training mode as the active adapter runs it: modules of its own, the same tensors."""
    copy = _with_tensors(network, lambda _, tensor: tensor).train()
    for name, module in list(copy.named_modules()):
        if name and (running := _running(module)) is not module:
            copy.set_submodule(name, running)
    for module in list(copy.modules()):
        if isinstance(module, Control):
            module.add_module("frozen", module.conv)
    return _running(copy)


def _check_alike(plain: list[nn.Module]) -> None:
    if not plain:
        raise NetworkError("There is nothing to stack.", seen="0 networks", do="give at least one network")
    first = _description(plain[0])
    for index, network in enumerate(plain):
        other = _description(network)
        if other != first:
            name = next(name for name in [*first, *other] if first.get(name) != other.get(name))
            raise NetworkError(
                f"Networks 0 and {index} are built differently: only values may differ.",
                seen=f"{name or 'the network'} is {first.get(name, 'not there')} and {other.get(name, 'not there')}",
                do="stack networks of one architecture, one condition, one device and one dtype",
            )
    for name, module in plain[0].named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.momentum is None:
            raise NetworkError(
                "A norm layer with cumulative running statistics cannot be stacked.",
                seen=f"{name or 'the network'} has bn_momentum None",
                do="set a number, e.g. 0.1, as its `momentum`",
            )


def _description(network: nn.Module) -> dict[str, str]:
    """Return what of each module and tensor has to be the same in all replicates."""
    found = {}
    for name, module in network.named_modules():
        held = "" if module.training else ", in evaluation mode"
        found[name] = f"{type(module).__name__}({module.extra_repr()}){held}"
    for name, tensor in _named_tensors(network):
        kind = "trained" if tensor.requires_grad else "frozen"
        found[name] = f"{kind} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    return found


def _check_apart(homes: list[dict[str, Home]]) -> None:
    owner: dict[int, int] = {}
    for index, tensors in enumerate(homes):
        for name, home in tensors.items():
            if (other := owner.setdefault(id(_at(home)), index)) != index:
                raise NetworkError(
                    f"Networks {other} and {index} share a tensor, which cannot hold two replicates.",
                    seen=name,
                    do="build each network on its own, or copy.deepcopy it",
                )
