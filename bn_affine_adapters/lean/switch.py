"""Turn lean training of a network on and off, and say what it spares."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError, check_choice
from ..norms.find import logits_of, plain_modules
from ..seed.generator import OwnGenerator
from .backends import cpp, gpu, portable
from .forward import plain_
from .known import ACTIVATIONS, LEVELS, Report
from .rewrite import rewrite

log = logging.getLogger(__name__)
TOLERANCE = 0.05  # of the output's norm: rounding stays far below, another computation far above


def lean_(network: nn.Module, level: str, input_size: tuple[int, ...] | None = None) -> Report:
    """Give a network with frozen weights a training forward that keeps less for backward; return what it spares.

    Modules, names and tensors stay, and so does every other forward: in evaluation mode, without gradients, under
    transforms such as vmap, and, as the log says, where a hook is on a module that would not be called or a setting
    has changed, e.g. a rate of dropout; then call this again. A deep copy is lean too, a pickled one plain.
    The new forward is compared with the old one on random images, and taken back if it computes something else.

    Args:
        network: changed in place; what `get_base_model()` returns.
        level: one of `LEVELS`: "exact", "rounded" or "smallest".
        input_size: of an image, (C, H, W); by default what timm says of the network.

    Raises:
        ConfigError: there is no such level.
        NetworkError: no weight of the network is frozen.

    >>> import timm
    >>> network = timm.create_model("cifar_resnet14").requires_grad_(False)
    >>> _ = network.bn1.requires_grad_(True)
    >>> print(lean_(network, "exact"))
    lean exact: 15 norm layers, 15 convolutions, 1 others; 0.53 of the bytes that plain freezing saves for backward
    """
    check_choice("lean", level, LEVELS)
    plain_(network)
    weights: list[Any] = [m.weight for _, m in plain_modules(network, active=True) if _is_weighty(m)]
    _check_frozen(weights)
    _load_kernels(network, weights)
    if any(getattr(module, "grad_checkpointing", False) for module in network.modules()):
        log.warning("lean: the network stays plain, since its blocks are checkpointed: turn that off first")
        return Report(level)
    report = rewrite(network, level)
    if report.places and _device(network).type != "meta":
        report.share, wrong = _tried(network, input_size)
        if wrong:
            log.warning("lean: the network stays plain, since its lean forward %s", wrong)
            plain_(network)
            report = Report(level, untraced=report.untraced)
    log.info("%s", report)
    return report


def _check_frozen(weights: list[Any]) -> None:
    if weights and all(weight.requires_grad for weight in weights):
        raise NetworkError(
            "Lean training spares what frozen weights do not need, and here every weight trains.",
            seen=f"{len(weights)} of {len(weights)} convolutions and linear layers train",
            do="get_bn_only_model(network, BNOnlyConfig(lean=...)), or leave lean out",
        )


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _load_kernels(network: nn.Module, weights: list[Any]) -> None:
    """Load the kernels that a network may use, and say what they do not compute."""
    if torch.cuda.is_available():
        gpu.load()  # where the network is on a CPU still too: it may go to the GPU later
    if _device(network).type == "cpu":
        cpp.load()
        if any(weight.dtype == torch.float16 for weight in weights):
            log.warning("float16 on a CPU: lean training runs in PyTorch's own kernels, which are slower")
    present = {ACTIVATIONS[type(module)] for module in network.modules() if type(module) in ACTIVATIONS}
    unknown = sorted(present - portable.ACTIVATIONS.keys())
    if unknown:
        log.warning("lean: no back end knows %s: what PyTorch keeps for it stays", ", ".join(unknown))


def _is_weighty(module: Any) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)


def _tried(network: nn.Module, input_size: tuple[int, ...] | None) -> tuple[float | None, str | None]:
    """Return the lean forward's share of the saved bytes, if it can be told, and what is wrong with it, if anything."""
    shape = input_size or (getattr(network, "pretrained_cfg", None) or {}).get("input_size")
    # Parameters are shared, buffers are not: running statistics stay what they are.
    copy = deepcopy(network, {id(parameter): parameter for parameter in network.parameters()}).train()
    first = next(network.parameters())
    with torch.enable_grad():
        count = 8 if shape and shape[-1] <= 64 else 2
        images = torch.randn(count, *(shape or ()), generator=torch.Generator().manual_seed(0))
        images = images.to(first.device, first.dtype)
        lean = _run_once(copy, images)
        plain_(copy)
        plain = _run_once(copy, images)
    if isinstance(plain, Exception):
        log.warning("lean: not tried, since the network does not take images of input_size=%s: %s", shape, plain)
        return None, None
    if isinstance(lean, Exception):
        return None, f"fails: {lean}"
    (y, kept), (plain_y, all_kept) = lean, plain
    difference = ((y - plain_y).norm() / plain_y.norm().clamp_min(1e-12)).item()
    if plain_y.isfinite().all() and not difference < TOLERANCE:
        return None, f"differs by {difference:.2g} of the output"
    return (kept / all_kept if all_kept else None), None


def _run_once(network: nn.Module, images: Tensor) -> tuple[Tensor, int] | Exception:
    """Return the output and the saved bytes, or what a network's code raised, of any kind."""

    def run() -> Tensor:
        with OwnGenerator():  # the same numbers in each run, and other threads' generators stay
            return logits_of(network(images)).detach().float()

    try:
        return saved_bytes(network, run)
    except Exception as error:
        return error


def saved_bytes(network: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a forward returns, and the bytes that it saves for backward besides parameters and buffers.

    A storage is counted once, whole, however many tensors look into it.
    """
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # kept, so that its address is not used again
        return tensor.detach()  # else an output that is saved holds its own graph, and so itself, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(storage.nbytes() for storage in found.values())
