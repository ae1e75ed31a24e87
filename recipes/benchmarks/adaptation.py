"""Measure what adapting to corrupted images without labels gains, and what happens where Tent collapses.

    python recipes/benchmarks/adaptation.py DATA WEIGHTS [--write] [--page]

DATA is CIFAR-10 as Hugging Face's datasets read it; WEIGHTS a safetensors file of the CIFAR ResNet-20 with option A
shortcuts of github.com/akamaster/pytorch_resnet_cifar10, which is no network of timm. Its adapter is adapted to the
same images that it is then asked about, as in Tent's paper. A draw is 512 test images that no other draw has; Tent's
settings and the guard's bound were chosen on the first 400 images of the test split, which no draw has. Results are
appended to adaptation.jsonl beside this script; what is there is not measured again. --write also writes
docs/adaptation.md; --page writes it from the file and measures nothing.
"""

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from bn_affine_adapters import BNOnlyConfig, adapt_to, get_bn_only_model
from bn_affine_adapters.errors import CollapseError
from bn_affine_adapters.model.images import normaliser
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table

RESULTS, PAGE = Path(__file__).with_suffix(".jsonl"), Path(__file__).parents[2] / "docs" / "adaptation.md"
DRAWS, IMAGES, BATCH = 5, 512, 64
FIRST = 1000  # test image of the first draw
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's distribution, 95 %, by the number of draws
TENT: dict[str, Any] = {"lr": 5e-3, "epochs": 1}
COLLAPSE: dict[str, Any] = {"lr": 0.3, "epochs": 5, "entropy": 1.0}
STRENGTHS = {"brightness": (0.1, 0.2, 0.3), "blur": (0.6, 0.9, 1.2), "noise": (0.04, 0.08, 0.12)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """A basic block, whose shortcut has no parameters: every second pixel, and zero channels on both sides."""

    def __init__(self, inside: int, outside: int) -> None:
        """Make the layers."""
        super().__init__()
        self.stride, self.pad = outside // inside, (outside - inside) // 2
        self.conv1 = nn.Conv2d(inside, outside, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return (out + shortcut).relu()


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al., 2015, section 4.2."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inside, outside), Block(outside, outside), Block(outside, outside))
            for inside, outside in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def corrupted(images: Tensor, kind: str, strength: float, seed: int) -> Tensor:
    """Return images, values 0 to 1, brighter, blurred by a Gaussian of so many pixels, or with Gaussian noise."""
    if kind == "brightness":
        images = images + strength
    elif kind == "blur":
        images = gaussian_blur(images, [7, 7], [strength, strength])
    else:
        images = images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return ((images * 255).round() / 255).clamp(0, 1)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Tensor], labels: Tensor) -> float:
    """Return the accuracy in %, in evaluation mode."""
    found = torch.cat([model.eval()(images).argmax(1) for images in batches])
    return 100 * int((found == labels).sum()) / len(labels)


def largest_share(model: nn.Module, batches: list[Tensor]) -> float:
    """Return the share of the most frequent class among the predictions, in %."""
    with torch.no_grad():
        found = torch.cat([model.eval()(images).argmax(1) for images in batches])
    return 100 * float(found.bincount().max()) / len(found)


