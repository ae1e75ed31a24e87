"""Measure batches whose images have different adapters against one merged adapter, loops and sub-batches per layer.

    python recipes/benchmarks/mixed.py [--write] [--models resnet18 ...] [--adapters 1 4 16 64] [--batch 64]
        [--size 160] [--rounds 5] [--held 100]

Every adapter has its own norm layers and head. The sides run in turn in each round, and ratios are of one round. On a
CPU the time is the processor time of one thread, so that other programs count little:

- merged: one adapter, merged into a plain network; BatchNorm in evaluation mode;
- folded: the same with BatchNorm folded into the convolutions;
- mixed K: one batch of images of K adapters, `model(images, adapter_names=[...])`;
- loop K: a merged network for each adapter's images, one after another (one network stands for all);
- parts K: one batch, in which every layer with copies runs each adapter's copy on its own images.

Also measures how long `set_adapter(name, inference_mode=True)` takes, and the resident memory of a process that holds
--held adapters of resnet50 ready for mixed batches, over the bytes of backbone, adapters, scales and shifts.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import psutil
import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bn_affine_adapters import BNOnlyConfig, BNOnlyPeftModel, get_bn_only_model
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.norms.scale_shift import ScaleShift
from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.tables import markdown_table

CLASSES, PAIRED, SWITCHED = 10, 16, "resnet50"
USUAL: dict[str, Any] = {
    "models": ["resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224"],
    "adapters": [1, 4, 16, 64],
    "batch": 64,
    "size": 160,
    "rounds": 5,
    "held": 100,
}
warnings.simplefilter("ignore")  # of bases that nobody else can have


def many(name: str, count: int, size: int) -> BNOnlyPeftModel:
    """Return a network with adapters task_0, task_1, ... of different values, in evaluation mode."""
    arguments = {"img_size": size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=CLASSES, **arguments)
    model = get_bn_only_model(network, BNOnlyConfig(train_head=True), "task_0")
    config = model.peft_config["task_0"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter_layers(model):
            for number in range(1, count):  # as add_adapter does, which verifies the frozen weights each time
                model.peft_config[f"task_{number}"] = config
                layer.add_copy(f"task_{number}", layer.copy_of_base(), config)
            for parameter in layer.bn_only_layers.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return model.eval()


def sides(model: BNOnlyPeftModel, images: Tensor, counts: list[int]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    plain = timm_network(model)
    found: dict[str, Callable[[], Any]] = {"merged": lambda: plain(images)}
    if any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()):
        folded = fuse(plain)
        found["folded"] = lambda: folded(images)
    for count in counts:
        names = [f"task_{n % count}" for n in range(len(images))]
        found[f"mixed {count}"] = partial(model.__call__, images, adapter_names=names)
    if PAIRED in counts:
        names = [f"task_{n % PAIRED}" for n in range(len(images))]
        each = [images[n::PAIRED].contiguous() for n in range(PAIRED)]
        found[f"loop {PAIRED}"] = lambda: [plain(some) for some in each]
        found[f"parts {PAIRED}"] = lambda: in_parts(model, images, names)
    return found


def timm_network(model: BNOnlyPeftModel) -> nn.Module:
    """Return a plain network with the first adapter merged, and a memory of its own."""
    network = timm.create_model(model.peft_config["task_0"].architecture, **model.peft_config["task_0"].model_args)
    own = get_bn_only_model(network, BNOnlyConfig(train_head=True), "task_0")
    own.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in own.state_dict()})
    return own.merge_and_unload().eval()


def in_parts(model: BNOnlyPeftModel, images: Tensor, names: list[str]) -> Any:
    """Run a mixed batch copy by copy in every layer, as layers do that are no norm layers."""
    ready = [(layer, layer.scale_shift) for layer in adapter_layers(model)]
    with (
        mock.patch.object(ScaleShift, "built", return_value=None),
        mock.patch.object(ScaleShift, "refresh_", return_value=False),
    ):
        logits = model(images, adapter_names=names)
    for layer, stacked in ready:
        layer.scale_shift = stacked
    return logits


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes: on a GPU to the end of what it launched, on a CPU in processor time."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measured(name: str, counts: list[int], batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Return the medians of one network's sides, in ms, and of their ratios to the merged adapter in the same round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = many(name, max(counts), size).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    for run in sides(model, images[:PAIRED], counts).values():  # stacks scales and shifts, chooses kernels
        run()
    runs = sides(model, images, counts)
    taken = [{side: seconds(run) for side, run in runs.items()} for _ in range(rounds)]
    ms = {side: round(statistics.median(each[side] for each in taken) * 1e3, 1) for side in runs}
    ratio = {side: round(statistics.median(each[side] / each["merged"] for each in taken), 3) for side in runs}
    over = {
        f"{side} / mixed {PAIRED}": round(
            statistics.median(each[f"{side} {PAIRED}"] / each[f"mixed {PAIRED}"] for each in taken), 2
        )
        for side in ("loop", "parts")
        if PAIRED in counts
    }
    return {"network": name, "ms": ms, "over_merged": ratio, "over_mixed": over}


def switching() -> float:
    """Return the median time of switching the adapter of a ResNet-50 for inference, in ms."""
    model = many(SWITCHED, 2, 64)
    switches = [partial(model.set_adapter, f"task_{n % 2}", inference_mode=True) for n in range(100)]
    return round(statistics.median(map(seconds, switches)) * 1e3, 3)


def resident() -> int:
    """Return this process's resident memory, without what the allocator keeps."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def hold(count: int, results: Any) -> None:
    """Measure the memory of ``count`` adapters of a ResNet-50, in a fresh process."""
    torch.set_num_threads(1)
    names = [f"task_{n}" for n in range(count)]
    many("test_resnet", 2, 64)(torch.zeros(2, 3, 64, 64), adapter_names=["task_0", "task_1"])  # what is loaded lazily
    before = resident()
    model = many(SWITCHED, count, 64)
    model(torch.zeros(1, 3, 32, 32), adapter_names=names[:1])
    after = resident()
    layers = list(adapter_layers(model))
    tables = [layer.scale_shift.table for layer in layers if layer.scale_shift is not None]
    tensors = [*model.state_dict().values(), *tables]
    results.put((after - before, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))


