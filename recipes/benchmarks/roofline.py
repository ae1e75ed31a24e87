"""What a training step on a GPU moves, computes and holds, and so how fast it can be at most. Nothing is timed.

    python recipes/benchmarks/roofline.py [--networks NAME ...] [--ways WAY ...] [--images BATCHxSIZE]
        [--precision bf16] [--bandwidth 4.8e12] [--rate 9.89e14] [--write]

Computed from the shapes of tensors that hold no numbers, so no GPU is needed: every operator of a step, as PyTorch runs
it without a compiler and lean training in its Triton kernels, reads its inputs and writes its outputs once, or as often
as its kernels do on a GPU; takes as long as its bytes or its operations do, whichever is longer; and frees nothing that
is still referred to. --write puts the table into docs/performance.md. The images are those of lean.yaml for a GPU,
bandwidth (bytes a second) and rate (operations a second) by default those of an H200's data sheet.
"""

import argparse
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.lean import LEVELS, conv_pool, dispatch
from bn_affine_adapters.lean.backends import cpp, gpu
from bn_affine_adapters.study.costs import conv_backward_operations
from bn_affine_adapters.study.pages import write_section

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
ABOUT: dict[str, Any] = yaml.safe_load((HERE / "lean.yaml").read_text(encoding="utf-8"))
WAYS = ("full", "plain", *LEVELS)
RATES = {"bf16": 989e12, "float32": 67e12}  # of an H200, the latter without TF32
BLOCK = 512  # what PyTorch's allocator hands out is a multiple of so many bytes

aten: Any = torch.ops.aten
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "device"}  # moves nothing
# Which inputs an operator's kernels read how often more than once: statistics and gamma's gradient need a pass first.
AGAIN: dict[Any, tuple[int, ...]] = {
    aten.native_batch_norm: (0,), aten.native_batch_norm_backward: (0, 1), aten.native_layer_norm_backward: (0, 1),
}  # fmt: skip


@dataclass
class Step:
    """What a training step costs.

    Attributes:
        calls: operators that move something, each at least a launch.
        moved: bytes read and written.
        operations: of convolutions and matrix products.
        seconds: at least, an operator after the other.
        peak: bytes that are held at most, those of the network too.
    """

    calls: int = 0
    moved: int = 0
    operations: int = 0
    seconds: float = 0.0
    peak: int = 0


class Count(TorchDispatchMode):
    """Count what the operators that run in its context cost."""

    def __init__(self, bandwidth: float, rate: float) -> None:
        """Count from nothing."""
        super().__init__()
        self.bandwidth, self.rate, self.held, self.found = bandwidth, rate, 0, Step()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def hold(self, tensors: list[Tensor]) -> None:
        """Count storages until they are freed, each once."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self.known:
                size = -(-storage.nbytes() // BLOCK) * BLOCK
                self.known.add(storage)
                weakref.finalize(storage, self.release, size)
                self.held += size
        self.found.peak = max(self.found.peak, self.held)

    def release(self, size: int) -> None:
        """Count a storage no more."""
        self.held -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        self.hold(outputs)
        if func.is_view or func.overloadpacket.__name__ in FREE or func.namespace == "profiler":
            return out
        moved = traffic(func.overloadpacket, args, inputs, outputs)
        if func.namespace == "bnaa_triton":  # which copies first what lies in memory as no kernel reads it
            copied = sum(tensor.nbytes for tensor in inputs if not dense(tensor))
            moved += 2 * copied
            self.found.peak = max(self.found.peak, self.held + copied)
        operations = work(func.overloadpacket, args, kwargs or {}, out)
        self.found.calls += 1
        self.found.moved += moved
        self.found.operations += operations
        self.found.seconds += max(moved / self.bandwidth, operations / self.rate)
        return out


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def dense(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory without gaps, as planes or with its channels last."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last or tensor.is_contiguous()


def extent(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values, of which an expanded one has fewer than numbers."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def traffic(packet: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes that an operator reads and writes."""
    moved = sum(map(extent, inputs)) + sum(map(extent, outputs)) + sum(extent(args[i]) for i in AGAIN.get(packet, ()))
    if packet is aten.convolution_backward:  # a kernel for each gradient; that of the input does not read the input
        for_input, for_weight = args[-1][:2]
        moved += extent(args[0]) * (for_input and for_weight) - extent(args[1]) * (not for_weight)
        moved -= extent(args[2]) * (not for_input)
    return moved


