"""Check that this package works on a GPU, measure it there, and train what the reproduction lacks.

    bn-adapters gpu-check --minutes 9 --out FOLDER [--parts checks,steps] [--data FOLDER] [--dry-run]

The parts, the most valuable first: checks, tests (in a checkout), steps, cifar10, deep, feed. Each has a share of the
time; what it leaves goes to the next. Every part runs in a process of its own, which is killed at its bound. Lines are
appended to FOLDER/lines.jsonl as they come, results of training to FOLDER/results.jsonl. The same command goes on where
it was cut: what is done is not repeated.

The exit status is 0 if nothing failed; 11 to 16 if checks, tests, steps, cifar10, deep or feed failed (the first of
them); 2 if nothing could be started.
"""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import click

from ...errors import ConfigError, check_choice
from ...training.sweep import STARTER
from ...training.tables import text_table
from .options import Options

# In the order of their value, with the share of the time that is kept for each.
PARTS = {"checks": 0.15, "tests": 0.15, "steps": 0.22, "cifar10": 0.38, "deep": 0.05, "feed": 0.05}
FINAL = ("done", "failed", "skipped", "cut")
FIRST_STATUS = 11
WIDTH = 110  # of a table's last column


def bounds(parts: Sequence[str], seconds: float) -> dict[str, float]:
    """Return when each part has to end, in seconds from the start: no later than leaves the others their shares.

    >>> {part: round(end) for part, end in bounds(["checks", "steps", "feed"], 420).items()}
    {'checks': 150, 'steps': 370, 'feed': 420}
    """
    whole, end, found = sum(PARTS[part] for part in parts), 0.0, {}
    for part in parts:
        end += PARTS[part] / whole * seconds
        found[part] = end
    return found


def names_of(part: str, options: Options) -> list[str]:
    """Return the items of a part that are asked for."""
    from .child import ITEMS

    words = options.only.split(",")
    return [name for name in ITEMS[part](options) if any(word in name for word in words)]


def to_do(part: str, options: Options) -> list[str]:
    """Return the items of a part that are not done."""
    lines = options.read()
    return [name for name in names_of(part, options) if lines.get((part, name), {}).get("state") != "done"]


def run_part(part: str, options: Options) -> None:
    """Do what is left of a part until its bound, in as many processes as it takes."""
    names, start = to_do(part, options), options.lines.stat().st_size
    while names and options.left > 0:
        status = run_child(part, options, names)
        options.mend()
        lines = {name: line for (of, name), line in options.read(start).items() if of == part}
        left = [name for name in names if lines.get(name, {}).get("state") not in FINAL]
        tail = log(part, options).read_text(encoding="utf-8", errors="replace")[-500:]
        ended = {"error": f"The process ended with status {status}: {tail}"}
        if left and left[0] in lines:  # begun, and not ended
            state, found = ("cut", {}) if status is None else ("failed", ended)
            options.note(part, left.pop(0), state, **found)
        elif left == names and status is not None:  # no item could begin
            while left:
                options.note(part, left.pop(0), "failed", **ended)
        names = left
    before = options.read()
    for name in names:
        if before.get((part, name), {}).get("state") != "failed":  # which stays to be seen
            options.note(part, name, "skipped", why="no time was left")


def log(part: str, options: Options) -> Path:
    """Return the file of what a part prints."""
    return Path(options.out, f"{part}.log")


def run_child(part: str, options: Options, names: list[str]) -> int | None:
    """Run a part's process; return its exit status, or None if it was killed at its bound."""
    words = [part, json.dumps(asdict(options)), *names]
    command = [sys.executable, "-c", STARTER, "-m", "bn_affine_adapters.study.gpu.child", *words]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {})
    with log(part, options).open("ab") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its own processes are killed with it
        )
    try:
        return child.wait(max(0.0, options.left))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def summary(parts: Sequence[str], options: Options) -> tuple[str, int]:
    """Return a table of all items, and the exit status."""
    lines, rows, failed = options.read(), [["part", "item", "state", "seconds", "found"]], []
    for part in parts:
        for name in names_of(part, options):
            line = lines.get((part, name), {"state": "not begun"})
            eager = lines.get((part, f"{line.get('network')} eager"), {})
            rows.append([part, name, line["state"], str(line.get("seconds", "")), shown(line, eager)])
            failed += [part] * (line["state"] == "failed")
    status = FIRST_STATUS + list(PARTS).index(failed[0]) if failed else 0
    counts = ", ".join(f"{sum(row[2] == state for row in rows)} {state}" for state in FINAL)
    return f"{text_table(rows)}\n{counts}" + (f"; failed: {', '.join(dict.fromkeys(failed))}" if failed else ""), status