def memory(count: int) -> dict[str, float]:
    """Return the growth of a process's memory by ``count`` adapters, and the bytes of their tensors, in MB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=hold, args=(count, results))
    process.start()
    grown, expected = results.get()
    process.join()
    megabytes = {"resident_MB": round(grown / 1e6, 1), "tensors_MB": round(expected / 1e6, 1)}
    return {"adapters": count, **megabytes, "ratio": round(grown / expected, 3)}


def compare(models: list[str], adapters: list[int], batch: int, size: int, rounds: int, held: int) -> dict[str, Any]:
    """Measure all of it; on a CPU in one thread, so that processor time is that of the work."""
    torch.set_num_threads(1)
    return {
        "options": {
            "models": models,
            "adapters": adapters,
            "batch": batch,
            "size": size,
            "rounds": rounds,
            "held": held,
        },
        "networks": [measured(name, adapters, batch, size, rounds) for name in models],
        "switch_ms": switching(),
        "memory": memory(held),
    }


TEXT = """Written by `python recipes/benchmarks/mixed.py {arguments}`;
{hardware}.

A batch of {batch} images at {size} px in float32, each image with its own of K adapters (norm layers and head), against
one merged adapter. The sides take turns, {rounds} rounds; ratios are medians over rounds.
{clock}

{table}

"Folded" has BatchNorm folded into the convolutions. "Loop" runs a merged network for each of {paired} adapters, "parts"
runs each layer's copies on their own images: how many times the mixed batch's time they take.

`set_adapter(name, inference_mode=True)` of a ResNet-50 takes {switch} ms. A process that holds a ResNet-50 with {held}
adapters, ready for mixed batches, takes {resident} MB more than an empty one; the tensors of backbone and adapters, the
stacked scales and shifts included, have {tensors} MB: {ratio} times. The rest is what Python and PyTorch need for each
module and tensor.
"""


def page(result: dict[str, Any]) -> str:
    """Return the section of docs/performance.md."""
    options, held = result["options"], result["memory"]
    mixed = [f"mixed {count}" for count in options["adapters"]]
    head = ["network", "merged, ms", "folded / merged", *(f"{side} / merged" for side in mixed)]
    beside = [f"{side} / mixed {PAIRED}" for side in ("loop", "parts")]
    rows = []
    for each in result["networks"]:
        ratio, over = each["over_merged"], each["over_mixed"]
        values = [ratio.get("folded", "-"), *(ratio[side] for side in mixed), *(over.get(side, "-") for side in beside)]
        rows.append([each["network"], each["ms"]["merged"], *values])
    others = {key: value for key, value in options.items() if value != USUAL[key]}
    words = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in others.items()}
    return TEXT.format(
        arguments=" ".join(["--write", *(f"--{key} {value}" for key, value in words.items())]),
        hardware=machine(),
        batch=options["batch"],
        size=options["size"],
        rounds=options["rounds"],
        clock="" if torch.cuda.is_available() else "Times are processor time of one thread.",
        table=markdown_table([*head, *beside], rows),
        paired=PAIRED,
        switch=result["switch_ms"],
        held=held["adapters"],
        resident=held["resident_MB"],
        tensors=held["tensors_MB"],
        ratio=held["ratio"],
    )


if __name__ == "__main__":
    benchmark(__file__, __doc__, compare, page, **USUAL)
