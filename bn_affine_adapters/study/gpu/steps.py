"""Items that measure: a training step of each network in each way, and the path of the data."""

import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from ...adapter.method import BNOnlyConfig
from ...lean import LEVELS
from ...model.loading import get_bn_only_model
from ...training.feed import Feed
from ...training.options import DataOptions
from ...training.scripts import cores
from ..costs import peak_memory, seconds_of
from .options import Options

# network: batch, image size, bfloat16
NETWORKS = {
    "resnet50": (256, 224, True),
    "cifar_resnet110": (128, 32, False),
    "convnext_tiny": (128, 224, True),
    "vit_small_patch16_224": (256, 224, True),
}
TOY = {
    "test_resnet": (4, 32, True),
    "cifar_resnet14": (4, 32, False),
    "test_convnext": (4, 32, True),
    "test_vit": (4, 160, True),
}
# A compilation takes a minute: those come last.
WAYS = ("eager", "captured", *LEVELS, "exact captured"), ("compiled", "exact compiled")


def items(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the steps to measure: every network in every way."""
    networks = TOY if options.toy else NETWORKS
    return {
        f"{name} {way}": partial(measure, options, way, name, *networks[name])
        for ways in WAYS
        for name in networks
        for way in ways
    }


def feeds(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the paths of the data: from memory on the device, and streamed from workers."""
    return {"memory": partial(feed_memory, options), "streaming": partial(feed_streaming, options)}


def measure(options: Options, way: str, name: str, batch: int, size: int, half: bool) -> dict[str, Any]:
    """Return images a second and the peak of memory of a training step: forward, loss, backward and SGD."""
    device = options.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = training_step(way, name, batch, size, half, device)
    count, seconds = timed(captured(step, device) if "captured" in way else step, options)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory(step)[1]
    about = {"network": name, "way": way, "batch": batch, "size": size, "precision": "bf16" if half else "float32"}
    return {**about, "images_per_second": round(count * batch / seconds, 1), "peak_bytes": peak, "steps": count}


def training_step(way: str, name: str, batch: int, size: int, half: bool, device: str) -> Callable[[], None]:
    """Return a step of a network that trains gamma and beta, on fixed images."""
    level: Any = next((word for word in way.split() if word in LEVELS), None)
    base = timm.create_model(name).to(device, memory_format=torch.channels_last)
    model = get_bn_only_model(base, BNOnlyConfig(lean=level)).train()
    run = compiled(model, device) if "compiled" in way else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(base.num_classes, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled(model: nn.Module, device: str, fullgraph: bool = False) -> Any:
    """Return a compiled network; on a CPU its graph is traced and runs as it is."""
    return torch.compile(model, fullgraph=fullgraph, backend="inductor" if device == "cuda" else "aot_eager")


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Run a step three times, and return its replay from a CUDA graph; on a CPU, which has none, the step itself."""
    if device == "cpu":
        for _ in range(3):
            step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    return recorded.replay


def timed(step: Callable[[], Any], options: Options, least: float = 1.0) -> tuple[int, float]:
    """Return how many steps were timed together, for about ``least`` seconds, and their seconds."""
    seconds_of(step, 1 if options.toy else 3, options.device)
    count = 1 if options.toy else max(3, min(1000, int(least / seconds_of(step, 1, options.device))))
    return count, seconds_of(step, count, options.device)


def _feed(options: Options, **keys: Any) -> Feed:
    from accelerate import Accelerator

    dataset = "digits" if options.toy else options.data
    return Feed(DataOptions(dataset=dataset, flip=True, **keys), Accelerator())


def feed_memory(options: Options) -> dict[str, Any]:
    """Return images a second: decoded once into memory, and fed from there with crops and flips."""
    feed, start = _feed(options, crop_padding=4), time.perf_counter()
    feed.load()
    decoded = (len(feed.train.dataset) + len(feed.test.dataset)) / (time.perf_counter() - start)
    epochs, seconds = timed(lambda: [batch for batch in feed.epoch(0) if not len(batch.labels)], options)
    fed = epochs * len(feed.train.dataset) / seconds
    return {"decoded_images_per_second": round(decoded, 1), "fed_images_per_second": round(fed, 1)}


def feed_streaming(options: Options) -> dict[str, Any]:
    """Return images a second that workers decode, crop and resize to 224 pixels."""
    workers, size, count = (2, 32, 4) if options.toy else (min(16, cores()), 224, 40)
    batches = _feed(options, streaming=True, workers=workers, image_size=size).epoch(0)
    next(batches)  # the workers have started
    start = time.perf_counter()
    images = sum(len(batch.labels) for batch in islice(batches, count))
    rate = images / (time.perf_counter() - start)
    return {"workers": workers, "size": size, "streamed_images_per_second": round(rate, 1)}
