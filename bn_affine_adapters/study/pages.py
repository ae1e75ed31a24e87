"""Pages that a script writes: sections of Markdown, and the command line of the benchmarks that write theirs."""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
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


def benchmark(
    script: str,
    about: str | None,
    measure: Callable[..., Any],
    section: Callable[[Any], str],
    page: str = "performance.md",
    **defaults: Any,
) -> None:
    """Run a benchmark from the command line: print what it measures as one JSON line, then its section as Markdown.

    With --write, the section also replaces that of the script's name in a page of docs/.

    Args:
        script: its ``__file__``, in recipes/benchmarks.
        about: what ``--help`` prints.
        measure: takes the options.
        section: from what was measured to Markdown.
        page: of docs/, which has that section.
        defaults: of each option; False makes a flag, and a list takes one or more values.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "write": False}.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            one, many = (default[0], "+") if isinstance(default, list) else (default, None)
            parser.add_argument(f"--{name}", nargs=many, type=type(one), default=default)
    options = vars(parser.parse_args())
    write, path = options.pop("write"), Path(script).resolve()
    measured = measure(**options)
    print(json.dumps(measured, allow_nan=False))
    print(section(measured))
    if write:
        write_section(path.parents[2] / "docs" / page, path.stem, section(measured))


def machine() -> str:
    """Return the device of a benchmark and the versions of torch and timm."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, torch {torch.__version__}, timm {timm.__version__}"
