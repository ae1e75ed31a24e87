"""Find what a network can do without, by tracing it, and give it a forward that does without.

The network's modules, names and tensors stay; its `forward` becomes one that torch.fx wrote, in which frozen
convolutions and chains of norm, activation, addition and pooling are calls of `dispatch`.
"""

import inspect
import logging
import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from timm.layers import get_notrace_functions, is_notrace_module
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..norms.find import has_copies, is_norm, unwrapped
from . import dispatch
from .forward import lean_forward, settings
from .known import ACTIVATIONS, Report, activation_of

log = logging.getLogger(__name__)
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass
class Chain:
    """The nodes of what is run together, in their order: a norm layer, and what of this there is behind it."""

    norm: fx.Node
    add: fx.Node | None = None
    act: fx.Node | None = None
    pool: fx.Node | None = None
    first: "Chain | None" = None  # a norm layer and an activation in front, with `between` on the way
    between: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """All of them."""
        front = self.first.nodes if self.first else []
        return [*front, *(n for n in (self.between, self.norm, self.add, self.act, self.pool) if n is not None)]

    @property
    def source(self) -> fx.Node:
        """The node whose output goes in."""
        return self.first.source if self.first else self.norm.args[0]  # type: ignore[return-value]

    @property
    def residual(self) -> fx.Node | None:
        """The node whose output is added."""
        return next((node for node in self.add.all_input_nodes if node is not self.norm), None) if self.add else None


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own, norm layers, layers with adapters, and what timm says is not to be."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed: list[str] = []  # not to be traced through, but perhaps by themselves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = has_copies(m) or is_norm(m) or super().is_leaf_module(m, module_qualified_name)
        closed = is_notrace_module(type(m))
        if closed and not own and [*m.children()]:
            self.closed.append(module_qualified_name)
        return own or closed


def rewrite(network: nn.Module, level: str) -> Report:
    """Give a network, or where it cannot be traced the largest parts of it that can, a lean forward."""
    report = Report(level)
    # Traced on a copy that shares the tensors: a forward may leave something behind in its module.
    tensors = [*network.parameters(), *network.buffers()]
    copy = deepcopy(network, {id(tensor): tensor for tensor in tensors}).train()
    _rewrite(network, copy, "", report)
    return report


def trace(module: nn.Module) -> tuple[fx.Graph, list[str]]:
    """Return the graph of a module's forward with its default arguments, and the names of what is not traced through.

    Raises:
        Exception: torch.fx cannot follow it; of any class, since a forward is any code.
    """
    tracer = _Tracer()
    defaults = {p.name: p.default for p in _arguments(module) if p.default is not p.empty}
    graph = tracer.trace(module, concrete_args=defaults or None)
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise ValueError("its forward holds a tensor, which would stay on its device")
    return graph, tracer.closed


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _rewrite(module: nn.Module, copy: nn.Module, name: str, report: Report) -> None:
    try:
        graph, closed = trace(copy)
    except Exception as error:  # whatever a forward does that fx cannot follow, its parts may do less
        log.debug("%s cannot be traced: %s", name or type(module).__name__, error)
        report.untraced.append(name)
        for child, part in module.named_children():
            if [*part.children()] and not (has_copies(part) or is_norm(part)):
                _rewrite(part, copy.get_submodule(child), f"{name}.{child}".lstrip("."), report)
        return
    for child in closed:
        _rewrite(module.get_submodule(child), copy.get_submodule(child), f"{name}.{child}".lstrip("."), report)
    before = report.places
    _drop_identities(graph, copy)
    inlined = _inlined(graph, copy)
    _replace(graph, copy, report)
    if report.places > before:
        if not name:
            images = next(node for node in graph.nodes if node.op == "placeholder")
            with graph.inserting_after(images):
                inner = graph.call_function(dispatch.innermost, (images,))
            images.replace_all_uses_with(inner, delete_user_cb=lambda user: user is not inner)
        written = {child: settings(module.get_submodule(child)) for child in inlined}
        module.forward = MethodType(lean_forward(graph, _arguments(copy), written), module)


def _replace(graph: fx.Graph, root: nn.Module, report: Report) -> None:
    """Put calls of `dispatch` into a graph in the place of the layers they know."""
    level = report.level
    taken: set[fx.Node] = set()
    chains = [chain for node in list(graph.nodes) if (chain := _chain(node, root, taken)) is not None]
    if level == "smallest":
        _pair(chains, root)
    inner = {id(chain.first) for chain in chains if chain.first}
    for chain in chains:
        if id(chain) not in inner:
            _write_chain(graph, level, chain)
    report.norms += len(chains)
    report.recomputed += len(inner)
    report.convs += len(inner)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            call = _call_for(graph, node, root, level)
            if call is not None:
                _put(graph, [node], *call)
                report.convs += call[0] is dispatch.conv
                report.others += call[0] is not dispatch.conv
    if level != "smallest":
        _fork(graph)


def _call_for(graph: fx.Graph, node: fx.Node, root: nn.Module, level: str) -> tuple[Any, ...] | None:
    """Return the function of `dispatch` that runs a single layer, and its arguments; None for an unknown one."""
    module = _module(node, root)
    if node.target is F.avg_pool2d and len(node.args) == 2 and not node.kwargs:
        return dispatch.avg_pool, node.args
    if level == "smallest" and node.target is F.scaled_dot_product_attention:
        return dispatch.attention, node.args, node.kwargs
    if _is_act(node, root):
        return dispatch.activation, (level, _get(graph, node), node.args[0])
    if not _one_input(node):
        return None
    if isinstance(module, _ConvNd) and not module.transposed:
        return dispatch.conv, (_get(graph, node), node.args[0])
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return dispatch.global_pool, (_get(graph, node), node.args[0])
    if type(module) is nn.MaxPool2d:
        return dispatch.max_pool, (_get(graph, node), node.args[0])
    return None


