"""Time and memory of rebuilding a network from its adapter, against torch's own random initialisation.

    python recipes/benchmarks/rebuild.py [ARCHITECTURE ...]

Every figure comes from a process of its own, imports excluded; the two sides take turns, and what is printed is the
median of the ratios of neighbouring runs. One JSON line an architecture, then a table.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model

RUNS = 5
CHILD = """
import json, resource, sys, time
import timm, torch
import bn_affine_adapters as b
from bn_affine_adapters import backbone, draws
draws.quantiles()
side, architecture, folder = sys.argv[1:]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
timm.create_model("test_resnet")
before, start = peak(), time.perf_counter()
if side == "adapter": model = b.load_bn_only_model(folder)
elif side == "unverified": model = b.load_bn_only_model(folder, verify="off")
else: model = timm.create_model(architecture)
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak() - before}))
"""


def measure(side: str, architecture: str, folder: str) -> dict[str, float]:
    """Return seconds and growth of peak resident memory, in bytes, of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, side, architecture, folder], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(architecture: str) -> dict[str, float | str]:
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


def main(architectures: list[str]) -> None:
    """Print one JSON line an architecture, then the table."""
    rows = []
    for architecture in architectures:
        rows.append(compare(architecture))
        print(json.dumps(rows[-1]), flush=True)
    print("\n| network | adapter | seconds, verified | time / torch's init | unverified | memory / model | torch's |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['architecture']} | {r['adapter_kilobytes']} kB | {r['adapter_seconds']} | {r['time_ratio']} "
            f"| {r['unverified_time_ratio']} | {r['memory_over_model']} | {r['torch_memory_over_model']} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["cifar_resnet110", "resnet50"])
