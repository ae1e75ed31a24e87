"""The layout: the parts and their order, what an import brings along, and what it leaves alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bn_affine_adapters

PACKAGE = Path(bn_affine_adapters.__file__).parent
RECIPES = Path(__file__).parents[1] / "recipes"

# From the bottom to the top: a part imports only itself and what comes before it.
ORDER = {
    "errors": "one exception tree; how an argument is refused",
    "norms": "norm layers, the head and shortcuts; batch statistics over several processes",
    "zoo": "the paper's networks",
    "seed": "(seed, name) to bits; the rule of each tensor; fingerprints",
    "lean": "training that keeps less for backward",
    "settings": "what adapter_config.json holds, without torch",
    "adapter": "the PEFT method",
    "sharing": "folders, cards, the Hub",
    "model": "the front door",
    "deploy": "export for other tools",
    "training": "data, recipes, the loop, sweeps",
    "study": "analysis, figures, what runs say of the paper's claims",
    "cli": "the command line",
    "__init__": "the public names",
}

HEAVY = {"datasets", "accelerate", "evaluate", "sklearn", "matplotlib", "omegaconf", "ray", "tensorboard", "optuna"}
# A module may be imported by a user who has not installed the extras. Only metrics, whose class is an evaluate.Metric,
# imports one, and nothing imports it at its top; evaluate imports datasets itself.
HEAVY_AT_THE_TOP = {("training.metrics", "evaluate"), ("training.metrics", "datasets")}


def files(package):
    """Return {dotted name: file} of a package, without the package's own name; `a.b` for a/b.py and a/b/__init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    assert found, f"no file in {package}"
    return found


def part(module):
    """Return the part that a module belongs to."""
    return module.partition(".")[0]


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


def arrows(package, anywhere=True):
    """Return (from, to) for every import of one module of a package by another."""
    found, modules = set(), files(package)
    for module, path in modules.items():
        for name in imports(path, package, anywhere):
            first, *rest = name.split(".")
            if first != package.name:
                continue
            while rest and ".".join(rest) not in modules:
                rest.pop()
            target = ".".join(rest) or "__init__"
            if target != module:
                found.add((module, target))
    return found


def upward(package):
    """Return the arrows between parts that point up."""
    height = {name: place for place, name in enumerate(ORDER)}
    return {(a, b) for a, b in arrows(package) if height[part(b)] > height[part(a)]}


def circle(package):
    """Return the modules of circles of imports, and of the ways between two circles."""
    left, found = files(package).keys(), arrows(package)
    while True:
        inner = {(a, b) for a, b in found if a in left and b in left}
        kept = {a for a, _ in inner} & {b for _, b in inner}
        if kept == left:
            return sorted(left)
        left = kept


def heavy_at_the_top(package):
    found = {
        (module, name.split(".")[0])
        for module, path in files(package).items()
        for name in imports(path, package, anywhere=False)
    }
    return {(module, name) for module, name in found if name in HEAVY}


