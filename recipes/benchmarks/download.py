"""Measure bytes and seconds to load a network from the Hub: as an adapter, and as its weights.

    python recipes/benchmarks/download.py [--write] [--architecture resnet50]

Both sides load from a Hub on loopback through the real client, each time in a fresh process with an empty cache,
imports excluded, the sides taking turns. Bytes are counted by the server, headers included.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.tables import markdown_table

RUNS = 3
SERVER = Path(__file__).parents[2] / "tests" / "hub" / "server.py"
CHILD = """
import sys, tempfile, time
import timm, torch
import bn_affine_adapters as b
side, architecture = sys.argv[1:]
if side == "push":
    from huggingface_hub import HfApi
    model = b.get_bn_only_model(timm.create_model(architecture), b.BNOnlyConfig(seed=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    model.train()(torch.randn(8, 3, 64, 64)).square().mean().backward()  # the initial constants would compress
    optimizer.step()
    model.push_to_hub("alice/adapter")
    folder = tempfile.mkdtemp()
    timm.models.save_for_hf(timm.create_model(architecture), folder, safe_serialization=True)
    HfApi().create_repo("alice/weights")
    HfApi().upload_folder(repo_id="alice/weights", folder_path=folder)
else:
    b.get_bn_only_model(timm.create_model("test_resnet"), b.BNOnlyConfig(seed=0))  # what is imported on first use
    start = time.perf_counter()
    if side == "adapter":
        b.load_bn_only_model("alice/adapter")
    else:
        timm.create_model("hf-hub:alice/weights", pretrained=True)
    print(time.perf_counter() - start)
"""


def child(side: str, architecture: str, endpoint: str, token: str) -> str:
    """Run one side in a fresh process with an empty cache; return the last line it printed."""
    with tempfile.TemporaryDirectory() as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": home, "HF_XET_CACHE": f"{home}/xet"}
        environment |= {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", CHILD, side, architecture]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def compare(architecture: str) -> dict[str, Any]:
    """Return the medians of bytes and seconds of both sides, and their ratios."""
    spec = spec_from_file_location("server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    server = module_from_spec(spec)
    spec.loader.exec_module(server)
    rounds: list[dict[str, tuple[int, float]]] = []
    with server.Hub() as hub:
        common = (architecture, hub.url, hub.token("alice"))
        child("push", *common)
        for _ in range(RUNS):
            rounds.append({})
            for side in ("adapter", "weights"):
                hub.requests.clear()
                seconds = float(child(side, *common))
                rounds[-1][side] = hub.bytes_sent()[1], seconds
    row: dict[str, Any] = {"architecture": architecture}
    for place, unit in enumerate(("bytes", "seconds")):
        for side in ("adapter", "weights"):
            row[f"{side}_{unit}"] = round(statistics.median(r[side][place] for r in rounds), 3)
        row[f"{unit}_ratio"] = round(statistics.median(r["adapter"][place] / r["weights"][place] for r in rounds), 5)
    return row


TEXT = """Written by `python recipes/benchmarks/download.py --write`;
huggingface_hub {client}, {hardware}.

Both sides load from a Hub on loopback with the real client, in a fresh process with an empty cache, without imports.
The adapter's side downloads two files, redraws the network and verifies it. The other side is
`timm.create_model("hf-hub:...", pretrained=True)`. The server counts the bytes, with headers, after the client's
compression. Medians of {runs} runs.

{table}

A loopback connection is faster than any network. On a network, add the bytes divided by its rate to the seconds.
"""


def section(row: dict[str, Any]) -> str:
    """Return the section of docs/performance.md."""
    head = ["network" if key == "architecture" else key.replace("_", ", ") for key in row]
    table = markdown_table(head, [list(row.values())])
    return TEXT.format(hardware=machine(), client=version("huggingface_hub"), runs=RUNS, table=table)


if __name__ == "__main__":
    benchmark(__file__, __doc__, compare, section, architecture="resnet50")
