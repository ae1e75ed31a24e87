"""The errors are the tree that their docstring draws, and each is raised by a real call with its three parts."""

import ast
import builtins
import copy
import errno
import inspect
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import without_privileges
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

import bn_affine_adapters
from bn_affine_adapters import BNAdapterError, BNOnlyConfig, adapt_to, errors, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.sharing.hub import _ADVICE, _OTHERWISE, push_folder
from bn_affine_adapters.training.checkpoint import read_checkpoint
from bn_affine_adapters.training.data import load_splits
from bn_affine_adapters.training.recipe import Recipe
from bn_affine_adapters.training.train import check_output, naming_lost_process, read_recipe, train

REPOSITORY = Path(__file__).parent.parent
CLASSES = {n: k for n, k in vars(errors).items() if inspect.isclass(k) and k.__module__ == errors.__name__}
# These two only gather others: catch them, never raise them.
BASES = {"BNAdapterError", "NetworkError"}


def drawing(text):
    """Read the tree out of a docstring: name -> (its parent, the builtin in brackets)."""
    found, path = {}, []
    for line in text.splitlines():
        if match := re.match(r"^((?:[│ ]   )*(?:[├└]── )?)(\w+Error)\s*(?:\((\w+)\))?", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            found[match[2]] = (path[depth - 1] if depth else None, match[3])
    return found


def test_the_tree_is_the_one_drawn():
    real = {}
    for name, kind in CLASSES.items():
        parents = [base.__name__ for base in kind.__bases__ if issubclass(base, BNAdapterError)]
        others = [base.__name__ for base in kind.__bases__ if base not in CLASSES.values() and base is not Exception]
        assert len(parents) + (kind is BNAdapterError) == 1
        assert len(others) <= 1
        real[name] = (parents[0] if parents else None, others[0] if others else None)
    assert drawing(errors.__doc__) == real
    assert len(real) == 31


def test_a_tree_drawn_wrongly_would_be_noticed():
    moved = errors.__doc__.replace("│   └── FormatVersionError", "├── FormatVersionError")
    assert moved != errors.__doc__
    assert drawing(moved) != drawing(errors.__doc__)
    assert drawing(moved)["FormatVersionError"] == ("BNAdapterError", None)
    without = errors.__doc__.replace("(FileExistsError)", "")
    assert drawing(without)["OutputFolderError"] == ("BNAdapterError", None)


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_descends_from_the_builtin_that_a_caller_expects(name):
    here, expected = name, []
    while here:
        here, builtin = drawing(errors.__doc__)[here]
        expected += [getattr(builtins, builtin)] if builtin else []
    assert all(issubclass(CLASSES[name], kind) for kind in expected)
    assert expected or name == "BNAdapterError"


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_says_what_happened_what_was_seen_and_what_to_do(name):
    error = CLASSES[name]("It broke.", seen="5 of 7", do="mend it")
    assert str(error) == "It broke.\n  seen:  5 of 7\n  do:    mend it"
    assert (error.what, error.seen, error.do) == ("It broke.", "5 of 7", "mend it")
    assert CLASSES[name].__doc__.endswith(".") or "``" in CLASSES[name].__doc__


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_survives_the_way_from_another_process(name):
    error = CLASSES[name]("It broke.", seen="5 of 7", do="mend it")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert (str(again), again.what, again.seen, again.do) == (str(error), "It broke.", "5 of 7", "mend it")


def test_what_a_terminal_would_obey_is_shown_and_not_sent():
    error = BNAdapterError("a\x1b[2J", seen="b\r" + "c" * 5000, do="two\nlines")
    assert "\x1b" not in str(error)
    assert "\r" not in str(error)
    assert len(str(error)) < 2200
    assert error.do == "two\nlines"


# Every class, and a real call that raises it.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapter folders, from a seed and on given weights, to be copied before they are changed."""
    folder = tmp_path_factory.mktemp("folders")
    for name, seed in (("seeded", 0), ("given", None)):
        torch.manual_seed(0)
        model = get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=seed))
        model.save_pretrained(folder / name)
    return folder


class Here:
    """What a case may use: a scratch folder, copies of adapters, pytest's monkeypatch and the loopback Hub."""

    def __init__(self, folders, scratch, monkeypatch, hub):
        self.folders, self.scratch, self.monkeypatch, self.hub = folders, scratch, monkeypatch, hub

    def copy(self, name):
        return shutil.copytree(self.folders / name, self.scratch / name)

    def edited(self, **changes):
        """Return a copy of the seeded adapter whose configuration was changed by hand."""
        path = self.copy("seeded") / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return path.parent


def cifar(**arguments):
    return timm.create_model("cifar_resnet14", **arguments)


def changed_by_hand():
    model = cifar()
    model.act1 = nn.GELU()
    return model


def truncate(here):
    file = here.copy("seeded") / SAFETENSORS_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-100])
    return load_bn_only_model(file.parent)


def drop_a_tensor(here):
    file = here.copy("seeded") / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)
    return load_bn_only_model(file.parent)


def fill_an_output_folder(here):
    (here.scratch / "result.json").write_text("{}", encoding="utf-8")
    return check_output(Recipe(output_dir=str(here.scratch)))


def fill_the_disk(here):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = load_bn_only_model(here.copy("seeded"))
    here.monkeypatch.setattr(os, "replace", full)
    return model.save_pretrained(here.scratch / "full")


def lock_a_file(here):
    folder = here.copy("seeded")
    with without_privileges():
        (folder / CONFIG_NAME).chmod(0)
        load_bn_only_model(folder)


def trained(here, *arguments):
    tiny = ("image_size=8", "epochs=1", "threads=1", f"output_dir={here.scratch / 'run'}")
    return train(read_recipe([*tiny, *arguments]))