def _fork(graph: fx.Graph) -> None:
    """Let norm layers whose output dispatch use twice, as at the start of a residual block, return it twice.

    Two gradients are more memory than their sum: not at "smallest".
    """
    known = (dispatch.conv, dispatch.norm)
    for node in list(graph.nodes):
        users = list(node.users)
        if node.target is dispatch.norm and len(users) == 2 and all(u.target in known for u in users):
            node.update_kwarg("two_outputs", True)
            with graph.inserting_after(node):
                both = graph.call_function(dispatch.fork, (node,))
            for i, user in enumerate(users):
                with graph.inserting_after(both):
                    user.replace_input_with(node, graph.call_function(operator.getitem, (both, i)))


def _module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """Return the module that a node calls, with an adapter's in the place of its wrapper."""
    return unwrapped(root.get_submodule(str(node.target))) if node.op == "call_module" else None


def _one_input(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _is_act(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether a node is an activation that the dispatch know."""
    if node.op == "call_function":
        plain = set(node.kwargs) <= {"inplace"} and len(node.args) == 1 and isinstance(node.args[0], fx.Node)
        return plain and activation_of(node.target) is not None
    return activation_of(type(_module(node, root))) is not None and _one_input(node)


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _drop_identities(graph: fx.Graph, root: nn.Module) -> None:
    """Take modules that do nothing out of a graph, so that layers meet."""
    for node in list(graph.nodes):
        if type(_module(node, root)) is nn.Identity and _one_input(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _inlined(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Return the modules that the graph does not call: what they are and what is set on them is written into it."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    called |= {name for name, module in root.named_modules() if has_copies(module) or is_norm(module)}
    parts = {name: name.split(".") for name, _ in root.named_modules()}
    return [name for name, p in parts.items() if not any(".".join(p[: i + 1]) in called for i in range(len(p)))]


def _chain(node: fx.Node, root: nn.Module, taken: set[fx.Node]) -> Chain | None:
    """Return the chain that starts at a norm layer's node; of two that are added, the first takes the sum."""
    module = _module(node, root)
    if module is None or not is_norm(module) or not _one_input(node):
        return None
    chain, user = Chain(node), _sole_user(node)
    if (
        user is not None
        and user.target in ADDS
        and not user.kwargs
        and len(user.all_input_nodes) == len(user.args) == 2
    ):
        if user in taken:
            return chain
        taken.add(user)
        chain.add, user = user, _sole_user(user)
    if user is not None and _is_act(user, root):
        chain.act, user = user, _sole_user(user)
    if user is not None and type(_module(user, root)) is nn.MaxPool2d and _one_input(user) and chain.add is None:
        chain.pool = user
    return chain


def _pair(chains: list[Chain], root: nn.Module) -> None:
    """Join chains with a convolution between them, whose output then is computed again instead of kept.

    From the back, since the last convolution of a residual block is the widest; not where what is spared would be
    smaller than what has to be kept for it.
    """
    by_last = {chain.nodes[-1]: chain for chain in chains if chain.pool is None and chain.add is None}
    joined: set[int] = set()
    for chain in reversed(chains):
        between = chain.source
        conv, first = _module(between, root), by_last.get(between.args[0] if between.args else None)  # type: ignore[arg-type]
        if (
            first is not None
            and isinstance(conv, _ConvNd)
            and _one_input(between)
            and conv.out_channels >= conv.in_channels
            and not {id(first), id(chain)} & joined
            and chain.pool is None
            and _sole_user(first.nodes[-1]) is between
            and _sole_user(between) is chain.norm
        ):
            chain.first, chain.between = first, between
            joined |= {id(first), id(chain)}


def _write_chain(graph: fx.Graph, level: str, chain: Chain) -> None:
    """Put one call in the place of a chain's nodes, where the last of them was."""
    nodes, first = chain.nodes, chain.first
    with graph.inserting_before(nodes[-1]):
        own = (_get(graph, chain.norm), _get(graph, chain.act))
        if first is not None:
            front = (level, _get(graph, first.norm), _get(graph, first.act), _get(graph, chain.between))
            _put(graph, nodes, dispatch.pair, (*front, *own, chain.source, chain.residual))
        elif chain.pool is not None:
            _put(graph, nodes, dispatch.pooled, (level, *own, _get(graph, chain.pool), chain.source))
        else:
            _put(graph, nodes, dispatch.norm, (level, *own, chain.source, chain.residual))


def _get(graph: fx.Graph, node: fx.Node | None) -> Any:
    """Return what the dispatch get for a node: the module that it calls, or the name of an activation."""
    if node is None:
        return None
    return graph.get_attr(str(node.target)) if node.op == "call_module" else ACTIVATIONS[node.target]


def _put(graph: fx.Graph, nodes: list[fx.Node], function: Callable[..., Any], args: Any, kwargs: Any = None) -> None:
    """Put a call, at the graph's insertion point, in the place of nodes in their order."""
    nodes[-1].replace_all_uses_with(graph.call_function(function, args, kwargs or {}))
    for node in reversed(nodes):
        graph.erase_node(node)
