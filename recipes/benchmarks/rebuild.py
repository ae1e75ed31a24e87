"""Measure time and memory of rebuilding a network from its adapter, against torch's own random initialisation.

    python recipes/benchmarks/rebuild.py [--write] [--architectures cifar_resnet110 resnet50]

Every figure comes from a process of its own, imports excluded; the two sides take turns, and what is printed is the
median of the ratios of neighbouring runs. Prints JSON, then a table.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.tables import markdown_table

RUNS = 5
CHILD = """
import ctypes, gc, json, sys, time
import timm
import bn_affine_adapters as b
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
side, architecture, folder = sys.argv[1:]
b.get_bn_only_model(timm.create_model("test_resnet"), b.BNOnlyConfig(seed=0))  # what is imported on first use
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, start = kilobytes("VmRSS"), time.perf_counter()
if side == "torch":
    model = timm.create_model(architecture)
else:
    model = b.load_bn_only_model(folder, verify="full" if side == "adapter" else "off")
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": 1024 * (kilobytes("VmHWM") - before)}))
"""


def measure(side: str, architecture: str, folder: str) -> dict[str, float]:
    """Return seconds and growth of peak resident memory, in bytes, of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, side, architecture, folder], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(architecture: str) -> dict[str, Any]:
    """Return the medians and the ratios to torch's initialisation for one architecture."""
    model = get_bn_only_model(timm.create_model(architecture), BNOnlyConfig(seed=0))
    size = sum(t.numel() * t.element_size() for t in model.merge_and_unload().state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        get_bn_only_model(timm.create_model(architecture), BNOnlyConfig(seed=0)).save_pretrained(folder)
        kilobytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1000
        rounds = [
            {side: measure(side, architecture, folder) for side in ("torch", "unverified", "adapter")}
            for _ in range(RUNS)
        ]

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "architecture": architecture,
        "model_bytes": size,
        "adapter_kilobytes": round(kilobytes, 1),
        "torch_seconds": median([r["torch"]["seconds"] for r in rounds]),
        "adapter_seconds": median([r["adapter"]["seconds"] for r in rounds]),
        "time_ratio": median([r["adapter"]["seconds"] / r["torch"]["seconds"] for r in rounds]),
        "unverified_time_ratio": median([r["unverified"]["seconds"] / r["torch"]["seconds"] for r in rounds]),
        "memory_over_model": median([r["adapter"]["bytes"] / size for r in rounds]),
        "torch_memory_over_model": median([r["torch"]["bytes"] / size for r in rounds]),
    }


def compare_all(architectures: list[str]) -> list[dict[str, Any]]:
    """Return what `compare` measures of each architecture."""
    return [compare(architecture) for architecture in architectures]


TEXT = """Written by `python recipes/benchmarks/rebuild.py --write`; {hardware}.

The adapter's side builds the architecture, redraws every weight from the seed, checks the sha256 of all of them and
loads the adapter. torch's side is `timm.create_model` with its own random initialisation. Each number is the median of
{runs} fresh processes, without imports. The sides take turns, and ratios compare neighbouring runs. Memory is the
growth of peak resident memory over the model's bytes.

{table}

Most of the verified time is SHAKE-128 and SHA-256 for large networks, and PEFT's passes over the modules for deep ones.
"""


def section(rows: list[dict[str, Any]]) -> str:
    """Return the section of docs/performance.md."""
    columns = {
        "architecture": "network",
        "adapter_kilobytes": "adapter, kB",
        "adapter_seconds": "seconds, verified",
        "time_ratio": "time / torch's init",
        "unverified_time_ratio": "unverified",
        "memory_over_model": "memory / model",
        "torch_memory_over_model": "torch's",
    }
    table = markdown_table(list(columns.values()), [[row[key] for key in columns] for row in rows])
    return TEXT.format(hardware=machine(), runs=RUNS, table=table)


if __name__ == "__main__":
    benchmark(__file__, __doc__, compare_all, section, architectures=["cifar_resnet110", "resnet50"])
