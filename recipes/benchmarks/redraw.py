"""Redraw one layer at a time of trained networks: which layers does the accuracy depend on?

    python recipes/benchmarks/redraw.py ADAPTER [ADAPTER ...] [--seed 1000] [--write]

Each ADAPTER is a run of one data set, e.g. `bn-adapters train condition=all output_dir=runs/all`. --write puts the
table into docs/analysis.md.
"""

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from bn_affine_adapters.study.analyse import read_options, run
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def analysis(adapter: str, seed: int) -> dict[str, Any]:
    """Return the condition of a run, and its accuracies with each layer redrawn."""
    with redirect_stdout(StringIO()):
        found = run(read_options([f"adapter={adapter}", "clamp=[]", f"redraw={seed}"]))["analysis"]
    recipe = json.loads(Path(adapter).with_name("result.json").read_text(encoding="utf-8"))["recipe"]
    return {"recipe": recipe, "top1": found["top1"], "redrawn": found["redrawn"]}


def page(found: list[dict[str, Any]], seed: int) -> str:
    """Return the section of docs/analysis.md."""
    heads = [f"{each['recipe']['condition']}, seed {each['recipe']['seed']}" for each in found]
    rows = [["none", *(f"{each['top1']:.2f}" for each in found)]]
    rows += [[layer, *(f"{each['redrawn'][layer]:.2f}" for each in found)] for layer in found[0]["redrawn"]]
    recipe = found[0]["recipe"]
    text = (
        f"{Path(recipe['dataset']).name}, {recipe['model']}, {recipe['epochs']} epochs; drawn from seed {seed}, n = 1:"
    )
    return f"{text}\n\n" + markdown_table(["redrawn layer", *(f"{head}: accuracy, %" for head in heads)], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    section = page([analysis(adapter, options.seed) for adapter in options.adapters], options.seed)
    print(section)
    if options.write:
        write_section(PAGE, "redraw", section)
