"""Memory, operations and time of a training step: full training, what else there is to save memory, lean training.

    python recipes/benchmarks/lean.py [--networks NAME ...] [--ways WAY ...] [--images BATCHxSIZE] [--precision bf16]
        [--rounds 5] [--steps 1] [--threads 1] [--compile [MODE]] [--out FILE] [--write] [--page [FILE]]

On a GPU if there is one, with the images and the precision that lean.yaml says. One JSON line a network, then a table.
--out appends each line to a file, and does not measure again what is there. --write does so with lean.jsonl beside this
script, and writes docs/performance.md and its figure from all the lines there; --page writes without measuring.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft
import timm
import torch
import yaml
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.lean import LEVELS, saved_bytes
from bn_affine_adapters.lean.backends import cpp, gpu
from bn_affine_adapters.norms.find import norm_layers
from bn_affine_adapters.study import figures as plots
from bn_affine_adapters.study.costs import largest, operations, peak_memory, runs_within, unsaved_buffers
from bn_affine_adapters.study.pages import write_section

HERE = Path(__file__).parent
DOCS, LINES = HERE.parents[1] / "docs", HERE / "lean.jsonl"
ABOUT: dict[str, Any] = yaml.safe_load((HERE / "lean.yaml").read_text(encoding="utf-8"))
NETWORKS: dict[str, Any] = ABOUT["networks"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = (4, 8, 16)  # GB


# The ways: each gets a network and returns what trains.


def plain(network: nn.Module) -> Any:
    """Freeze all but gamma and beta."""
    return get_bn_only_model(network, BNOnlyConfig())


def by_peft(network: nn.Module) -> Any:
    """Let PEFT freeze all but gamma and beta."""
    names = "|".join(map(re.escape, norm_layers(network)))  # as a pattern: of a list, PEFT takes the names as endings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a norm layer that is no LayerNorm is news to it, once a layer
        return peft.get_peft_model(network, peft.LNTuningConfig(target_modules=names))


def checkpointed(network: nn.Module) -> Any:
    """Freeze all but gamma and beta, and compute every block once more in backward."""
    base: Any = network
    if hasattr(base, "set_grad_checkpointing"):
        base.set_grad_checkpointing()
    else:
        for block in base.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return plain(network)


def lean(level: str, network: nn.Module) -> Any:
    """Freeze all but gamma and beta, and keep less for backward."""
    return get_bn_only_model(network, BNOnlyConfig(lean=level))  # type: ignore[arg-type]  # one of LEVELS


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "full": lambda network: network,
    "plain": plain,
    "peft": by_peft,
    "checkpointed": checkpointed,
    **{level: partial(lean, level) for level in LEVELS},
}
COMPILED = {f"{way}+compile": way for way in ("full", "plain", *LEVELS)}


# Measuring.


@dataclass(frozen=True)
class Job:
    """What is trained, and how often."""

    network: str
    batch: int
    size: int
    precision: str
    threads: int
    rounds: int
    steps: int  # of a turn
    compile: str | None


class Training:
    """A network as it trains in one way, on fixed images."""

    def __init__(self, job: Job, way: str) -> None:
        """Build it on the device, channels innermost."""
        torch.manual_seed(0)
        network = timm.create_model(job.network).to(DEVICE, memory_format=torch.channels_last)
        own = unsaved_buffers(network)
        self.job, self.classes = job, network.num_classes
        self.model = WAYS[COMPILED.get(way, way)](network).train()
        self.copies = unsaved_buffers(self.model) - own
        self.run = torch.compile(self.model, mode=job.compile) if way in COMPILED else self.model
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9)
        self.take(job.batch)

    def take(self, batch: int) -> "Training":
        """Take so many images from now on; return self."""
        self.images = self.labels = torch.empty(0)  # the old ones go first
        self.optimizer.zero_grad()
        images = torch.randn(batch, 3, self.job.size, self.job.size, device=DEVICE)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(self.classes, (batch,), device=DEVICE)
        return self

    def loss(self) -> Tensor:
        """Run forward."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.job.precision == "bf16"):
            return F.cross_entropy(self.run(self.images), self.labels)

    def step(self) -> None:
        """Run forward, loss, backward and SGD."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # last: gradients are memory that the step needs, not the network

    def seconds(self) -> float:
        """Return how long a step takes, to the end of what it launched."""
        finish = torch.cuda.synchronize if DEVICE == "cuda" else bool
        finish()
        start = time.perf_counter()
        for _ in range(self.job.steps):
            self.step()
        finish()
        return (time.perf_counter() - start) / self.job.steps


def peaks(job: Job, way: str) -> list[tuple[int, int, int]]:
    """Return (batch, bytes before a step, bytes at most in it) in this process, for half the batch and all of it."""
    training, found = Training(job, way), []
    for batch in [job.batch] if way in COMPILED else [max(1, job.batch // 2), job.batch]:
        found.append((batch, *peak_memory(training.take(batch).step, DEVICE)))
    return found


def peaks_apart(job: Job, ways: Sequence[str]) -> list[list[tuple[int, int, int]]]:
    """Return `peaks` of each way in a process of its own, in which freed memory goes back at once."""
    command = [sys.executable, __file__, "--peaks", json.dumps([asdict(job), ways])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(job: Job, ways: Sequence[str]) -> list[Any]:
    """Return what `peaks_apart` asks for, from a process that has imported everything and done nothing yet."""
    with get_context("fork").Pool(1, torch.set_num_threads, (job.threads,), maxtasksperchild=1) as pool:
        return pool.starmap(peaks, [(job, way) for way in ways], chunksize=1)


def on_a_line(points: Sequence[Sequence[int]], size: float) -> int:
    """Return the batch at which a straight line through the peaks of two batches reaches so many bytes."""
    (small, _, low), (batch, _, high) = points
    return max(0, int(batch + (size - high) * (batch - small) / (high - low)))


def memory(job: Job, way: str, points: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the bytes before a step, how many more it needs, and the largest batch by GB."""
    found: dict[str, Any] = {"before": points[-1][1], "peak": points[-1][2] - points[-1][1]}
    if way not in COMPILED and DEVICE == "cpu":
        found["largest"] = [on_a_line(points, limit * 1e9) for limit in LIMITS]
    elif way not in COMPILED:
        training = Training(job, way)

        def fits(gb: int, batch: int) -> bool:
            return runs_within(lambda: training.take(batch).step(), gb * 1e9)

        found["largest"] = [largest(partial(fits, limit)) for limit in LIMITS]
    return found


