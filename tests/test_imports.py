"""Imports go down only, nothing heavy comes along, nothing is set on import, and no file grows too long."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bn_affine_adapters

PACKAGE = Path(bn_affine_adapters.__file__).parent
RECIPES = Path(__file__).parent.parent / "recipes"

# From the bottom to the top: a module imports only what comes before it.
TOWER = [
    "errors",
    "draws",
    "norms",
    "fingerprint",
    "reinit",
    "config",
    "control",
    "layer",
    "lean",
    "backbone",
    "limits",
    "files",
    "contents",
    "analysis",
    "plots",
    "results",
    "card",
    "hub",
    "prepare",
    "tuner",
    "peft_model",
    "model",
    "prediction",
    "exporting",
    "cli",
]
# Beside the tower: what these may import.
BESIDE = {
    "zoo": {"errors"},
    "sync": {"errors"},
    "data": {"errors"},
    "metrics": {"errors"},
    "costs": set(),
    "runs": {"errors", "config", "backbone"},
    "feed": {"errors", "data", "metrics"},
    "features": {"feed", "layer", "norms"},
    "recipe": {"errors", "config", "feed", "reinit"},
    "stacked": {"errors", "norms", "control", "layer"},
    "planning": {"building", "config", "errors", "recipe"},
    "building": {"backbone", "config", "data", "errors", "feed", "model", "norms", "peft_model", "recipe", "reinit"},
    "replicates": {"errors", "recipe", "results"},
    "claims": {"errors", "analysis", "replicates"},
}
ALLOWED = BESIDE | {module: set(TOWER[:i]) for i, module in enumerate(TOWER)} | {"__init__": {*TOWER, *BESIDE}}
ALLOWED["lean"] |= {"sync"}  # which norm layers share their statistics
ALLOWED["results"] |= {"recipe"}  # what tells one run from another; recipe stands on config and what is beside

HEAVY = {"datasets", "accelerate", "evaluate", "sklearn", "matplotlib", "omegaconf", "ray", "tensorboard"}
# Its class is a subclass of evaluate.Metric, and evaluate imports datasets itself; nothing imports metrics at its top.
HEAVY_AT_THE_TOP = {("metrics", "evaluate"), ("metrics", "datasets")}


def modules(package):
    """Return (module, file) of a package; the files of a folder in it are one module."""
    found = [(path.relative_to(package).parts[0].removesuffix(".py"), path) for path in sorted(package.rglob("*.py"))]
    assert found, f"no file in {package}"
    return found


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path, package, anywhere=True):
    """Yield the full names that a file imports: everywhere, or only what runs when it is imported itself."""
    inside = [package.name, *path.relative_to(package).parts[:-1]]
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if not anywhere and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        ):
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def arrows(package):
    """Return (from, to) for every import of one module of a package by another."""
    found = set()
    names = {module for module, _ in modules(package)}
    for module, path in modules(package):
        for name in imports(path, package):
            first, *rest = name.split(".")
            if first == package.name:
                target = rest[0] if rest and rest[0] in names else "__init__"
                if target != module:
                    found.add((module, target))
    return found


def upward(package):
    """Return the arrows that are not allowed."""
    return {(module, target) for module, target in arrows(package) if target not in ALLOWED.get(module, set())}


def heavy_at_the_top(package):
    found = {
        (module, name.split(".")[0])
        for module, path in modules(package)
        for name in imports(path, package, anywhere=False)
    }
    return {(module, name) for module, name in found if name in HEAVY}


def too_long(folder, limit):
    lengths = {
        str(path.relative_to(folder)): len(path.read_text(encoding="utf-8").splitlines())
        for path in folder.rglob("*.py")
    }
    assert lengths, f"no file in {folder}"
    return {name: length for name, length in lengths.items() if length > limit}


def test_every_module_has_its_place():
    found = {module for module, _ in modules(PACKAGE)}
    assert found == set(ALLOWED)
    assert len(found) == 40


def test_imports_go_down_only():
    assert upward(PACKAGE) == set()
    found = arrows(PACKAGE)
    assert {("model", "tuner"), ("tuner", "layer"), ("zoo", "errors"), ("__init__", "model")} <= found
    assert len(found) >= 35, f"only {len(found)} imports were read"


def fake_package(folder, **files):
    package = folder / "fake"
    for name in ALLOWED:
        path = package / (f"{name}.py" if name != "zoo" else "zoo/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""), encoding="utf-8")
    return package


UPWARD = {
    "relative": ("draws", "from .tuner import BNOnlyTuner", "tuner"),
    "module": ("draws", "from . import norms", "norms"),
    "absolute": ("config", "import fake.layer", "layer"),
    "absolute from": ("norms", "from fake.model import register", "model"),
    "in a function": ("reinit", "def f():\n    from .config import BNOnlyConfig", "config"),
    "for types": ("layer", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .tuner import X", "tuner"),
    "the package itself": ("errors", "from . import BNOnlyConfig", "__init__"),
    "from a folder": ("zoo", "from ..model import register", "model"),
    "beside": ("data", "from .feed import Feed", "feed"),
    "same height": ("fingerprint", "from .reinit import plan", "reinit"),
}


@pytest.mark.parametrize("kind", UPWARD)
def test_an_upward_import_would_be_noticed(kind, tmp_path):
    module, source, target = UPWARD[kind]
    assert upward(fake_package(tmp_path, **{module: source})) == {(module, target)}


def test_a_package_without_upward_imports_passes(tmp_path):
    files = {"tuner": "from .layer import X\nfrom . import draws\nimport torch", "feed": "from fake.data import Split"}
    package = fake_package(tmp_path, **files)
    assert upward(package) == set()
    assert arrows(package) == {("tuner", "layer"), ("tuner", "draws"), ("feed", "data")}


def test_nothing_heavy_is_imported_at_the_top_of_a_module():
    assert heavy_at_the_top(PACKAGE) == HEAVY_AT_THE_TOP


def test_no_module_imports_metrics_at_its_top():
    found = {(module, name) for module, path in modules(PACKAGE) for name in imports(path, PACKAGE, anywhere=False)}
    assert not {(module, name) for module, name in found if name.startswith("bn_affine_adapters.training.metrics")}
    assert len(found) >= 100


def test_a_heavy_import_at_the_top_would_be_noticed(tmp_path):
    files = {
        "data": "import datasets.features",
        "sync": "try:\n    from accelerate import Accelerator\nexcept ImportError:\n    pass",
        "feed": "class A:\n    import sklearn",
        "model": "def f():\n    import datasets",
    }
    found = heavy_at_the_top(fake_package(tmp_path, **files))
    assert found == {("data", "datasets"), ("sync", "accelerate"), ("feed", "sklearn")}


def test_recipes_are_never_imported():
    names = {path.stem for path in RECIPES.rglob("*.py")}
    assert {"train", "evaluate"} <= names
    files = [(path, PACKAGE) for _, path in modules(PACKAGE)] + [(path, RECIPES) for path in RECIPES.rglob("*.py")]
    found = {name for path, root in files for name in imports(path, root)}
    assert not {name for name in found if name.split(".")[0] == "recipes"}
    own = {path.stem: set(imports(path, RECIPES)) for path in RECIPES.rglob("*.py")}
    # `evaluate` is also a library's name: a script that imports it means that one.
    assert not {
        (stem, name) for stem, found in own.items() for name in found if name.split(".")[0] in names - {"evaluate"}
    }


# What an import does to the process, seen in a fresh one.

LOOK = """
import json, logging, os, random, sys, warnings
import numpy, peft, timm, torch
peft.get_peft_model, timm.create_model
def state():
    return {
        "environment": dict(os.environ),
        "filters": [repr(f) for f in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "handlers": repr(logging.getLogger().handlers) + str(logging.getLogger().level),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": repr(numpy.random.get_state()),
        "python's generator": repr(random.getstate()),
        "path": list(sys.path),
    }
before, modules = state(), set(sys.modules)
models, methods = set(timm.list_models()), set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
import bn_affine_adapters
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "looked at": len(before),
    "came along": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
    "models": sorted(set(timm.list_models()) - models),
    "methods": sorted(set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) - methods),
}))
"""


@pytest.fixture(scope="module")
def look():
    """What a fresh interpreter reports about an import, warnings being errors."""
    command = [sys.executable, "-X", "utf8", "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert "bn_affine_adapters" not in done.stderr, f"importing the package wrote: {done.stderr}"
    return json.loads(done.stdout)


def test_importing_brings_nothing_beyond_what_peft_and_timm_bring(look):
    others = set(look["came along"]) - set(sys.stdlib_module_names)
    assert others == {"bn_affine_adapters"}


def test_importing_loads_nothing_heavy_but_what_peft_loads_itself(look):
    assert HEAVY & set(look["loaded"]) <= {"accelerate"}
    assert {"peft", "timm", "torch"} <= set(look["loaded"])


def test_importing_sets_no_environment_variable_and_no_warning_filter(look):
    assert look["changed"] == []
    assert look["looked at"] == 12


def test_importing_registers_the_method_and_the_networks(look):
    assert look["methods"] == ["BN_ONLY"]
    assert len(look["models"]) == 21
    assert all(name.startswith("cifar_") for name in look["models"])


def test_the_public_names_are_at_most_15_and_all_there():
    names = bn_affine_adapters.__all__
    assert len(names) == len(set(names)) <= 15
    assert all(hasattr(bn_affine_adapters, name) for name in names)


def test_no_file_of_the_package_has_over_300_lines():
    assert too_long(PACKAGE, 300) == {}


def test_no_recipe_has_over_360_lines():
    assert too_long(RECIPES, 360) == {}


def test_a_file_that_is_too_long_would_be_noticed(tmp_path):
    (tmp_path / "short.py").write_text("x = 1\n" * 300, encoding="utf-8")
    (tmp_path / "long.py").write_text("x = 1\n" * 301, encoding="utf-8")
    assert too_long(tmp_path, 300) == {"long.py": 301}
