"""Bounds on the network that a stranger's configuration asks for, checked before memory or time is spent on it."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TooLargeError
from ..settings import LIFT, MAX_CLASSES, MAX_TENSORS, Settings, zoo_of
from .rebuild import build_outline
from .zoos import builder_of

MAX_NUMBER = 20_000  # in creation arguments except num_classes: some constructors make lists of that length
MAX_ITEMS = 1_000  # in all creation arguments together, including those in nested lists
MAX_LABELS = 200_000  # num_classes of Transformers' networks, whose configurations list the classes by name
SLACK = 10_000_000  # values that a constructor makes besides parameters; in timm at most a ninth of the parameters
BUILD_SECONDS = 2.0  # of processor time; the slowest network of timm takes 0.8 s on the meta device


def build_within(config: Settings, max_parameters: int | None) -> nn.Module:
    """Build the network that a configuration asks for within the bounds, on the meta device where possible.

    Raises:
        TooLargeError: it has more parameters than allowed, or building it takes too long.
        UnknownArchitectureError, RebuildError: it cannot be built.
    """
    builder_of(str(config.architecture))  # what it imports takes time, which is not the constructor's
    with bounded(config, max_parameters):
        network = build_outline(config)
    count = sum(parameter.numel() for parameter in network.parameters())
    if max_parameters is not None and count > max_parameters:
        raise _too_large(config, f"{count:,} parameters; the limit is {max_parameters:,}")
    return network


@contextmanager
def bounded(config: Settings, max_parameters: int | None) -> Iterator[None]:
    """Bound what is built inside: the numbers asked for, the tensors made, and this thread's processor time.

    Raises:
        TooLargeError: a bound is exceeded; with ``max_parameters=None`` there is none.
    """
    if max_parameters is None:
        yield
        return
    most_classes = MAX_LABELS if zoo_of(config.architecture) == "transformers" else MAX_CLASSES
    for text in _excessive(config.model_args, most_classes):
        raise _too_large(config, text)
    try:
        with _deadline(BUILD_SECONDS), _Counted(2 * max_parameters + SLACK):
            yield
    except _TooSlow:
        raise _too_large(config, f"its constructor took more than {BUILD_SECONDS} s") from None
    except _TooMany:
        seen = f"over {MAX_TENSORS:,} tensors, or {2 * max_parameters + SLACK:,} values, in its constructor"
        raise _too_large(config, seen) from None


def _too_large(config: Settings, seen: str) -> TooLargeError:
    args = ", ".join(f"{key}={value!r}"[:80] for key, value in list(config.model_args.items())[:8])
    return TooLargeError(
        "The adapter asks for a network that is too large to be built from an untrusted file.",
        seen=f"{config.architecture} with {args or 'no arguments'}: {seen}",
        do=LIFT,
    )


def _excessive(args: dict[str, Any], most_classes: int) -> Iterator[str]:
    waiting, items = [*args.items()], 0
    while waiting:
        name, value = waiting.pop()
        items += 1
        if items > MAX_ITEMS:
            yield f"more than {MAX_ITEMS} values"
            return
        if isinstance(value, list | tuple):
            waiting.extend((name, item) for item in value[: MAX_ITEMS + 1])
        elif isinstance(value, str) and len(value) > MAX_ITEMS:
            yield f"{name[:80]} has {len(value):,} characters"
        elif isinstance(value, int | float):
            most = most_classes if name == "num_classes" else MAX_NUMBER
            if abs(value) > most:
                yield f"{name[:80]} is over {most:,}"


class _TooMany(BaseException):  # not an Exception, so that no constructor catches it
    pass


class _TooSlow(BaseException):
    pass


class _Counted(TorchDispatchMode):
    """Count the new tensors and their values, on any device; views and in-place operations make none."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.values, self.tensors = limit, MAX_TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
            self.values -= out.numel()
            self.tensors -= 1
            if min(self.values, self.tensors) < 0:
                raise _TooMany
        return out


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TooSlow inside, from a second thread, once this thread has used so much processor time.

    Only this ends a loop in a constructor, e.g. over all pairs of positions in a window. Processor time is counted
    rather than wall time, so that a busy machine refuses nothing.
    """
    thread, clock = threading.get_ident(), _clock()
    end, over, lock = clock() + seconds, threading.Event(), threading.Lock()

    def watch() -> None:
        while not over.wait(0.1):
            if clock() > end:
                with lock:
                    if not over.is_set():
                        raise_in(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))
                return

    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:  # after this nothing new is raised; an exception that was already set arrives at once
            over.set()


def _clock() -> Callable[[], float]:
    if hasattr(time, "pthread_getcpuclockid"):
        number = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(number)
    return time.monotonic
