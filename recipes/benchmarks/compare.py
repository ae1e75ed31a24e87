"""Compare two checkouts of this package: processor time of a training step, of saving and of loading, in one run.

    python recipes/benchmarks/compare.py OLD NEW [--rounds 15]

OLD and NEW are folders of checkouts. A process of each does the same work in turn, so that both meet the same machine;
printed is the median over the rounds of new time / old time, with its interquartile range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

WORK = r"""
import json, shutil, sys, tempfile, time, warnings
import timm, torch
from torch.nn import functional as F
from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def step(name, size, batch, **config):
    model = get_bn_only_model(timm.create_model(name, num_classes=10), BNOnlyConfig(seed=0, **config)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10

    def run():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def adapter(name):
    folder = tempfile.mkdtemp()
    model = get_bn_only_model(timm.create_model(name), BNOnlyConfig(seed=0))
    model.save_pretrained(folder)
    return model, folder


small, large = adapter("cifar_resnet14"), adapter("resnet50")
works = {
    "step, cifar_resnet14": step("cifar_resnet14", 32, 32),
    "step, cifar_resnet14, lean=exact": step("cifar_resnet14", 32, 32, lean="exact"),
    "step, resnet18, one norm layer of 20": step("resnet18", 64, 8, norm_layers=["bn1"]),
    "step, test_vit": step("test_vit", 160, 8),
    "load, cifar_resnet14": lambda: load_bn_only_model(small[1]),
    "load, resnet50": lambda: load_bn_only_model(large[1]),
    "save, resnet50": lambda: large[0].save_pretrained(tempfile.mkdtemp(dir=large[1])),
}
print(json.dumps(list(works)), flush=True)
for line in sys.stdin:
    start = time.process_time()
    works[line.strip()]()
    print(time.process_time() - start, flush=True)
"""


def start(folder: str) -> subprocess.Popen[str]:
    """Start the process that works with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WORK]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def timed(process: subprocess.Popen[str], name: str) -> float:
    """Have a process do some work once; return its processor seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    """Run all works in turn; print a ratio a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    pair = [start(folder) for folder in (options.old, options.new)]
    names = [json.loads(process.stdout.readline()) for process in pair if process.stdout is not None]
    assert names[0] == names[1]
    for name in names[0]:
        rounds = [[timed(process, name) for process in pair] for _ in range(options.rounds + 2)][2:]
        low, middle, high = statistics.quantiles([new / old for old, new in rounds], n=4)
        seconds = statistics.median(old for old, _ in rounds)
        print(f"{name:40} {middle:6.3f} ({low:.3f} to {high:.3f}) of {seconds:.4f} s", flush=True)
    for process in pair:
        process.kill()


if __name__ == "__main__":
    main()
