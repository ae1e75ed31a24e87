"""Pages that a script writes: sections of Markdown, and what the benchmark scripts share to write theirs."""

import argparse
import os
import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch


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


def write_benchmark(script: str, text: str) -> None:
    """Replace the section of docs/performance.md that has the name of a script in recipes/benchmarks."""
    path = Path(script).resolve()
    write_section(path.parents[2] / "docs" / "performance.md", path.stem, text)


def benchmark_options(about: str | None, **defaults: Any) -> dict[str, Any]:
    """Return a benchmark's options from the command line, and ``write``: whether to write its section.

    Args:
        about: what ``--help`` prints.
        defaults: of each option; False makes a flag, and a list takes one or more values.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "write": False}.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", nargs="+", type=type(default[0]), default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return vars(parser.parse_args())


def machine() -> str:
    """Return the device of a benchmark and the versions of torch and timm."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, torch {torch.__version__}, timm {timm.__version__}"