def work(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the operations of a convolution or a product of matrices."""
    if packet is aten.convolution_backward:
        return conv_backward_operations(*[arg.shape if isinstance(arg, Tensor) else arg for arg in args])
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def _in_float32(function: Any) -> Any:
    """Return a function that casts its input as a GPU's autocast does, and a CPU's does not."""

    def cast(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return cast


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let tensors without numbers, which say that they are on a CPU, take the operators of a GPU."""
    with (
        patch.object(cpp, "loaded", False),
        patch.object(gpu, "loaded", gpu.load()),
        patch.object(gpu, "DEVICE", "cpu"),
        patch.object(conv_pool, "PIXELWISE_DEVICE", None),
        patch.object(dispatch, "AUTOCAST_LEAVES", ()),
        patch.object(F, "layer_norm", _in_float32(F.layer_norm)),
        patch.object(F, "group_norm", _in_float32(F.group_norm)),
    ):
        yield


def cost(network: str, way: str, batch: int, size: int, precision: str, bandwidth: float, rate: float) -> Step:
    """Return what a step of a network costs: forward, loss, backward and SGD, in channels_last."""
    model: nn.Module = timm.create_model(network)
    if way != "full":
        lean: Any = None if way == "plain" else way
        model = get_bn_only_model(model, BNOnlyConfig(lean=lean))
    model.to(memory_format=torch.channels_last).train()
    with FakeTensorMode() as mode, as_on_a_gpu(), Count(bandwidth, rate) as count:
        named = [*model.named_parameters(), *model.named_buffers()]
        state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
        images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(batch, dtype=torch.long)
        trained = [tensor for tensor in state.values() if tensor.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, foreach=True)
        for _ in range(2):  # what SGD keeps is there from the second on
            gc.collect()
            count.found = Step()
            count.hold([*state.values()])
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(functional_call(model, state, (images,)), labels)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return count.found


def table(found: dict[tuple[str, int, int], dict[str, Step]]) -> str:
    """Return Markdown, a row a network and way."""
    head = "network|images|way|operators|moved, GB|TFLOP|at least, ms|/ full|peak, MB|/ full"
    cells = [head.split("|"), ["---"] * 10]
    for (network, batch, size), ways in found.items():
        for way, step in ways.items():
            numbers = (step.moved / 1e9, step.operations / 1e12, step.seconds * 1e3)
            to = ways["full"]
            shown = [f"{number:.4g}" for number in numbers] + [f"{step.seconds / to.seconds:.3f}"]
            shown += [f"{step.peak / 1e6:.1f}", f"{step.peak / to.peak:.3f}"]
            cells.append([network, f"{batch} x {size} px", way, str(step.calls), *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(arguments: list[str]) -> None:
    """Print the table, and write it as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(ABOUT["networks"]))
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="besides full")
    parser.add_argument("--images", type=lambda text: [int(part) for part in text.split("x")], metavar="BATCHxSIZE")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second")
    parser.add_argument("--rate", type=float, help="operations a second")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    given.rate = given.rate or RATES[given.precision]
    found: dict[tuple[str, int, int], dict[str, Step]] = {}
    for network in given.networks:
        batch, size = given.images or ABOUT["networks"][network]["cuda"]
        how = (batch, size, given.precision, given.bandwidth, given.rate)
        found[network, batch, size] = {way: cost(network, way, *how) for way in ("full", *given.ways)}
    print(table(found))
    if given.write:
        words = f"{given.bandwidth / 1e12:g} TB and {given.rate / 1e12:g} TFLOP a second, {given.precision}"
        text = (HERE / "roofline_template.md").read_text(encoding="utf-8")
        write_section(PAGE, "roofline", text.format(how=words, table=table(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