def compared(network: nn.Module, batches: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Return the accuracy before, and of each method."""
    model = get_bn_only_model(copy.deepcopy(network), BNOnlyConfig())
    found = {"before": accuracy(model, batches, labels)}
    for method, options in (("statistics", {}), ("tent", TENT)):
        done = adapt_to(model, batches, method, **options)  # type: ignore[arg-type]
        found[method] = accuracy(model, batches, labels)
        done.reset()
    return found


def collapsing(network: nn.Module, batches: list[Tensor], labels: Tensor) -> dict[str, Any]:
    """Return what Tent does with a learning rate that is too large and no bound on the entropy: watched, and not."""
    model = get_bn_only_model(copy.deepcopy(network), BNOnlyConfig())
    found: dict[str, Any] = {"before": accuracy(model, batches, labels), "share": largest_share(model, batches)}
    try:
        adapt_to(model, batches, "tent", **COLLAPSE)
    except CollapseError as error:
        found["said"] = f"{error.what} {error.seen}"
    found["restored"] = accuracy(model, batches, labels)
    adapt_to(model, batches, "tent", **COLLAPSE, collapse=1.0)
    return found | {"unwatched": accuracy(model, batches, labels), "largest": largest_share(model, batches)}


def measure(data: str, weights: str) -> None:
    """Measure what the file does not have yet."""
    import datasets

    columns = (
        datasets.load_dataset(data, split="test").select(range(FIRST, FIRST + DRAWS * IMAGES)).with_format("torch")
    )
    pixels, labels = torch.stack(list(columns["img"])).float() / 255, torch.as_tensor(columns["label"])
    network = ResNet20()
    network.load_state_dict(load_file(weights))
    normalise = normaliser(MEAN, STD)
    known = {(line["kind"], line["strength"], line["draw"]) for line in read()}
    cells = [(kind, strength) for kind, strengths in STRENGTHS.items() for strength in strengths]
    plan = [(*cell, draw) for draw in range(DRAWS) for cell in cells] + [("collapse", 0.12, draw) for draw in range(2)]
    for kind, strength, draw in plan:
        if (kind, strength, draw) in known:
            continue
        own = slice(draw * IMAGES, (draw + 1) * IMAGES)
        changed = corrupted(pixels[own], "noise" if kind == "collapse" else kind, strength, draw)
        run: Callable[..., Any] = collapsing if kind == "collapse" else compared
        found = run(network.eval(), list(normalise(changed * 255).split(BATCH)), labels[own])
        line = json.dumps({"kind": kind, "strength": strength, "draw": draw, **found})
        with RESULTS.open("a") as file:
            file.write(f"{line}\n")
        print(line, flush=True)


def read() -> list[dict[str, Any]]:
    """Return the result lines."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval."""
    return statistics.mean(values), T[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def page(lines: list[dict[str, Any]]) -> str:
    """Return the tables as Markdown."""
    rows: list[list[str]] = []
    clear: set[str] = set()
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            cell = [line for line in lines if (line["kind"], line["strength"]) == (kind, strength)]
            row = [kind, f"{strength:g}", f"{statistics.mean(line['before'] for line in cell):.1f}"]
            for method in ("statistics", "tent"):
                mean, half = interval([line[method] - line["before"] for line in cell])
                row += [f"{statistics.mean(line[method] for line in cell):.1f}", f"{mean:+.1f} ± {half:.1f}"]
                clear |= {f"{kind} {strength:g} ({method})"} if mean > half else set()
            rows.append(row)
    collapses: list[list[str]] = []
    for line in (line for line in lines if line["kind"] == "collapse"):
        numbers = [line[key] for key in ("before", "restored", "unwatched", "share", "largest")]
        collapses.append([str(line["draw"] + 1), *(f"{number:.1f}" for number in numbers)])
    said = next(line["said"] for line in lines if "said" in line)
    return "\n".join([
        f"Accuracy in %, mean of {DRAWS} draws of {IMAGES} test images of CIFAR-10; the gain in percentage points with",
        f"its 95 % interval. Tent: {', '.join(f'{k}={v:g}' for k, v in TENT.items())}, batches of {BATCH}; chosen on",
        "other images of the test split.",
        f"The gain excludes 0 in {len(clear)} of {2 * len(rows)} cases.\n",
        markdown_table(["corruption", "strength", "before", "statistics", "gain", "tent", "gain"], rows),
        f"\nTent on noise of 0.12 with {', '.join(f'{k}={v:g}' for k, v in COLLAPSE.items())}: all images",
        "count, and the learning rate is too large. Accuracy and shares in %. The guard says, in the first draw:\n",
        f"> {said}\n",
        markdown_table(["draw", "before", "watched", "not watched", "most frequent: before", "not watched"], collapses),
    ])  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the page from the file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of a base that nothing tells the origin of
    torch.set_num_threads(1)
    if not options.page:
        measure(options.data, options.weights)
    print(page(read()))
    if options.write or options.page:
        write_section(PAGE, "adaptation", page(read()))


if __name__ == "__main__":
    main()