def lose_a_process():
    """Be one of two processes, of which the other one ends: tests/training/test_signals.py has a real one."""
    with naming_lost_process(Recipe(timeout=3), SimpleNamespace(num_processes=2)):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")


def answered(here, status):
    here.hub.fail("POST", "/api/repos/create", status, 10)
    push_folder(here.copy("seeded"), "alice/x", token=here.hub.token("alice"))


CASES = {
    "BNAdapterError": lambda here: BNOnlyConfig(seed=-1),
    "ConfigError": lambda here: BNOnlyConfig(seed=-1),
    "UnknownKeyError": lambda here: BNOnlyConfig(sead=0),
    "FormatVersionError": lambda here: load_bn_only_model(here.edited(format_version=3)),
    "NetworkError": lambda here: get_bn_only_model(timm.create_model("test_nfnet")),
    "NoNormLayerError": lambda here: get_bn_only_model(timm.create_model("test_nfnet")),
    "UnknownArchitectureError": lambda here: load_bn_only_model(here.edited(architecture="cifar_resnet15")),
    "MissingModuleError": lambda here: get_bn_only_model(cifar(num_classes=0), BNOnlyConfig(train_head=True)),
    "RebuildError": lambda here: get_bn_only_model(changed_by_hand(), BNOnlyConfig(seed=0)),
    "ReinitError": lambda here: get_bn_only_model(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Bilinear(4, 4, 4)), BNOnlyConfig(seed=0)
    ),
    "AdapterError": lambda here: load_bn_only_model(here.copy("seeded")).add_adapter("two", BNOnlyConfig(seed=1)),
    "AdapterNameError": lambda here: get_bn_only_model(cifar(), BNOnlyConfig(seed=0), adapter_name="layer.1"),
    "AdapterFileError": truncate,
    "AdapterTensorError": drop_a_tensor,
    "FingerprintError": lambda here: load_bn_only_model(here.copy("given"), model=cifar()),
    "BaseRequiredError": lambda here: load_bn_only_model(here.copy("given")),
    "DataError": lambda here: load_splits("digits", label_column="colour"),
    "TooLargeError": lambda here: load_bn_only_model(here.copy("seeded"), max_parameters=1000),
    "HubError": lambda here: answered(here, 422),
    "HubAccessError": lambda here: push_folder(here.copy("seeded"), "bob/x", token="hf_nobody"),
    "HubNotFoundError": lambda here: load_bn_only_model("alice/nothing", token=here.hub.token("alice")),
    "HubConflictError": lambda here: answered(here, 412),
    "HubUnavailableError": lambda here: answered(here, 503),
    "DivergedError": lambda here: trained(here, "lr=1e30"),
    "CollapseError": lambda here: collapse(),
    "CheckpointError": lambda here: read_checkpoint(here.copy("seeded") / CONFIG_NAME),
    "LostProcessError": lambda here: lose_a_process(),
    "OutputFolderError": fill_an_output_folder,
    "FileError": lambda here: trained(here, f"results={here.copy('seeded')}"),
    "FileAccessError": lock_a_file,
    "NoSpaceError": fill_the_disk,
}


def uncovered(cases):
    return set(CLASSES) - set(cases)


def collapse():
    model = get_bn_only_model(timm.create_model("test_resnet", num_classes=4), BNOnlyConfig(seed=0))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(128, 3, 1, 1, generator=generator) * 2 + torch.randn(128, 3, 16, 16, generator=generator)
    adapt_to(model, images.split(32), "tent", lr=0.3, entropy=1, epochs=6)


def test_every_class_has_a_case():
    assert uncovered(CASES) == set()
    assert set(CASES) <= set(CLASSES)
    assert len(CASES) == 31


def test_a_class_without_a_case_would_be_noticed():
    assert uncovered({name: case for name, case in CASES.items() if name != "DataError"}) == {"DataError"}


@pytest.mark.parametrize("name", CASES)
def test_a_real_call_raises_it_with_three_parts(name, folders, tmp_path, monkeypatch, hub):
    with pytest.raises(CLASSES[name]) as caught:
        CASES[name](Here(folders, tmp_path, monkeypatch, hub))
    error = caught.value
    assert name in BASES or type(error) is CLASSES[name]
    assert all(part.strip() for part in (error.what, error.seen, error.do))
    assert str(error) == f"{error.what}\n  seen:  {error.seen}\n  do:    {error.do}"
    assert error.what.rstrip().endswith((".", ";")), "the first part is a sentence"


def raised_in(source):
    """Return the names of the package's errors that some source code makes."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = {getattr(call.func, "id", getattr(call.func, "attr", None)) for call in calls}
    return names & set(CLASSES)


def test_every_class_but_the_base_is_raised_by_the_code():
    files = [*(REPOSITORY / "bn_affine_adapters").rglob("*.py"), *(REPOSITORY / "recipes").glob("*.py")]
    found = {path: raised_in(path.read_text(encoding="utf-8")) for path in files}
    by_status = {kind.__name__ for kind, _ in (*_ADVICE.values(), _OTHERWISE)}
    assert set().union(by_status, *found.values()) == set(CLASSES) - {"BNAdapterError"}
    assert sum(bool(names) for names in found.values()) >= 12, "too few files were read"


def test_an_error_that_is_never_raised_would_be_noticed():
    assert raised_in("from .errors import DataError\ndef f():\n    raise ConfigError('a', seen='b', do='c')") == {
        "ConfigError"
    }


def test_the_base_of_all_errors_is_public():
    assert bn_affine_adapters.BNAdapterError is errors.BNAdapterError
    assert all(issubclass(kind, BNAdapterError) for kind in CLASSES.values())
