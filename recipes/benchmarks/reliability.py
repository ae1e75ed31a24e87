"""Try each promise of docs/reliability.md many times, and write down what was tried, when and on which commit.

    python recipes/benchmarks/reliability.py [NAME ...] [--seed 0] [--write]

A promise is tried by tests of this project: their pytest arguments, and environment variables that say how often.
What a run found replaces the promise's entry in reliability.json beside this script, be it good or bad; --write also
writes the table of docs/reliability.md from that file, and so does a run without names and with --page.
Exit status 1 if a test failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bn_affine_adapters.study.pages import machine, write_section
from bn_affine_adapters.training.scripts import commit
from bn_affine_adapters.training.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "recipes" / "benchmarks" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


class Promise(NamedTuple):
    """Words of the README, the tests that try them, and how often: an environment variable of these tests."""

    words: str
    how: str
    tests: tuple[str, ...]
    often: str = ""


SEEDS = ("BNAA_KILLS_SEED", "BNAA_SEQUENCES_SEED", "BNAA_FUZZ_SEED")
PROMISES = {
    "kills": Promise(
        "a killed run resumes to the same bytes",
        "Real runs get SIGKILL, SIGTERM or SIGINT at random steps: one process; two processes with stochastic depth, "
        "dropout and streaming; sweeps with two workers. Resumed, they have to end with the files and the result line "
        "of a run that was never ended.",
        ("tests/training/test_kills.py",),
        "BNAA_KILLS=50",
    ),
    "resume": Promise(
        "a killed run resumes to the same bytes",
        "The checkpoint between any two steps, every generator, locks, signals, a launcher that dies, a process that "
        "stops, a loss that is not finite.",
        ("tests/training/test_resume.py", "tests/training/test_signals.py"),
    ),
    "connections": Promise(
        "a broken connection or a full disk loses nothing",
        "The real client pushes to and loads from a Hub on loopback that refuses, cuts or delays its answers at every "
        "stage; afterwards the old or the new version is there, whole.",
        ("tests/sharing/test_hub_faults.py",),
    ),
    "disks": Promise(
        "a broken connection or a full disk loses nothing",
        "A small file system fills up at each write of a run, of a save, of a download and of an export; what was "
        "there stays whole, and the run goes on after room was made.",
        ("tests", "-k", "disk"),
    ),
    "sequences": Promise(
        "what is loaded computes what was saved",
        "Random sequences of wrap, add, switch, merge, save, load, disable, lean training and changes from outside, on "
        "four networks: the reloaded adapter computes the same bits, or saving refuses.",
        ("tests/model/test_sequences.py",),
        "BNAA_SEQUENCES=1000",
    ),
    "seed": Promise(
        "the same bits",
        "Golden values of the seed's specification, golden fingerprints, and an adapter of every format version.",
        ("tests/seed", "tests/adapter/test_golden.py"),
    ),
    "files": Promise(
        "a hostile file is refused",
        "Mutated adapters are loaded in a process of their own: each gives a verified network or an error of this "
        "package, without a crash, a hang, or a gigabyte of memory.",
        ("tests/sharing/test_fuzz.py",),
        "BNAA_FUZZ=10000",
    ),
    "trust": Promise(
        "a hostile file is refused",
        "Each line of the threat model has its test.",
        ("tests/sharing/test_trust.py",),
    ),
    "gradients": Promise(
        "the same gradients",
        "Lean training at the level `exact` against autograd, on networks of every family it knows.",
        ("tests/lean",),
    ),
}


def attempt(name: str, promise: Promise, seed: int) -> dict[str, Any]:
    """Run a promise's tests, those marked slow too; return what they report."""
    environment = os.environ | dict.fromkeys(SEEDS, str(seed)) | dict(part.split("=") for part in promise.often.split())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", *promise.tests, f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            raise SystemExit(f"{name}: pytest ended with {status} and no report")
        return about(seed) | counted(ElementTree.parse(report).getroot())


def about(seed: int) -> dict[str, Any]:
    """Return what tells one run of a promise from another."""
    now = datetime.now(UTC)
    return {"date": now.date().isoformat(), "commit": commit(), "seed": seed, "machine": machine()}


def counted(report: ElementTree.Element) -> dict[str, Any]:
    """Return the number of tests by outcome, the sum of what they counted themselves, and their seconds."""
    found: Counter[str] = Counter()
    tries: Counter[str] = Counter()
    seconds = 0.0
    for case in report.iter("testcase"):
        seconds += float(case.get("time", 0))
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
        for each in case.iter("property"):
            tries[str(each.get("name"))] += int(each.get("value", 0))
    tests = {kind: found[kind] for kind in ("passed", "failed", "skipped")}
    return {"tests": tests, "tries": dict(tries), "seconds": round(seconds)}


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of promises and the last run of each."""
    rows = [row(promise, found[name]) for name, promise in PROMISES.items() if name in found]
    head = "Written by `python recipes/benchmarks/reliability.py --write`, which runs the tests named in each line."
    return head + "\n\n" + markdown_table(["promise", "how it is tried", "the last run", "of"], rows)


def row(promise: Promise, line: dict[str, Any]) -> list[str]:
    """Return a promise's cells."""
    command = " ".join([*promise.often.split(), "pytest -m ''", *promise.tests])
    counts = [f"{count:,} {kind}" for kind, count in line["tries"].items()]
    tests = ", ".join(f"{count} {kind}" for kind, count in line["tests"].items() if count or kind != "skipped")
    when = f"{line['date']}, commit {line['commit']}, seed {line['seed']}, {line['seconds']:,} s; {line['machine']}"
    return [promise.words, f"{promise.how} `{command}`", "; ".join([*counts, f"tests: {tests}"]), when]


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return the last run of each promise by name."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def main() -> None:
    """Try the promises named, or all; keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROMISES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the page from the file, and try nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PROMISES):
        parser.error(f"no such promise: {', '.join(sorted(unknown))}")
    failed = 0
    for name in () if options.page else options.names or PROMISES:
        line = attempt(name, PROMISES[name], options.seed)
        failed += line["tests"]["failed"]
        FILE.write_text(json.dumps(read() | {name: line}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.write or options.page:
        write_section(PAGE, "reliability", page(read()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
