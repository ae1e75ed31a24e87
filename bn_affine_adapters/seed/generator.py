"""Random numbers of torch's operators without its global generators, which other threads may draw from."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The overloads of factories that take a generator, by those that do not.
_WITH_GENERATOR = {
    "default": "generator", "low": "low_generator", "low_dtype": "low_generator_dtype", "Tensor": "Tensor_generator",
}  # fmt: skip


class OwnGenerator(TorchDispatchMode):
    """Within the block and in this thread, random operators draw from generators of the block, seeded with 0.

    The same operators give the same numbers in each block; torch's global generators are neither read nor set. An
    exception are kernels that take no generator: attention with dropout on a GPU.

    Attributes:
        drawn: whether anything has been drawn.

    >>> with OwnGenerator():
    ...     first = torch.rand(3)
    >>> with OwnGenerator():
    ...     torch.rand(3).equal(first)
    True
    """

    def __init__(self) -> None:
        """Begin with no generator; each device gets one when something is drawn there."""
        super().__init__()
        self.drawn = False
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keep torch's process-wide note of active modes unchanged: other threads would read it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, a random one with the generator of its device."""
        kwargs = kwargs or {}
        if not _is_random(func) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        first = args[0] if args else None
        device = first.device if isinstance(first, torch.Tensor) else torch.device(kwargs.get("device") or "cpu")
        with_generator = _with_generator(func)
        if device.type == "meta" or with_generator is None:
            self.drawn |= bool(kwargs.get("dropout_p"))
            return func(*args, **kwargs)
        self.drawn = True
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device).manual_seed(0)
        return with_generator(*args, **kwargs, generator=generator)


@cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def _with_generator(func: Any) -> Callable[..., Any] | None:
    """Return a random operator's form that takes a generator, if there is one."""
    if func is torch.ops.aten.native_dropout.default:  # of a GPU
        return _dropout
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = _WITH_GENERATOR.get(func._overloadname, "")
    return getattr(func.overloadpacket, name) if name in func.overloadpacket.overloads() else None


def _dropout(x: torch.Tensor, p: float, train: bool | None, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    kept = torch.ones_like(x, dtype=torch.bool)
    if train is not False:
        kept.bernoulli_(1 - p, generator=generator)
    return x * kept / (1 - p if train is not False and p < 1 else 1), kept
