"""What a run ran on, for its result line, and the place of its figures in a page."""

import os
import platform
import re
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


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a Markdown page.

    Raises:
        ValueError: the page has no such place, or more than one.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    place = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    changed, count = place.subn(lambda _: f"\n{text.strip()}\n\n", page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page} has {count} places {begin} ... {end}")
    page.write_text(changed, encoding="utf-8")