def shown(line: Mapping[str, Any], eager: Mapping[str, Any]) -> str:
    """Return what a line says, for people; a step also beside the eager one of its network."""
    if "peak_bytes" in line:
        ratios = [line[key] / eager.get(key, math.nan) for key in ("images_per_second", "peak_bytes")]
        values = f"{line['images_per_second']:,.0f} images/s, {line['peak_bytes'] / 1e6:,.0f} MB at most"
        return "{}; {:.2f} and {:.2f} of eager".format(values, *ratios)
    usual = {"part", "item", "state", "toy", "device", "at", "seconds"}
    text = ", ".join(f"{key} {value}" for key, value in line.items() if key not in usual)
    return text.replace("\n", " ")[:WIDTH]


def dry_run(parts: Sequence[str], options: Options, seconds: float) -> str:
    """Return what would be done: the bound of each part; of each run, what it takes by a step measured here."""
    from . import runs

    rows, before = [["part", "seconds at most", "to do", "estimate"]], 0.0
    for part, end in bounds(parts, seconds).items():
        names, known = to_do(part, options), runs.estimates(part, options) if part in runs.RUNS else {}
        rows.append([part, f"{end - before:.0f}", f"{len(names)} of {len(names_of(part, options))} items", ""])
        rows += [["", "", name, known[name]] for name in names if name in known]
        before = end
    return text_table(rows)


def chosen(parts: str) -> list[str]:
    """Return the parts that are asked for, in their order."""
    names = [name for name in parts.split(",") if name]
    for name in names:
        check_choice("--parts", name, tuple(PARTS))
    return [part for part in PARTS if part in names or not names]


def locked(options: Options) -> IO[bytes]:
    """Return the file of lines, mended, which no other process may take as long as it is open."""
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    file = options.lines.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        do = "wait for it, or choose another --out"
        raise ConfigError(f"Another process writes to {options.lines}.", seen=str(error), do=do) from error
    options.mend()
    return file


@click.command(help=__doc__)
@click.option("--minutes", default=9.0, type=click.FloatRange(min=0, min_open=True), show_default=True, help="In all.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="The folder of lines, results and logs.")
@click.option("--parts", default="", help="Some of them, with commas between; by default all.")
@click.option(
    "--data", default="uoft-cs/cifar10", show_default=True, help="CIFAR-10: a folder named cifar10, or a Hub id."
)
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), show_default=True, help="Where it runs.")
@click.option("--toy", is_flag=True, help="Small networks and few steps: a rehearsal, also with --device cpu.")
@click.option("--only", default="", help="Items whose name has one of these words, with commas between.")
@click.option("--dry-run", "dry", is_flag=True, help="Print what would be done, and estimates.")
def command(minutes: float, out: str, parts: str, data: str, device: str, toy: bool, only: str, dry: bool) -> None:
    """Do all parts within the time; exit with what failed."""
    import torch

    start, names = time.time(), chosen(parts)
    if device == "cuda" and not torch.cuda.is_available():
        do = "install a PyTorch for this GPU and its driver; --device cpu --toy rehearses without one"
        raise ConfigError("There is no GPU here.", seen="torch.cuda.is_available() is False", do=do)
    data = os.path.abspath(data) if Path(data).is_dir() else data
    options = Options(os.path.abspath(out), device, data, toy, only)
    if dry:
        click.echo(dry_run(names, options, 60 * minutes))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every `finally`
    with locked(options):
        for part, end in bounds(names, 60 * minutes).items():
            run_part(part, replace(options, deadline=start + end))
            click.echo(f"{part}: {time.time() - start:.0f} s of {60 * minutes:.0f} s", err=True)
    text, status = summary(names, options)
    click.echo(text)
    sys.exit(status)
