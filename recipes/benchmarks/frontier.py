"""Accuracy against the bytes of the file that is shared: measure runs and baselines, write docs/frontier.md's sections.

    python recipes/benchmarks/frontier.py measure RUN [RUN ...] [--bits 8] [--dataset FOLDER]
    python recipes/benchmarks/frontier.py cnn WIDTH [WIDTH ...] [--recipe digits KEY=VALUE ...] [--seeds 3]
    python recipes/benchmarks/frontier.py lora RANK [RANK ...] [--recipe digits KEY=VALUE ...] [--seeds 3]
    python recipes/benchmarks/frontier.py write

A RUN is the output folder of `bn-adapters train`; its adapter is written as a compact file, loaded again, verified and
tested. A mask is measured as its folder: adapter_config.json and adapter_model.safetensors. A RUN may also be a file of
result lines, whose adapters were not kept: the accuracy is then that in float32, and the bytes are those of a compact
file with the same layers. `cnn` trains a small network of three convolutions whole; `lora` trains PEFT's LoRA of that
rank beside the drawn weights of cifar_resnet14. Both are folded, rounded to 8 bits and written in the layout of a
compact file. A line that is in recipes/results/frontier/points.jsonl is not measured again.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import peft
import timm
import torch
from accelerate import Accelerator
from ideas import fit  # type: ignore[import-not-found]  # the script beside this one
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, reinit_
from bn_affine_adapters.adapter.fold import fold_
from bn_affine_adapters.sharing.compact import Rounded, as_file, payload_bytes
from bn_affine_adapters.study import figures as plots
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.study.paper import PAPER
from bn_affine_adapters.training.feed import Feed, accuracy
from bn_affine_adapters.training.lines import append, read_results
from bn_affine_adapters.training.recipe import CONDITIONS, FULL_CONDITIONS, Recipe, command
from bn_affine_adapters.training.tables import markdown_table
from bn_affine_adapters.training.train import read_recipe
from bn_affine_adapters.training.validate import read_options, run, sample

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"
POINTS, IDEAS, LITERATURE = (RESULTS / "frontier" / name for name in ("points.jsonl", "ideas.jsonl", "literature.json"))
PAGE, FIGURE = ROOT / "docs" / "frontier.md", ROOT / "docs" / "figures" / "frontier.svg"
BUDGETS = (1_000, 2_000, 5_000, 10_000, 50_000)
KEY = ("data", "what", "network", "bits", "seed", "schedule")
KINDS = {"cnn": "small CNN, trained whole: 3 convolutions, width {}", "lora": "LoRA: cifar_resnet14, rank {}"}
DATA = ("digits", "fashion_mnist", "cifar10")
HEADER = 480  # bytes of a compact file of the digits besides steps and codes
PAPER_SOURCE = "the paper, arXiv 2003.00152, figure 2; bytes as of our files"


def measured(folder: Path, bits: int, dataset: str | None) -> dict[str, Any]:
    """Return the line of a run's adapter, in a file of so many bits a value; the data set's folder, if it is one."""
    result = json.loads((folder / "result.json").read_text())
    recipe, adapter = result["recipe"], folder / "adapter"
    data = dataset or recipe["dataset"]
    size = "".join(f", {key} {value}" for key, value in recipe["model_args"].items())
    line = named(recipe, recipe["condition"], recipe["model"] + size)
    line |= {"trained": result["trained"], "float32": result["top1"], "command": result["command"]}
    if "mask" in recipe["condition"]:
        sizes = [(adapter / f"adapter_{name}").stat().st_size for name in ("config.json", "model.safetensors")]
        top1 = run(read_options([str(adapter), f"dataset={data}"]))["top1"]
        return {**line, "bits": 1, "bytes": sum(sizes), "top1": top1}
    shape = len(recipe["mean"]), recipe["image_size"], recipe["image_size"]
    images = sample(str(adapter), data, 400)[0] if bits < 8 else torch.zeros(1, *shape)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
        file = export(load_bn_only_model(adapter), Path(scratch, "x"), format="compact", bits=bits, images=images)
        top1 = run(read_options([str(file), f"dataset={data}"]))["top1"]
        return {**line, "bits": bits, "bytes": file.stat().st_size, "top1": top1}


def as_reported(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of runs without adapters."""
    for result in read_results(file):
        recipe, condition = result["recipe"], result["recipe"]["condition"]
        if condition in FULL_CONDITIONS or recipe["weight_decay"] != Recipe.weight_decay:
            continue
        network = timm.create_model(recipe["model"], num_classes=10)
        config = BNOnlyConfig(seed=recipe["seed"], label_names=[str(i) for i in range(10)], **CONDITIONS[condition])
        config.data_config = read_recipe(["cifar10"]).data_config
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
            model = get_bn_only_model(network, config).eval()
            size = export(model, Path(scratch, "x"), format="compact", images=torch.zeros(1, 3, 32, 32)).stat().st_size
        known = named(recipe, condition, recipe["model"])
        found = {"trained": result["trained"], "float32": result["top1"], "bits": 8, "bytes": size}
        yield {**known, **found, "top1": result["top1"], "command": result["command"]}


