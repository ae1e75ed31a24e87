"""The lean forward of a module as Python code, and whether it still is what the module computes."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .known import hooked

log = logging.getLogger(__name__)


def lean_forward(
    graph: fx.Graph, parameters: list[inspect.Parameter], written: dict[str, dict[str, Any]]
) -> Callable[..., Any]:
    """Return the lean forward of a graph, as a function of the module.

    Args:
        graph: what it computes, with the defaults of those arguments that have one.
        parameters: of the module's own forward.
        written: the settings of the modules whose forward was written out, by name.
    """
    graph.lint()
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, "<lean forward>", "exec"), scope)  # what torch.fx wrote from the network's own forward
    run = scope["forward"]
    said: list[str] = []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The runners' functions know no transforms of torch.func.
        if self.training and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            given, reason = _arguments(parameters, args, kwargs)
            reason = reason or _obstacle(self, written)
            if reason is None:
                return run(self, *given)
            if reason not in said:
                said.append(reason)
                log.warning("lean: %s: the network runs plain", reason)
        return type(self).forward(self, *args, **kwargs)

    forward.lean = True  # type: ignore[attr-defined]
    return forward


def _arguments(
    parameters: list[inspect.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], str | None]:
    """Return the arguments without a default, in their order, and why the graph does not know the call, if so."""
    given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    required = [p.name for p in parameters if p.default is p.empty]
    known = {p.name: p.default for p in parameters}
    for name, value in given.items():
        if name not in required and value is not known.get(name, inspect.Parameter.empty):
            return [], f"called with {name}="
    missing = [name for name in required if name not in given]
    return [given[name] for name in required if name in given], f"called without {missing[0]}" if missing else None


def settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain values that a module's forward may have read when it was written out, as in training mode."""
    kinds = bool | int | float | str | None
    found = {key: value for key, value in vars(module).items() if isinstance(value, kinds) and key != "num_classes"}
    return found | {"training": True}


def _obstacle(root: nn.Module, written: dict[str, dict[str, Any]]) -> str | None:
    """Return why the forward as it was written out is not that of the modules any more, if so."""
    for name, settings in written.items():
        try:
            module = root.get_submodule(name)
        except AttributeError:  # as FSDP does it
            return f"{name} is wrapped"
        if name and hooked(module):
            return f"{name} has hooks"
        for key, value in settings.items():
            if getattr(module, key, None) != value:
                return f"{key} of {name or type(module).__name__} has changed"
    return None


def plain_(network: nn.Module) -> None:
    """Give a network its own forward back, and its parts theirs."""
    for module in network.modules():
        own = getattr(module.__dict__.get("forward"), "__func__", None)
        if hasattr(own, "lean") or own is type(module).forward:  # the latter is what unpickling makes of the former
            del module.forward
