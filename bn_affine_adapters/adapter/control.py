"""Controls: a few other parameters per channel that train instead of gamma and beta, as many as BatchNorm has."""

import math
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from ..errors import AdapterError, AdapterTensorError
from ..seed.draws import codes, draw
from .method import BNOnlyConfig

BITS = "bits"  # the name of a mask in an adapter's file


class Control(nn.Module):
    """Runs a convolution of the frozen network with a few trained parameters of its own.

    The frozen weight is the convolution's: it is neither copied nor saved here.

    Attributes:
        replaced: number of the convolution's weights that the trained parameters replace.
    """

    replaced = 0

    def __init__(self, conv: nn.Module) -> None:
        """Share ``conv`` with the frozen network."""
        super().__init__()
        self._shared = (conv,)  # in a tuple, so that it is not registered as a submodule; deepcopy keeps the identity

    @property
    def conv(self) -> nn.Module:
        """The convolution of the frozen network."""
        return self._shared[0]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the convolution, e.g. `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_shared"][0], name)

    def plain(self) -> nn.Module:
        """Return a plain convolution that computes the same.

        Raises:
            AdapterError: there is none: a shift before zero padding does not equal a bias after the convolution.
        """
        raise AdapterError(
            "A shift per input channel cannot be merged into the convolution that follows it.",
            seen="zero padding, which the shift does not reach",
            do="model.save_pretrained(folder), and load the adapter with this package",
        )

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what an adapter's file holds for this control's tensors, both by name."""
        return tensors

    def loaded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this control's tensors for what a file holds; its shapes and types are as `stored` gives them."""
        return tensors


class OtherWeight(Control):
    """A convolution that runs with another weight than the frozen one."""

    @property
    def weight(self) -> Tensor:
        """The weight, (C_out, C_in / groups, ...).

        It keeps the frozen weight's memory format, by which PyTorch chooses the convolution's kernel.
        """
        frozen = _weight(self.conv)
        whole = self.changed(frozen.flatten(1)).view(frozen.shape)
        channels_last = frozen.dim() == 4 and not frozen.is_contiguous()
        return whole.contiguous(memory_format=torch.channels_last) if channels_last else whole

    def changed(self, rows: Tensor) -> Tensor:
        """Return the weight for the frozen one, both with a row for each filter."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Run the convolution."""
        return functional_call(self.conv, {"weight": self.weight}, (x,))

    def plain(self) -> nn.Module:
        """Return the convolution with this weight, bit for bit."""
        conv = deepcopy(self.conv)
        with torch.no_grad():
            _weight(conv).copy_(self.weight)
        return conv


class TwoWeights(OtherWeight):
    """A convolution that trains two weights per output channel, chosen from the seed.

    Only these are parameters: the other weights get no gradient, optimizer state or weight decay.

    Source: the paper's Section 4, "two random parameters per channel".
    """

    values: Tensor
    index: Tensor

    def __init__(self, conv: nn.Module, name: str, seed: int) -> None:
        """Choose the weights of the convolution whose canonical name is ``name``."""
        super().__init__(conv)
        weight = _weight(conv)
        index = torch.from_numpy(choose(weight.shape[0], math.prod(weight.shape[1:]), seed, name)).to(weight.device)
        self.values = nn.Parameter(weight.detach().flatten(1).gather(1, index), requires_grad=False)
        self.register_buffer("index", index, persistent=False)  # follows from the seed
        self.replaced = index.numel()

    def changed(self, rows: Tensor) -> Tensor:
        """Put the trained values into their places."""
        return rows.scatter(1, self.index, self.values)


class Mask(OtherWeight):
    """A convolution that keeps those frozen weights whose trained scores are largest; the others become 0.

    With signs, the magnitude of a score chooses a weight, and its sign is multiplied to it. The gradient goes straight
    through the choice: a score gets that of its weight, times the frozen value. Scores begin at U(0, 1) times
    fan_in^-1/2, drawn from the stream ``NAME:scores``. An adapter's file holds no scores: a bit for each weight tells
    whether it stays, and with signs a bit for each that stays whether it is negated.

    Source: edge-popup, Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", arXiv 1911.13299.
    """

    scores: Tensor

    def __init__(self, conv: nn.Module, name: str, config: BNOnlyConfig) -> None:
        """Begin with the scores of the convolution whose canonical name is ``name``."""
        super().__init__(conv)
        assert config.seed is not None  # checked by the configuration, as is the share
        assert config.mask_share is not None
        weight = _weight(conv)
        self.replaced, self.signed, self.name = weight.numel(), config.control == "signed_mask", name
        self.kept = min(self.replaced, max(1, int(config.mask_share * self.replaced + 0.5)))
        self.unit = math.prod(weight.shape[1:]) ** -0.5 if self.replaced else 0.0
        drawn = draw((self.replaced,), config.seed, f"{name}:scores", "unit", self.unit)
        self.scores = nn.Parameter(torch.from_numpy(drawn).to(weight), requires_grad=False)

    @torch.no_grad()
    def chosen(self, scores: Tensor) -> Tensor:
        """Return the positions of the weights that stay; of equal scores the first ones."""
        return (scores.abs() if self.signed else scores).argsort(descending=True, stable=True)[: self.kept]

    def changed(self, rows: Tensor) -> Tensor:
        """Multiply what stays by 1 or -1, and the rest by 0."""
        fixed = self.scores.detach()
        signs = torch.where(fixed < 0, -1.0, 1.0).to(fixed) if self.signed else torch.ones_like(fixed)
        places = self.chosen(fixed)
        factors = torch.zeros_like(fixed).scatter(0, places, signs.gather(0, places))
        return rows * (factors + (self.scores - fixed)).view(rows.shape)

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mask that scores choose, as packed bits: bit i is bit i mod 8 of byte i div 8."""
        scores = tensors["scores"].detach()
        count = self.replaced + (self.kept if self.signed else 0)
        if scores.is_meta:
            return {BITS: torch.empty(-(-count // 8), dtype=torch.uint8, device="meta")}
        places = self.chosen(scores).sort().values
        bits = np.zeros(count, bool)
        bits[places.cpu().numpy()] = True
        if self.signed:
            bits[self.replaced :] = (scores[places] < 0).cpu().numpy()
        return {BITS: torch.from_numpy(np.packbits(bits, bitorder="little"))}

    def loaded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scores that choose what packed bits say: a unit, with its sign, for each weight that stays, else 0.

        Raises:
            AdapterTensorError: another number of weights stays, or a bit after the last one is set.
        """
        ones = np.unpackbits(tensors[BITS].cpu().numpy(), bitorder="little")
        stays, negated = ones[: self.replaced].astype(bool), ones[self.replaced :]
        used = self.kept if self.signed else 0
        if stays.sum() != self.kept or negated[used:].any():
            raise AdapterTensorError(
                "A mask of the adapter keeps another share of the weights than its configuration says.",
                seen=f"{self.name}: {stays.sum():,} of {self.replaced:,} weights, not {self.kept:,}; "
                f"{negated[used:].sum()} bits after the last",
                do="download or save the adapter again",
            )
        signs = np.ones(self.kept, np.float32)
        signs[negated[:used].nonzero()] = -1
        scores = np.zeros(self.replaced, np.float32)
        scores[stays] = signs * np.float32(self.unit)
        return {"scores": torch.from_numpy(scores).to(self.scores)}


class InputAffine(Control):
    """A convolution after a trained scale and shift per input channel, which start at one and zero.

    The padding is zero, as in a network with a norm layer before the convolution.
    """

    def __init__(self, conv: Any) -> None:
        """Put a scale and a shift in front of ``conv``."""
        super().__init__(conv)
        self.scale = nn.Parameter(conv.weight.new_ones(conv.in_channels), requires_grad=False)
        self.shift = nn.Parameter(conv.weight.new_zeros(conv.in_channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of x, (N, C_in, ...), then run the convolution."""
        shape = (-1, *(1,) * (x.dim() - 2))
        return self.conv(x * self.scale.view(shape) + self.shift.view(shape))


def choose(filters: int, weights: int, seed: int, name: str) -> NDArray[np.int64]:
    """Return the positions of two different weights of every filter, int64 (filters, 2).

    Args:
        filters: output channels.
        weights: of one filter; with fewer than two, all of them are chosen.
        seed: of the weights.
        name: canonical name of the convolution.

    Four 16-bit codes of the stream ``name:two_weights`` give two 32-bit numbers a filter. They are scaled down to a
    position among all weights, and to one among the others. No parameter's name has a colon, so that no stream is
    used twice.

    >>> choose(2, 27, 0, "conv1").tolist()
    [[17, 4], [20, 16]]
    """
    if weights < 2:
        return np.zeros((filters, weights), dtype=np.int64)
    numbers = codes(seed, f"{name}:two_weights", 0, 4 * filters).astype(np.uint64).reshape(filters, 2, 2)
    wide = (numbers[..., 0] << np.uint64(16)) | numbers[..., 1]
    places = ((wide * np.array([weights, weights - 1], dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)
    places[:, 1] += places[:, 1] >= places[:, 0]
    return places


def is_conv(module: nn.Module) -> bool:
    """Tell whether a module is a convolution that a control can run."""
    return isinstance(module, _ConvNd) and not module.transposed


def controlled(conv: nn.Module, name: str, config: BNOnlyConfig) -> Control:
    """Return the control of a convolution that a configuration asks for."""
    if config.control == "input_affine":
        return InputAffine(conv)
    assert config.seed is not None  # checked by the configuration
    return TwoWeights(conv, name, config.seed) if config.control == "two_weights" else Mask(conv, name, config)


def _weight(conv: Any) -> Tensor:
    return conv.weight
