"""Try every architecture of timm: which are rebuilt from name, arguments and seed, and why the others are not.

    python recipes/benchmarks/architectures.py [--below 10000000] [--lines FILE] [--names NAME ...] [--write]

On the meta device, each network is built with its own arguments, and with one channel and seven classes. It has to
have norm layers, the arguments inferred from it have to build it again, and the seed needs a rule for each parameter.
Networks below so many parameters are then wrapped, saved, loaded and verified. A child process tries the names; one
that does not answer in time is killed, and the name counts as a hang. Names that have a line in --lines are skipped.
Prints the totals, and the names that fail by reason; --write keeps both in architectures.json beside this script, and
writes the table of docs/architectures.md.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.checks import choose_layers, infer
from bn_affine_adapters.adapter.rebuild import check_rebuild, create
from bn_affine_adapters.adapter.traits import traits
from bn_affine_adapters.seed.rules import parameter_rules
from bn_affine_adapters.study.architectures import Architecture, describe, table
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
OTHER = {"in_chans": 1, "num_classes": 7}
SECONDS = 60  # of wall time a name; the slowest takes 10 s on two busy cores


def outline(name: str, arguments: dict[str, Any]) -> torch.nn.Module:
    """Build a network on the meta device, or on the CPU if its constructor reads values."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError):  # torch's errors where a constructor reads a value on the meta device
        return create(name, arguments)


def check_inferred(network: torch.nn.Module) -> None:
    """Infer a network's arguments, build it again from them, and compare; choose the layers of its adapter."""
    config = BNOnlyConfig(seed=0)
    infer(network, config, None)
    check_rebuild(traits(network), config)
    choose_layers(network, config)


def check_other_arguments(name: str) -> None:
    """Do the same with another number of channels and classes, if the constructor takes them."""
    try:
        network = outline(name, OTHER)
    except Exception:  # it does not: there is no such network
        return
    check_inferred(network)


def check_rules(name: str) -> int:
    """Find the rule of each parameter; return how many values they have."""
    network = create(name, {})
    rules = parameter_rules(network, weight_init="kaiming_normal", norm_init="uniform")
    return sum(parameter.numel() for _, parameter, _ in rules)


def load(name: str) -> None:
    """Wrap a network, save its adapter, load and verify it."""
    with tempfile.TemporaryDirectory() as folder:
        get_bn_only_model(create(name, {}), BNOnlyConfig(seed=0)).save_pretrained(folder)
        load_bn_only_model(folder)


def attempt(name: str, below: int) -> dict[str, Any]:
    """Return the line of one name: how far it came, and why it came no further."""
    line: dict[str, Any] = {"name": name, "status": "loaded"}
    try:
        check_inferred(outline(name, {}))
        check_other_arguments(name)
        line["parameters"] = check_rules(name)
        if line["parameters"] >= below:
            return line | {"status": "rebuilt"}
        load(name)
    except BNAdapterError as error:
        return line | {"status": "refused", "reason": f"{type(error).__name__}: {error.what}", "seen": error.seen}
    except Exception as error:
        return line | {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return line


def answer(pipe: Connection, below: int) -> None:
    """Run in the child: answer each name with its line, until the pipe is closed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    while True:
        pipe.send(attempt(pipe.recv(), below))


def lines(names: list[str], below: int) -> Iterator[dict[str, Any]]:
    """Yield the line of each name, from a child process that is replaced when it hangs or dies."""
    context, child = multiprocessing.get_context("spawn"), None
    for name in names:
        if child is None:
            ours, theirs = context.Pipe()
            child = context.Process(target=answer, args=(theirs, below), daemon=True)
            child.start()
            theirs.close()
        start = time.monotonic()
        ours.send(name)
        try:
            line = ours.recv() if ours.poll(SECONDS) else {"name": name, "status": "hang"}
        except EOFError:
            line = {"name": name, "status": "died"}
        if line["status"] in ("hang", "died"):
            child.kill()
            child.join()
            child = None
        yield line | {"seconds": round(time.monotonic() - start, 2)}
    if child is not None:
        child.kill()


def why(line: dict[str, Any]) -> str:
    """Return the reason of a line, equal for networks that fail alike."""
    text = line.get("reason", line["status"])
    if owner := re.match(r"attribute of [\w.]*?(\w+), shape", line.get("seen", "")):
        parameter = re.search(r"(\w+) has no rule", text)
        return f"no rule for {owner[1]}.{parameter[1] if parameter else '?'}"
    if "has no norm layer" in text:
        return "no norm layer"
    if difference := re.search(r"the first at .*", line.get("seen", "")):
        return f"not rebuilt: {difference[0]}"
    return text


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals by status, and the names of each reason, the largest group first."""
    reasons: dict[str, list[str]] = {}
    for line in found:
        if line["status"] not in ("loaded", "rebuilt"):
            reasons.setdefault(why(line), []).append(line["name"])
    return {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "names": len(found),
        "status": dict(Counter(line["status"] for line in found).most_common()),
        "seconds": round(sum(line["seconds"] for line in found)),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -len(item[1]))),
    }


def page(found: list[dict[str, Any]]) -> str:
    """Return the totals, and a table for each family."""
    outcome = {line["name"]: line["status"] for line in found}
    families: dict[str, list[Architecture]] = {}
    for each in map(describe, sorted(outcome)):
        families.setdefault(each.family, []).append(each)
    total = summary(found)
    counts = ", ".join(f"{count:,} {status}" for status, count in total["status"].items())
    parts = [f"timm {total['timm']}, torch {total['torch']}: {total['names']:,} names, {counts}."]
    for family, group in sorted(families.items()):
        head, *rows = table(group)
        rows = [[row[0], *row[2:], outcome[row[0]]] for row in rows]
        parts += [f"### {family}", markdown_table([head[0], *head[2:], "status"], rows)]
    return "\n\n".join(parts)


def main() -> None:
    """Try the names that have no line yet; print the totals; with --write, keep them beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--below", type=int, default=10_000_000)
    parser.add_argument("--lines", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    file = options.lines
    found = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    left = set(options.names or timm.list_models()) - {line["name"] for line in found}
    with file.open("a") as out:
        for line in lines(sorted(left), options.below):
            found.append(line)
            print(json.dumps(line), file=out, flush=True)
    text = json.dumps(summary(found), indent=1)
    print(text)
    if options.write:
        Path(__file__).with_suffix(".json").write_text(text + "\n")
        write_section(PAGE, "architectures", page(found))


if __name__ == "__main__":
    main()