def test_the_parts_and_their_order(capsys):
    """Run with -s to read them."""
    modules = files(PACKAGE)
    assert {part(module) for module in modules} == set(ORDER)
    entries = sorted(path.name for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__"))
    assert len(entries) <= 15, entries
    with capsys.disabled():
        print()
        for place, (name, holds) in enumerate(ORDER.items(), 1):
            print(f"{place:3} {name:10} {sum(part(module) == name for module in modules):2} files  {holds}")
    assert len(modules) >= 60


def test_no_import_points_up():
    assert upward(PACKAGE) == set()
    found = arrows(PACKAGE)
    assert {("model.loading", "adapter.tuner"), ("adapter.tuner", "adapter.layer"), ("__init__", "zoo")} <= found
    assert len(found) >= 150, f"only {len(found)} imports were read"


def test_no_modules_import_each_other_in_a_circle():
    assert circle(PACKAGE) == []


def fake_package(folder, **sources):
    package = folder / "fake"
    for name in ORDER:
        path = package / (f"{name}.py" if name in ("errors", "settings", "cli", "__init__") else f"{name}/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    for name, source in sources.items():
        path = package / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.write_text(source, encoding="utf-8")
    return package


UPWARD = {
    "relative": ("seed__draws", "from ..adapter import tuner", "adapter"),
    "the part itself": ("seed__draws", "from .. import norms, model", "model"),
    "absolute": ("adapter__tuner", "import fake.training", "training"),
    "absolute from": ("norms__find", "from fake.model import register", "model"),
    "in a function": ("seed__rules", "def f():\n    from ..adapter import tuner", "adapter"),
    "for types": (
        "lean__forward",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..study import X",
        "study",
    ),
    "the package itself": ("errors", "from . import BNOnlyConfig", "__init__"),
    "the command line": ("study__pages", "from ..cli import main", "cli"),
}


@pytest.mark.parametrize("kind", UPWARD)
def test_an_upward_import_would_be_noticed(kind, tmp_path):
    module, source, target = UPWARD[kind]
    assert upward(fake_package(tmp_path, **{module: source})) == {(module.replace("__", "."), target)}


def test_a_package_without_upward_imports_passes(tmp_path):
    sources = {
        "adapter__tuner": "from .layer import X\nfrom ..seed import draws\nimport torch",
        "adapter__layer": "",
        "training__feed": "from fake.training.data import Split",
        "training__data": "",
    }
    package = fake_package(tmp_path, **sources)
    assert upward(package) == set()
    assert circle(package) == []
    wanted = {("adapter.tuner", "adapter.layer"), ("adapter.tuner", "seed"), ("training.feed", "training.data")}
    assert arrows(package) == wanted


def test_a_circle_would_be_noticed(tmp_path):
    sources = {"lean__a": "from .b import x", "lean__b": "def f():\n    from . import c", "lean__c": "from .a import y"}
    assert circle(fake_package(tmp_path, **sources)) == ["lean.a", "lean.b", "lean.c"]


def test_nothing_heavy_is_imported_at_the_top_of_a_module():
    assert heavy_at_the_top(PACKAGE) == HEAVY_AT_THE_TOP


def test_no_module_imports_one_that_is_heavy_at_its_top():
    found, heavy = arrows(PACKAGE, anywhere=False), {module for module, _ in HEAVY_AT_THE_TOP}
    assert not {(a, b) for a, b in found if b in heavy}
    assert len(found) >= 100


def test_a_heavy_import_at_the_top_would_be_noticed(tmp_path):
    sources = {
        "training__data": "import datasets.features",
        "norms__statistics": "try:\n    from accelerate import Accelerator\nexcept ImportError:\n    pass",
        "training__feed": "class A:\n    import sklearn",
        "model__loading": "def f():\n    import datasets",
    }
    found = heavy_at_the_top(fake_package(tmp_path, **sources))
    assert found == {("training.data", "datasets"), ("norms.statistics", "accelerate"), ("training.feed", "sklearn")}


def long_functions(folder, limit=40):
    """Return {file:function: lines} of the functions that do not fit on a screen."""
    nodes = [(path, node) for path in sorted(folder.rglob("*.py")) for node in ast.walk(ast.parse(path.read_text()))]
    functions = [(p, n) for p, n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {f"{p.relative_to(folder)}:{n.name}": n.end_lineno - n.lineno + 1 for p, n in functions}
    assert lines, f"no function in {folder}"
    return {name: count for name, count in lines.items() if count > limit}


def test_functions_fit_on_a_screen_but_for_three_with_many_arguments():
    assert set(long_functions(PACKAGE)) == {
        "model/loading.py:load_bn_only_model", "model/peft_model.py:push_to_hub", "sharing/hub.py:push_folder",
    }  # fmt: skip
    assert long_functions(RECIPES) == {}


def test_a_long_function_would_be_noticed(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n" + "    x = 1\n" * 39 + "async def g():\n" + "    x = 1\n" * 40)
    assert long_functions(tmp_path) == {"a.py:g": 41}


def test_recipes_are_never_imported():
    names = {path.stem for path in RECIPES.rglob("*.py")}
    assert "train" in names
    found = {name for path in files(PACKAGE).values() for name in imports(path, PACKAGE)}
    found |= {name for path in RECIPES.rglob("*.py") for name in imports(path, RECIPES)}
    assert not {name for name in found if name.split(".")[0] == "recipes"}


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
    assert HEAVY & set(look["loaded"]) <= {
        "accelerate",
        "sklearn",
    }  # transformers loads scikit-learn where torch is older
    assert {"peft", "timm", "torch"} <= set(look["loaded"])


def test_importing_sets_no_environment_variable_and_no_warning_filter(look):
    assert look["changed"] == []
    assert look["looked at"] == 12


def test_importing_registers_the_method_and_the_networks(look):
    assert look["methods"] == ["BN_ONLY"]
    assert len(look["models"]) == 21
    assert all(name.startswith("cifar_") for name in look["models"])


# What an import does not do: load torch, timm or PEFT. It registers when they are imported.

SLOW = ("torch", "timm", "peft", "transformers", "accelerate", "torchvision")
REGISTERED = """
assert timm.create_model("cifar_resnet20").num_classes == 10
names = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
assert all("BN_ONLY" in known for known in names), names
assert "BN_ONLY" in peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
assert not any("exec_module" in vars(module.__loader__) for module in (timm, peft)), "their loaders are as before"
"""
ON_DEMAND = """
import bn_affine_adapters, pickle
from bn_affine_adapters import *
assert timm.create_model("cifar_resnet20").num_classes == 10
config = BNOnlyConfig(seed=3, label_names=["a", "b"])
assert pickle.loads(pickle.dumps(config)) == config
assert bn_affine_adapters.zoo.cifar_resnet.CifarResNet is zoo.cifar_resnet.CifarResNet
assert bn_affine_adapters.lean.LEVELS and bn_affine_adapters.reinit_ is reinit_
"""
IN_THREADS = """
import threading, time
from importlib import import_module
import bn_affine_adapters
names = ["timm.data", "peft.tuners", "bn_affine_adapters.zoo", "bn_affine_adapters.model.prediction"]
threads = [threading.Thread(target=import_module, args=(name,)) for name in names]
[thread.start() for thread in threads], [thread.join() for thread in threads]
[thread.join() for thread in threading.enumerate() if thread is not threading.main_thread()]
import timm, peft
"""
ORDERS = {
    "this package first": f"import bn_affine_adapters, timm{ON_DEMAND}import peft",
    "PEFT before timm": "import bn_affine_adapters, peft, timm",
    "a submodule": "import bn_affine_adapters\nfrom timm.layers import DropPath\nimport peft.utils, timm",
    "in threads": IN_THREADS,
}
# Each of these is the first to import PEFT, and is half done when the method is registered.
FIRST = ["adapter.method", "adapter.layer", "model.peft_model", "model.loading", "deploy.exporting", "zoo.cifar_vgg"]


def fresh(code, *arguments):
    """Run code in a fresh interpreter; return what it prints."""
    command = [sys.executable, "-W", "error:::bn_affine_adapters", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert "Exception in thread" not in done.stderr, done.stderr
    return done.stdout


def test_an_import_loads_nothing_slow_and_the_names_are_there():
    code = f"""
import sys, bn_affine_adapters
assert not {{*{SLOW}}} & sys.modules.keys(), sys.modules.keys()
assert {{*bn_affine_adapters.__all__, "lean", "norms"}} <= {{*dir(bn_affine_adapters)}}
try:
    bn_affine_adapters.nosuch
except AttributeError as error:
    print(error)
"""
    assert fresh(code) == "module 'bn_affine_adapters' has no attribute 'nosuch'\n"


@pytest.mark.parametrize(
    "order", [name if name == "this package first" else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS]
)
def test_the_networks_and_the_method_are_registered_in_any_order(order):
    fresh(ORDERS[order] + REGISTERED)


@pytest.mark.slow
def test_any_module_of_the_package_may_be_the_first_that_is_imported():
    """One process loads what takes long, and a copy of it for each module imports that first."""
    code = f"""
import importlib, os, sys, traceback
import accelerate, torch, torchvision, transformers
assert not {{"timm", "peft"}} & sys.modules.keys()
for name in {FIRST}:
    child = os.fork()
    if not child:
        try:
            importlib.import_module("bn_affine_adapters." + name)
            import peft, timm
            exec({REGISTERED!r})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
    print(name)
"""
    assert fresh(code).split() == FIRST


def test_the_part_of_a_module_that_imports_peft_imports_it_first():
    """Or else a module would be half done when PEFT's import registers the method, which imports it again."""
    modules = files(PACKAGE)
    using = {
        module for module, path in modules.items() if "peft" in {n.split(".")[0] for n in imports(path, PACKAGE, False)}
    }
    registering = {"adapter", "model"}  # what `model.loading`, which registers, imports
    assert {part(module) for module in using} == registering | {"deploy"}
    for name in registering:
        first = {n for n in imports(modules[name], PACKAGE, False)}
        assert first & {"peft", "bn_affine_adapters.adapter"}, name


def test_the_public_names_are_at_most_15_and_all_there():
    names = bn_affine_adapters.__all__
    assert len(names) == len(set(names)) <= 15
    assert all(hasattr(bn_affine_adapters, name) for name in names)
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    seen = next(node for node in ast.parse(source).body if is_type_checking(node))
    assert {alias.name for node in seen.body for alias in node.names} == set(names), "what mypy and editors see"