def named(recipe: dict[str, Any], what: str, network: str) -> dict[str, Any]:
    """Return what tells a line from others."""
    schedule = f"{recipe['epochs']} epochs, {recipe['image_size']} pixels"
    data = Path(recipe["dataset"]).name
    return {"data": data, "what": what, "network": network, "seed": recipe["seed"], "schedule": schedule}


def small_cnn(width: int, classes: int) -> nn.Sequential:
    """Return three convolutions with BatchNorm and ReLU, of width, 2 x and 3 x width filters, and a linear head."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 3 * width, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * width, classes))


def folded(network: nn.Module) -> nn.Module:
    """Return a small CNN with each BatchNorm in the convolution in front of it."""
    layers = [*network.eval().children()]
    pairs = zip(layers, [*layers[1:], None], strict=True)
    fused = [
        fuse_conv_bn_eval(a, b) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d) else a for a, b in pairs
    ]
    return nn.Sequential(*(layer for layer in fused if not isinstance(layer, nn.BatchNorm2d)))


def lora(rank: int, seed: int, classes: int) -> nn.Module:
    """Return cifar_resnet14 with the weights of a seed, gamma 1, beta 0, and LoRA beside each convolution."""
    network = reinit_(timm.create_model("cifar_resnet14", num_classes=classes), seed, norm_init="ones")
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    return peft.get_peft_model(network, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=convs))


def round_(tensors: Sequence[torch.Tensor], recipe: Recipe, what: str) -> int:
    """Round tensors in place to 8 bits on a grid of their own; return the bytes of their file."""
    for tensor in tensors:
        step = np.float16(max(float(tensor.abs().max()) / 127, 2.0**-24))
        codes = (tensor / float(step)).round().clamp(-128, 127).add(128).numpy().astype(np.uint16)
        tensor.copy_(torch.from_numpy(Rounded(codes, np.array([step])).values(8)))
    size = 64 + payload_bytes([tensor.numel() for tensor in tensors], 8)  # as many bytes of digests as in ours
    settings = {"architecture": what, "seed": recipe.seed, "data_config": recipe.data_config}
    return len(as_file({**settings, "label_names": [str(i) for i in range(10)]}, bytes(size), 8))


def baseline(kind: str, size: int, recipe: Recipe) -> dict[str, Any]:
    """Train a baseline by a recipe; return what came out."""
    feed = Feed(recipe, Accelerator(cpu=True))
    torch.manual_seed(recipe.seed or 0)
    classes = len(feed.label_names)
    network = small_cnn(size, classes) if kind == "cnn" else lora(size, recipe.seed or 0, classes)
    fit(network.to(memory_format=feed.format), feed, recipe, {}, None)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    exact = accuracy(network.eval(), feed)["top1"]
    with torch.no_grad():
        if kind == "cnn":
            network = folded(network)
            tensors = [*network.parameters()]
        else:
            norms: dict[str, nn.Module] = {
                name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)
            }
            fold_(norms)
            trained_ones = [p for p in network.parameters() if p.requires_grad]
            tensors = [*trained_ones, *(p for norm in norms.values() for p in norm.parameters())]
        made = round_(tensors, recipe, f"{kind} {size}")
    words = command(replace(recipe, seed=0, data_seed=0), read_recipe([])).removeprefix("bn-adapters train")
    top1 = accuracy(network, feed)["top1"]
    found = {"trained": trained, "float32": round(exact, 4), "bits": 8, "bytes": made, "top1": round(top1, 4)}
    return {**found, "command": f"python recipes/benchmarks/frontier.py {kind} {size} --recipe digits{words}"}


def groups(lines: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return lines by everything but the seed."""
    found = defaultdict(list)
    for line in lines:
        found[tuple(line[key] for key in KEY if key != "seed")].append(line)
    return dict(found)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def rows(lines: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield a row for each group of one data set, from the smallest file on."""
    for (_, what, network, bits, schedule), own in sorted(groups(lines).items(), key=lambda e: e[1][0]["bytes"]):
        size = max(line["bytes"] for line in own)
        yield [what, network, bits, f"{size:,}", spread([line["top1"] for line in own]), len(own), schedule]


def records(lines: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield the most accurate drawn network for each budget, and the most accurate of all, by the mean of its seeds."""
    for budget in BUDGETS:
        for whose, among in (("drawn weights, verified", CONDITIONS), ("trained whole", KINDS["cnn"].split(": "))):
            found = [own for key, own in groups(lines).items() if key[1] in among]
            found = [own for own in found if len(own) > 1 and max(line["bytes"] for line in own) <= budget]
            if not found:
                yield [f"{budget:,}", whose, "-", "-", "none", 0]
                continue
            best = max(found, key=lambda own: statistics.mean(line["top1"] for line in own))
            size = max(line["bytes"] for line in best)
            how = f"`{best[0]['command']}`, {best[0]['bits']} bits"
            yield [f"{budget:,}", whose, spread([line["top1"] for line in best]), f"{size:,}", how, len(best)]


def literature() -> list[dict[str, Any]]:
    """Return what others report: the committed points, and the paper's BN-only accuracies at our file's size."""
    points = json.loads(LITERATURE.read_text())
    for condition, what in (("bn", ""), ("bn, norm_init=ones_beta_one", ", beta 1")):
        for network, top1 in PAPER["accuracy"][condition].items():
            size = PAPER["networks"][network]["bn"]
            label = f"{PAPER['networks'][network]['label']}, BN only{what}"
            layers = int(re.findall(r"\d+", network)[0]) + 1  # with norm layers; 14 in cifar_wrn14_2 too
            about = HEADER + size + 4 * layers  # two tensors a layer, with a step of 2 bytes each
            points.append({"name": label, "top1": top1, "bytes": about, "source": PAPER_SOURCE})
    return sorted(points, key=lambda point: point["bytes"])


def ideas() -> str:
    """Return the table of ideas, from the best on."""
    lines = [json.loads(line) for line in IDEAS.read_text().splitlines()]
    by = defaultdict(list)
    for line in lines:
        by[line["idea"], line["confirm"]].append(line)
    plain = {c: {(x["seed"], x["epochs"]): x["top1"] for x in by.get(("plain", c), [])} for c in (False, True)}
    table = []
    for idea in dict.fromkeys(line["idea"] for line in lines):
        row: list[Any] = [idea]
        for confirm in (False, True):
            own = by.get((idea, confirm), [])
            gains = [x["top1"] - plain[confirm].get((x["seed"], x["epochs"]), float("nan")) for x in own]
            gain = f"{round(statistics.mean(gains), 2) + 0.0:+.2f}" if own else "-"
            row += [spread([x["top1"] for x in own]) if own else "-", gain, len(own)]
        table.append(row)
    table.sort(key=lambda row: -float(str(row[1]).split()[0].replace("-", "0")))
    return markdown_table(["idea", "held out, %", "gain", "n", "test, %", "gain", "n"], table)


def best_of_seeds() -> str:
    """Return what choosing among the seeds of `plain` on held-out images buys on the test images."""
    lines = [json.loads(line) for line in IDEAS.read_text().splitlines()]
    held, test = (
        {line["seed"]: line for line in lines if line["idea"] == "plain" and line["confirm"] == confirm}
        for confirm in (False, True)
    )
    if len(both := held.keys() & test.keys()) < 2:
        return "Not measured yet."
    best = max(both, key=lambda seed: (held[seed]["top1"], -held[seed]["loss"]))
    mean = spread([test[seed]["top1"] for seed in both])
    chosen = f"seed {best}, which is the best on held-out images, has {test[best]['top1']:.2f} %"
    return f"Of {len(both)} seeds, {chosen} on the test images; all of them have {mean} %."


def figure(lines: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy against bytes: a panel for each data set, what others report as hollow marks."""
    data = [name for name in DATA if any(line["data"] == name for line in lines)]
    kinds = [*dict.fromkeys(line["what"] for line in lines)]
    plots.save(FIGURE, [partial(panel, name, kinds, lines, theirs if name == "cifar10" else ()) for name in data])


def panel(
    name: str, kinds: Sequence[str], lines: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], ax: Any
) -> None:
    """Draw the points of a data set: a colour for each kind of what trains."""
    for color, kind in zip(plots.COLORS, kinds, strict=False):
        own = groups([line for line in lines if line["data"] == name and line["what"] == kind]).values()
        xs = [max(line["bytes"] for line in each) for each in own]
        ys = [statistics.mean(line["top1"] for line in each) for each in own]
        ax.plot(xs, ys, "o", color=color, label=kind)
    for mark, label, paper in (("s", "reported: BN only, the paper", True), ("^", "reported: others", False)):
        shown = [point for point in theirs if (point["source"] == PAPER_SOURCE) == paper]
        places = [point["bytes"] for point in shown], [point["top1"] for point in shown]
        ax.plot(*places, mark, color="grey", markerfacecolor="none", label=label)
    ax.set(xscale="log", xlim=(700, 90_000), xlabel="bytes of the file", ylabel="test accuracy, %", title=name)
    ax.set_xticks(BUDGETS, [f"{budget // 1000} kB" for budget in BUDGETS])
    ax.minorticks_off()


def write() -> None:
    """Write the sections of the page and the figure from the committed lines."""
    lines = [json.loads(line) for line in POINTS.read_text().splitlines()]
    head = ["what trains", "network", "bits", "bytes", "accuracy, %", "n", "schedule"]
    for name in dict.fromkeys(line["data"] for line in lines):
        own = [line for line in lines if line["data"] == name]
        write_section(PAGE, name.replace("_", "-"), markdown_table(head, rows(own)))
    digits = [line for line in lines if line["data"] == "digits"]
    budgets = ["budget, bytes", "record of", "accuracy, %", "file, bytes", "command", "n"]
    write_section(PAGE, "records", markdown_table(budgets, records(digits)))
    theirs = literature()
    table = [[p["name"], f"{p['bytes']:,}", p["top1"], p["source"]] for p in theirs]
    write_section(PAGE, "reported", markdown_table(["network", "bytes", "accuracy, %", "source"], table))
    if IDEAS.exists():
        write_section(PAGE, "ideas", ideas())
        write_section(PAGE, "seeds", best_of_seeds())
    figure(lines, theirs)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "cnn", "lora", "write"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--recipe", nargs="+", default=["digits"])
    parser.add_argument("--dataset", help="folder of the data set, where a run's was one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=POINTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "write":
        return write()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = options.output.read_text() if options.output.exists() else ""
    done = {tuple(json.loads(line)[key] for key in KEY) for line in text.splitlines()}
    for name in options.names:
        for line in new_lines(name, options, done):
            append(options.output, line)
            print(json.dumps(line), flush=True)


def new_lines(name: str, options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run or a baseline that are not there yet."""
    if options.what == "measure":
        folder = Path(name)
        lines = as_reported(folder) if folder.is_file() else [measured(folder, options.bits, options.dataset)]
        for line in lines:
            key = tuple(line[key] for key in KEY)
            if key not in done:
                done.add(key)
                yield line
        return
    for seed in range(options.seeds):
        recipe = read_recipe([*options.recipe, f"seed={seed}", f"data_seed={seed}"])
        title = KINDS[options.what].format(name)
        known = named(vars(recipe), *title.split(": "))
        if tuple({**known, "bits": 8}[key] for key in KEY) not in done:
            yield {**known, **baseline(options.what, int(name), recipe)}


if __name__ == "__main__":
    main()
