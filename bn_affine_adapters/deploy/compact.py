"""Write an adapter as one compact file: statistics folded, values rounded to a few bits, fitted to images below 8."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call

from ..adapter.checks import choose_layers
from ..adapter.fold import copies, fold_, parameters
from ..adapter.method import BNOnlyConfig
from ..adapter.tensors import check_tensors
from ..errors import AdapterTensorError, ConfigError, OutputFolderError
from ..model.loading import load_bn_only_model
from ..model.peft_model import BNOnlyPeftModel
from ..norms.find import logits_of
from ..settings import COMPACT_NAME
from ..sharing.compact import Rounded, check_bits, encode, grid_size, stored_settings
from ..sharing.folder import write_file
from .qr import check_qr, write_qr

RANDOM_IMAGES, TO_COMPARE = 256, 16  # to fit the rounding; to compare logits alone
BATCH, STEPS, LR = 64, 300, 0.02  # of the fit; the learning rate is in steps of the grid
LOST_NOTHING = 1e-8  # of the sum of squares
LEAST_STEP = 2.0**-24  # the smallest number of binary16 above 0
# What else decides which layers an adapter has, and so what the default of their names is
_DECIDE = ("architecture", "model_args", "seed", "train_head", "layer_scale", "control", "extra_trainable_modules")


def write_compact(
    model: BNOnlyPeftModel,
    name: str,
    file: str | os.PathLike[str],
    *,
    bits: int = 8,
    images: torch.Tensor | None = None,
    test: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
    qr: str | os.PathLike[str] | None = None,
) -> Path:
    """Write an adapter as a compact file, load it again, and print the largest difference of the logits.

    Args:
        model: what `get_bn_only_model` or `load_bn_only_model` returned; it is not changed.
        name: of the adapter.
        file: does not exist yet; in a folder it is called adapter_compact.safetensors.
        bits: of a value: 4, 6, 8 or 16. Below 8 the rounding is fitted to ``images``.
        images: a few hundred without labels, prepared as the network takes them, (N, C, H, W); random ones by default.
        test: batches (images, labels): the accuracy before and after is printed.
        qr: where to write the file as a QR code, .png or .svg; needs the extra "qr".

    Raises:
        ConfigError: there is no such number of bits, or the file does not fit into a QR code.
        OutputFolderError: the file exists.
        AdapterError: statistics do not fold into gamma and beta, or a value is not finite.
    """
    check_bits(bits)
    target, picture = new_file(Path(file, COMPACT_NAME if Path(file).is_dir() else "")), Path(qr) if qr else None
    model.base_model.check_unchanged(name)
    before = folded(model, name)
    inputs = _random(before.peft_config[name], bits) if images is None else images.cpu().float()
    content = _content(before, name, bits, inputs, picture)
    after = _loaded_again(content, model)
    write_file(target, content)
    if picture:
        write_qr(content, picture)
    print(f"{len(content):,} bytes, {bits} bits;", _difference(before, after, inputs, images is None))
    if batches := list(test):
        print(_accuracies(before, after, batches))
    return target


def new_file(target: Path) -> Path:
    """Return the path of a file that does not exist yet, and make its folder.

    Raises:
        OutputFolderError: it exists.
    """
    if target.exists():
        raise OutputFolderError(f"{target} exists.", seen=f"{target.stat().st_size:,} bytes", do="choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _content(model: BNOnlyPeftModel, name: str, bits: int, images: torch.Tensor, picture: Any) -> bytes:
    """Return the compact file of an adapter whose statistics are folded."""
    config, found = model.peft_config[name], _rounded(model, name, bits, images)
    settings = stored_settings(config, _default(model, config))
    content = encode(settings, config.to_dict(), found, bits)
    if picture:
        check_qr(content, settings, [tensor.codes.size for tensor in found], bits, picture)
    return content


def _difference(before: nn.Module, after: nn.Module, images: torch.Tensor, random: bool) -> str:
    largest = max(float((_logits(before, x) - _logits(after, x)).abs().max()) for x in images.split(BATCH))
    return f"largest difference of the logits {largest:.3g} on {len(images):,} {'random ' * random}images"


def _accuracies(before: nn.Module, after: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> str:
    def accuracy(network: nn.Module) -> float:
        right = [_logits(network, images).argmax(1) == labels for images, labels in batches]
        return 100 * float(torch.cat(right).float().mean())

    count = sum(len(labels) for _, labels in batches)
    return f"accuracy {accuracy(before):.2f} % before, {accuracy(after):.2f} % after, {count:,} images"


def folded(model: BNOnlyPeftModel, name: str) -> BNOnlyPeftModel:
    """Return a copy of a model in float32 on the CPU, with this adapter active and its statistics folded."""
    copy = deepcopy(model)
    copy.unmerge_adapter()
    copy.set_adapter(name)
    copy.to("cpu").float().eval().requires_grad_(False)
    held = copies(copy.get_base_model(), name, copy.peft_config[name])
    fold_(held)
    values = parameters(held)
    check_tensors(values, values)  # a value that is not finite is refused by name
    return copy


def _default(model: BNOnlyPeftModel, config: BNOnlyConfig) -> BNOnlyConfig:
    """Return what a reader takes for each setting that the file does not hold."""
    default = BNOnlyConfig(**{key: deepcopy(getattr(config, key)) for key in _DECIDE})
    choose_layers(model.get_base_model(), default)
    plain = BNOnlyConfig(layer_scale="constructor" if config.seed is None else "one")
    for key in _DECIDE:
        setattr(default, key, getattr(plain, key))
    return default


def _random(config: BNOnlyConfig, bits: int) -> torch.Tensor:
    size = (config.data_config or {}).get("input_size")
    if size is None:
        do = "images=..., a few hundred as the network takes them, or data_config={'input_size': [3, H, W]}"
        raise ConfigError("It is not known which images the network takes.", seen="data_config=None", do=do)
    count = RANDOM_IMAGES if bits < 8 else TO_COMPARE
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _rounded(model: BNOnlyPeftModel, name: str, bits: int, images: torch.Tensor) -> list[Rounded]:
    """Round an adapter's parameters; below 8 bits take the fit if it keeps the logits better than plain rounding."""
    held = parameters(copies(model.get_base_model(), name, model.peft_config[name]))
    network = model.get_base_model()
    paths = {id(tensor): path for path, tensor in network.named_parameters()}
    values = {paths[id(tensor)]: tensor.detach() for tensor in held.values()}
    plain = [_on_grid(tensor, *_plain_grid(tensor, bits), bits) for tensor in values.values()]
    if bits >= 8:
        return plain
    expected = torch.cat([_logits(network, x) for x in images.split(BATCH)])

    def error(found: list[Rounded]) -> float:
        now = {
            path: torch.from_numpy(part.values(bits)).view_as(values[path])
            for path, part in zip(values, found, strict=True)
        }
        got = torch.cat([_logits(network, x, now) for x in images.split(BATCH)])
        return float((got - expected).square().sum())

    if error(plain) < LOST_NOTHING * float(expected.square().sum()):  # it was trained through this rounding
        return plain
    return min(plain, _fitted(network, values, bits, images, expected), key=error)