def measure(job: Job, ways: Sequence[str]) -> dict[str, Any]:
    """Return all that is measured of a network, as a JSON line."""
    points = peaks_apart(job, ways) if DEVICE == "cpu" else [peaks(job, way) for way in ways]
    found = {way: memory(job, way, of) for way, of in zip(ways, points, strict=True)}
    trainings = {way: Training(job, way) for way in ways}  # after that: now all are there
    for way, training in trainings.items():
        training.step()
        found[way] |= {"saved": saved_bytes(training.model, training.loss)[1], "copies": training.copies, "seconds": []}
        if way not in COMPILED:
            found[way]["operations"] = operations(training.step)
    for turn in range(-1, job.rounds):  # before the first, a rehearsal
        for way in (*ways[turn % len(ways) :], *ways[: turn % len(ways)]):  # none is always first
            found[way]["seconds"].append(trainings[way].seconds())
    for of in found.values():
        del of["seconds"][0]
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = {module.__name__: module.__version__ for module in (torch, timm, peft)}
    there = {"device": DEVICE, "machine": machine, "versions": versions}
    return {**asdict(job), **there, "native": bool(cpp.loaded or gpu.loaded), "ways": found}


def ratio(line: dict[str, Any], way: str, measure: str, to: str = "full") -> float | None:
    """Return a measure's ratio to another way's, of seconds the median over rounds; None where one is not there."""
    one, other = (line["ways"].get(name, {}).get(measure) for name in (way, to))
    if one is None or other is None:
        return None
    return statistics.median(a / b for a, b in zip(one, other, strict=True)) if measure == "seconds" else one / other


# The page.


