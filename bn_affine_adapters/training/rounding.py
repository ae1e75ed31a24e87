"""Train through the rounding of a compact file, so that an adapter loses nothing when it is written as one."""

from functools import partial

import torch
from torch import nn

from ..adapter.fold import copies, parameters, round_folded_
from ..adapter.layer import adapter_layers
from ..deploy.compact import nearest
from ..errors import ConfigError
from ..model.peft_model import BNOnlyPeftModel


class Rounding:
    """The values of an adapter: rounded while the network runs, and as they train while the optimiser updates them.

    The gradients of the rounded values update those that train: the straight-through estimator. What is rounded is what
    a compact file holds, gamma and beta with the running statistics folded in.

    Source: BinaryConnect (Courbariaux et al., 2015); Estimating or Propagating Gradients Through Stochastic Neurons
    (Bengio et al., 2013).
    """

    def __init__(self, network: nn.Module, bits: int | None) -> None:
        """Round an adapter's values to so many bits, or none of them with None.

        Raises:
            AdapterError: statistics do not fold into gamma and beta.
        """
        self.bits, self.before = bits, list[torch.Tensor]()  # the values that train, while the network has others
        if bits is not None:
            assert isinstance(network, BNOnlyPeftModel)  # checked by the recipe
            name = network.active_adapter
            self.held = copies(network.get_base_model(), name, network.peft_config[name])
            self.tensors = [*parameters(self.held).values()]

    @torch.no_grad()
    def round_(self) -> None:
        """Round the values until `restore_`; a value that is not finite stays, so that training notices it."""
        if self.bits is None or self.before or not all(bool(t.isfinite().all()) for t in self.tensors):
            return
        self.before = [tensor.detach().clone() for tensor in self.tensors]
        round_folded_(self.held, partial(nearest, bits=self.bits))

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the values that train back, if they are rounded."""
        for tensor, value in zip(self.tensors if self.before else [], self.before, strict=True):
            tensor.copy_(value)
        self.before = []


def start_from_(model: BNOnlyPeftModel, adapter: str) -> None:
    """Give a new adapter the values and running statistics of one that was saved, for the same network.

    Raises:
        AdapterError: it cannot be loaded, or belongs to another network.
        ConfigError: it trains other layers.
    """
    ours = model.peft_config[name := model.active_adapter]
    model.load_adapter(adapter, "start")
    theirs = model.peft_config["start"]
    if set(ours.target_modules) ^ set(theirs.target_modules):
        seen = f"{len(theirs.target_modules)} layers in {adapter}, {len(ours.target_modules)} in the recipe"
        raise ConfigError("The adapter to start from trains other layers.", seen=seen, do="its own condition=")
    for layer in adapter_layers(model):
        if name in layer.bn_only_layers:
            layer.bn_only_layers[name].load_state_dict(layer.bn_only_layers["start"].state_dict())
    model.delete_adapter("start")