def nearest(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a tensor rounded to the grid from its smallest to its largest value; rounded again, it stays.

    Raises:
        AdapterTensorError: its values are too large for a grid.
    """
    values = _on_grid(tensor.cpu(), *_plain_grid(tensor, bits), bits).values(bits)
    return torch.from_numpy(values).view_as(tensor)


def _plain_grid(tensor: torch.Tensor, bits: int) -> tuple[float, float]:
    """Return (step, offset): from the smallest to the largest value, or symmetric where the offset is not stored."""
    if not tensor.numel():
        return 1.0, 0.0
    low, high = float(tensor.min()), float(tensor.max())
    if bits >= 8:
        return max(abs(low), abs(high)) / (2 ** (bits - 1) - 1), 0.0
    step = (high - low) / (2**bits - 1) or abs(high) / 2**bits  # of a constant: something that can be fitted
    return step, low + 2 ** (bits - 1) * step


def _on_grid(tensor: torch.Tensor, step: float, offset: float, bits: int) -> Rounded:
    """Round a tensor to the nearest values of a grid, whose numbers are rounded to binary16 first."""
    grid = _grid(step, offset, bits)
    steps = (tensor.double() - (float(grid[1]) if bits < 8 else 0.0)) / float(grid[0])
    return Rounded(_codes(steps, bits), grid)


def _grid(step: float, offset: float, bits: int) -> NDArray[np.float16]:
    """Return a grid in binary16.

    Raises:
        AdapterTensorError: its numbers are too large.
    """
    with np.errstate(over="ignore"):
        grid = np.array([max(step, LEAST_STEP), offset][: grid_size(bits)], np.float16)
    if not np.isfinite(grid).all():
        seen, do = f"step {step:.3g}, offset {offset:.3g}", "bits=16, or model.save_pretrained(folder)"
        raise AdapterTensorError("A tensor has values too large for a compact adapter.", seen=seen, do=do)
    return grid


def _codes(steps: torch.Tensor, bits: int) -> NDArray[np.uint16]:
    """Return the codes of values in steps from the offset."""
    half = 2 ** (bits - 1)
    return (steps.flatten().round().clamp(-half, half - 1) + half).numpy().astype(np.uint16)


def _fitted(
    network: nn.Module, values: dict[str, torch.Tensor], bits: int, images: torch.Tensor, expected: torch.Tensor
) -> list[Rounded]:
    """Fit values and grids to a network's logits, by gradients straight through the rounding.

    Source: Learned Step Size Quantization (Esser et al., 2020), with an offset.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    plain = [(max(step, LEAST_STEP), offset) for step, offset in (_plain_grid(t, bits) for t in values.values())]
    steps = [torch.tensor(step).log().requires_grad_() for step, _ in plain]
    offsets = [torch.tensor(offset / step).requires_grad_() for step, offset in plain]  # in steps
    inner = [((t - o) / s).requires_grad_() for t, (s, o) in zip(values.values(), plain, strict=True)]
    groups: list[dict[str, Any]] = [
        {"params": inner},
        {"params": steps, "lr": 0.02 * LR},
        {"params": offsets, "lr": 0.2 * LR},
    ]
    optimizer = torch.optim.Adam(groups, lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        now = {}
        for path, x, step, offset in zip(values, inner, steps, offsets, strict=True):
            bounded = x.clamp(low, high)
            now[path] = (bounded + (bounded.round() - bounded).detach() + offset) * step.exp()
        loss = (_outputs(functional_call(network, now, (images[chosen],))) - expected[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # Many values come to lie between two codes: each gets the one that it was fitted with.
    return [
        Rounded(_codes(x.detach(), bits), _grid(step.exp().item(), (offset * step.exp()).item(), bits))
        for x, step, offset in zip(inner, steps, offsets, strict=True)
    ]


@torch.no_grad()
def _logits(network: nn.Module, images: torch.Tensor, values: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    return _outputs(functional_call(network, values or {}, (images,)))


def _outputs(found: Any) -> torch.Tensor:
    """Return a network's outputs as one tensor: a head of two parts answers with two."""
    found = logits_of(found)
    return found if isinstance(found, torch.Tensor) else torch.cat([part.flatten(1) for part in found], 1)


def _loaded_again(content: bytes, model: BNOnlyPeftModel) -> nn.Module:
    """Return the network that a compact file gives, loaded on a copy of its base."""
    copy = deepcopy(model)
    copy.unmerge_adapter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, COMPACT_NAME)
        file.write_bytes(content)
        return load_bn_only_model(file, copy.to("cpu").float().eval().unload()).get_base_model()