def rows(line: dict[str, Any]) -> list[list[str]]:
    """Return the table's rows of a line, a way each."""
    found = []
    for way, of in line["ways"].items():
        pairs = [(measure, "full") for measure in ("saved", "peak", "operations", "seconds")] + [("seconds", "plain")]
        ratios = [ratio(line, way, *pair) for pair in pairs]
        shown = ["-" if value is None else f"{value:.3f}" for value in ratios]
        copies, saved, peak = (f"{of[key] / 1e6:.1f}" for key in ("copies", "saved", "peak"))
        what = [line["network"], f"{line['batch']} x {line['size']} px", way, copies, saved, shown[0], peak]
        found.append([*what, *shown[1:], f"{line['batch'] / statistics.median(of['seconds']):.4g}"])
    return found


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Return lines as a Markdown table."""
    head = (
        "network|images|way|copies, MB|saved, MB|/ full|peak, MB|/ full|operations / full|time / full|/ plain|images/s"
    )
    cells = [head.split("|"), *(row for line in lines for row in rows(line))]
    text = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([text[0], "|---" * len(cells[0]) + "|", *text[1:]])


def verdicts(lines: Iterable[dict[str, Any]], device: str) -> list[list[str]]:
    """Return a row a target: network, way, measure, to which way, the bound, what was measured, and whether it holds.

    Only lines of the images and the precision that lean.yaml says are judged.
    """
    images = {name: tuple(of[device]) for name, of in NETWORKS.items()}
    meant = [line for line in lines if (line["device"], line["precision"]) == (device, ABOUT["precision"][device])]
    known = {x["network"]: x for x in meant if images.get(x["network"]) == (x["batch"], x["size"])}
    found = []
    for target in ABOUT["targets"][device]:
        for network in [target["network"]] if target["network"] else NETWORKS:
            for way, bound in target["bounds"].items():
                value = ratio(known.get(network, {"ways": {}}), way, target["measure"], target["to"])
                said = ("-", "not measured") if value is None else (f"{value:.3f}", "yes" if value <= bound else "no")
                found.append([network, way, ABOUT["measures"][target["measure"]], target["to"], f"{bound:.2f}", *said])
    return found


def page(lines: Sequence[dict[str, Any]]) -> str:
    """Return the section of docs/performance.md: the same lines make the same text."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "lean_template.md").read_text(encoding="utf-8"))
    here = {device: [line for line in lines if line["device"] == device] for device in ("cuda", "cpu")}
    measured = {device: found for device, found in here.items() if found}
    return template.render(measured=measured, about=ABOUT, table=table, verdicts=verdicts, limits=LIMITS)


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw saved bytes against time, a panel a device."""
    panels = []
    for device in sorted({line["device"] for line in lines}):
        points: Any = {
            line["network"]: {way: (ratio(line, way, "seconds"), ratio(line, way, "saved")) for way in line["ways"]}
            for line in lines
            if line["device"] == device
        }
        panels.append(partial(plots.memory_against_time, points=points, title=ABOUT["devices"][device]["title"]))
    plots.save(file, panels)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file: of each network on each device the last, in the order of lean.yaml."""
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    last = {(line["network"], line["device"], line["precision"]): line for line in lines}
    names = list(NETWORKS)
    return sorted(last.values(), key=lambda x: names.index(x["network"]) if x["network"] in names else len(names))


def write(lines: Sequence[dict[str, Any]], docs: Path) -> None:
    """Write the page's section and the figure."""
    write_section(docs / "performance.md", "lean", page(lines))
    if lines:
        draw(lines, docs / "figures" / "lean.svg")


def main(arguments: list[str]) -> None:
    """Print one JSON line a network, then the table; append and write as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="besides full and plain")
    parser.add_argument("--images", type=lambda text: [int(part) for part in text.split("x")], metavar="BATCHxSIZE")
    parser.add_argument("--precision", choices=("float32", "bf16"), default=ABOUT["precision"][DEVICE])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default={"cpu": 1, "cuda": 20}[DEVICE], help="of a turn")
    parser.add_argument("--threads", type=int, default={"cpu": 1}.get(DEVICE, torch.get_num_threads()))
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="also through torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--page", type=Path, nargs="?", const=LINES, metavar="FILE")
    parser.add_argument("--peaks", type=json.loads, help=argparse.SUPPRESS)  # what `peaks_apart` asks for
    given = parser.parse_args(arguments)
    if given.page:
        return write(read(given.page), DOCS)
    if given.peaks:
        return print(json.dumps(answer(Job(**given.peaks[0]), given.peaks[1])))
    torch.set_num_threads(given.threads)
    ways = [way for way in WAYS if way in ("full", "plain", *given.ways)]  # to which the ratios are, whatever is asked
    ways += [name for name, way in COMPILED.items() if given.compile and way in ways]
    out, lines = given.out or (LINES if given.write else None), []
    for network in given.networks:
        images = given.images or NETWORKS.get(network, {}).get(DEVICE) or parser.error(f"{network} needs --images")
        job = Job(network, *images, *(getattr(given, key.name) for key in fields(Job)[3:]))
        there = [x for x in (read(out) if out else []) if x["device"] == DEVICE and asdict(job).items() <= x.items()]
        lines += [x for x in there if set(x["ways"]) >= set(ways)] or [measure(job, ways)]
        print(json.dumps(lines[-1]), flush=True)
        if out and lines[-1] not in there:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))
    if given.write:
        write(read(out or LINES), DOCS)


if __name__ == "__main__":
    main(sys.argv[1:])
