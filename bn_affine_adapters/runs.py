"""What a run ran on, for its result line."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .backbone import versions


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance(accelerator: Any, checkout: Path) -> dict[str, Any]:
    """Return what a run ran on: hardware, versions, and the commit of its script's checkout, if that is one."""
    cuda = accelerator.device.type == "cuda"
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return {
        "hardware": {
            "device": accelerator.device.type,
            "name": torch.cuda.get_device_name() if cuda else platform.machine(),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
    }
