"""A run that stops between two steps and resumes is the run that never stopped, whatever is random in it."""

import ast
import copy
import json
import math
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from safetensors.torch import load_file

from bn_affine_adapters import BNOnlyConfig, cli, get_bn_only_model
from bn_affine_adapters.errors import AdapterTensorError, CheckpointError, ConfigError, DivergedError, NoSpaceError
from bn_affine_adapters.training import loop
from bn_affine_adapters.training import train as training
from bn_affine_adapters.training.checkpoint import read_checkpoint
from bn_affine_adapters.training.generators import generator_states, restore_generators

ROOT = Path(__file__).parents[2]
# An epoch has 5 steps.
TINY = ("model=test_resnet", "image_size=8", "held_out=900", "batch_size=128", "epochs=2", "eval_every=2", "threads=1")
RANDOM = {
    "nothing": (),
    "drop path": ("model_args={drop_path_rate: 0.3}",),
    "dropout": ("model_args={drop_rate: 0.5}", "condition=bn+head"),
    "augmentation": ("flip=true", "crop_padding=2"),
    "streaming": ("streaming=true", "flip=true", "workers=0", "model_args={drop_path_rate: 0.3}"),
    "streaming in workers": ("streaming=true", "flip=true", "workers=2", "accumulation=2"),
    "replicates": ("model_args={drop_path_rate: 0.3}", "replicates=2"),
    "all at once": (
        "streaming=true", "flip=true", "workers=1", "condition=all", "model_args={drop_path_rate: 0.3, drop_rate: 0.5}",
        "optimizer=adamw", "accumulation=2",
    ),
}  # fmt: skip
FAST = {("replicates", 6), ("all at once", 3)}  # the other kinds of randomness, and other stops, are slow


@pytest.fixture(scope="module")
def train():
    return import_module("bn_affine_adapters.training.train")


pytestmark = pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")


@pytest.fixture
def tiny(train):
    """Run a small recipe; a number of steps after which a signal comes, or None."""

    def run(output, *arguments, signal_after=None, number=signal.SIGTERM):
        recipe = train.read_recipe([*TINY, f"output_dir={output}", *arguments])
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            if signal_after is not None:
                patch.setattr(loop, "lr_at", signalling(loop.lr_at, signal_after, number))
            return train.train(recipe)[-1].result

    return run


def signalling(lr_at, after, number):
    """The same function, during whose call for the step after so many steps a signal comes."""

    def called(recipe, step, steps):
        if step == after:
            os.kill(os.getpid(), number)
        return lr_at(recipe, step, steps)

    return called


def saved(result):
    folder = Path(result.get("adapter") or result["network"])
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "results.json"}


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        pytest.param(kind, stop, id=f"{name}-{stop}", marks=[] if (name, stop) in FAST else [pytest.mark.slow])
        for name, kind in RANDOM.items()
        for stop in (1, 6, 3)
    ],
)
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not(kind, stop, tiny, tmp_path, capsys):
    whole = tiny(tmp_path / "whole", *kind)
    with pytest.raises(SystemExit) as ended:
        tiny(tmp_path / "cut", *kind, signal_after=stop)
    assert ended.value.code == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped by SIGTERM" in line]
    assert f"{tmp_path}/cut/checkpoint.pt; the same command with resume=true goes on" in line
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    resumed = tiny(tmp_path / "cut", *kind, "resume=true")
    assert resumed["epochs"] == whole["epochs"]
    assert resumed["first_losses"] == whole["first_losses"]
    assert saved(resumed) == saved(whole)


def test_a_checkpoint_is_written_every_so_many_steps_and_leaves_the_result_as_it_is(tiny, tmp_path):
    drawing = RANDOM["drop path"]
    whole = tiny(tmp_path / "whole", *drawing)
    often = tiny(tmp_path / "often", *drawing, "checkpoint_every_steps=4")
    past = torch.load(tmp_path / "often" / "checkpoint.pt", weights_only=True)["run"]
    assert (len(past["replicates"][0]["epochs"]), past["step"], [len(part) for part in past["losses"]]) == (1, 3, [3])
    assert saved(often) == saved(whole)
    again = tiny(tmp_path / "often", *drawing, "checkpoint_every_steps=4", "resume=true")  # from step 8 of 10
    assert saved(again) == saved(whole)


def test_a_checkpoint_from_before_generators_were_kept_resumes_and_says_so(tiny, tmp_path, capsys):
    whole = tiny(tmp_path, "checkpoint_every=1")
    with pytest.raises(SystemExit):
        tiny(tmp_path, "overwrite=true", signal_after=4)  # the last step of the first epoch
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["generators"], state["run"]["step"], state["run"]["losses"], state["run"]["skipped"]
    state["run"]["replicates"][0]["epochs"] = [{"loss": whole["epochs"][0]["loss"]}]
    torch.save(state, path)
    capsys.readouterr()
    resumed = tiny(tmp_path, "resume=true")
    assert "draw other numbers from here on" in capsys.readouterr().err
    assert saved(resumed) == saved(whole)


def test_the_states_of_all_generators_are_restored():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    cpu = torch.device("cpu")
    before = generator_states(cpu)
    expected = draws()
    assert draws() != expected
    restore_generators(before, cpu)
    assert draws() == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", 100, 2000, pickle.dumps({"recipe": "{}"}, 2)],
    ids=["empty", "garbage", "truncated", "half", "pickle"],
)
def test_a_checkpoint_that_is_none_is_one_own_error_and_stays(content, train, tmp_path, refused):
    recipe = train.read_recipe([*TINY, f"output_dir={tmp_path}", "resume=true"])
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, int):
        torch.save({"recipe": "{}", "tensors": {"a": torch.zeros(1000)}}, path)
        content = path.read_bytes()[:content]
    path.write_bytes(content)
    with refused(
        CheckpointError, str(path), f"{len(content):,} bytes", f"delete it to start again: rm {path}"
    ) as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    if content == b"":
        with refused(CheckpointError, str(path)):
            train.train(recipe)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_resume_never_replaces_what_another_recipe_trained(tiny, tmp_path, refused):
    result = tiny(tmp_path, "epochs=1")
    before = saved(result)
    for gone in (None, "result.json"):  # killed before it was written
        if gone:
            (tmp_path / gone).unlink()
        with refused(ConfigError, f"{tmp_path} holds the result of another recipe", "seed: 0 -> 2"):
            tiny(tmp_path, "epochs=1", "resume=true", "seed=2")
        assert saved(result) == before
    assert saved(tiny(tmp_path, "epochs=1", "resume=true")) == before
    assert saved(tiny(tmp_path, "epochs=1", "resume=true", "overwrite=true", "seed=2")) != before


def test_a_run_that_resumes_after_it_wrote_its_line_writes_no_second_one(tiny, tmp_path):
    lines = tmp_path / "lines.jsonl"
    words = "epochs=1", f"results={lines}"
    tiny(tmp_path / "run", *words)
    (tmp_path / "run" / "result.json").unlink()  # killed between the two
    text = lines.read_text()
    lines.write_text(text + '{"recipe": {"seed"')  # and another run in the middle of its line
    tiny(tmp_path / "run", *words, "resume=true")
    assert lines.read_text() == text
    tiny(tmp_path / "run", *words, "resume=true", "overwrite=true", "seed=1")
    assert len(lines.read_text().splitlines()) == 2


# -- values that are not finite


@pytest.mark.parametrize("kind", [(), ("condition=all",), ("replicates=2",), ("precision=bf16",), ("lean=exact",)])
def test_a_run_that_diverges_is_an_error_with_step_and_layer_and_saves_nothing(kind, tiny, tmp_path, refused):
    with refused(DivergedError, "step 2 (epoch 1)", "lr=1e+30", "last good checkpoint: none") as caught:
        tiny(tmp_path, *kind, "lr=1e30")
    assert caught.value.step == 2
    assert caught.value.layer.startswith(("conv1", "bn1", "stem", "layer1", "fc", "layer2")), caught.value.layer
    assert caught.value.checkpoint is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_last_step_may_diverge_too(tiny, tmp_path, monkeypatch, refused):
    lr_at = loop.lr_at
    monkeypatch.setattr(
        loop, "lr_at", lambda recipe, step, steps: math.inf if step == 9 else lr_at(recipe, step, steps)
    )
    with refused(DivergedError, "step 10 (epoch 2)", "is not finite", "checkpoint.pt"):
        tiny(tmp_path, "checkpoint_every_steps=5")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    past = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert past["run"]["step"] == 5
    assert all(tensor.isfinite().all() for tensor in past["tensors"].values())


def test_a_step_whose_loss_is_not_finite_is_skipped_as_if_it_had_not_been(tiny, tmp_path, monkeypatch, refused):
    backward, calls = loop.backward, []

    def blinded(training, batch):
        calls.append(batch)
        return backward(training, batch._replace(images=batch.images * math.inf) if len(calls) in (3, 8) else batch)

    monkeypatch.setattr(loop, "backward", blinded)
    result = tiny(tmp_path / "two", "skip_nonfinite_steps=2")
    assert result["skipped_steps"] == 2
    assert len(result["first_losses"]) == len(calls) - 2 == 8
    assert all(
        tensor.isfinite().all() for tensor in load_file(f"{result['adapter']}/adapter_model.safetensors").values()
    )
    calls.clear()
    with refused(DivergedError, "step 8 (epoch 2)"):
        tiny(tmp_path / "one", "skip_nonfinite_steps=1")


def test_a_run_that_diverges_ends_with_status_3(monkeypatch, tmp_path, capsys):
    words = [*TINY, "lr=1e30", f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / "train.py"), run_name="__main__")
    assert ended.value.code == 3
    assert "DivergedError: Training diverged at step 2" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    done = CliRunner().invoke(cli.main, ["train", *words])
    assert done.exit_code == 3
    assert "DivergedError: Training diverged at step 2" in done.output


def test_no_adapter_is_saved_that_would_not_load(tmp_path, refused):
    model = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, value in (("weight", math.nan), ("running_mean", -math.inf), ("running_var", -1.0)):
        changed = copy.deepcopy(model)
        layer = next(module for key, module in changed.named_modules() if key.endswith("bn1.bn_only_layers.default"))
        with torch.no_grad():
            getattr(layer, name)[0] = value
        with refused(AdapterTensorError, f".{name} has", "1 problems"):
            changed.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_json_of_the_package_is_strict_or_read_by_itself_alone():
    allowed = {
        "training/recipe.py", "training/lines.py", "training/sweeps.py", "training/tune.py",
        "training/checkpoint.py", "settings.py", "adapter/rebuild.py", "adapter/traits.py",
        "study/replicates.py", "study/gpu/gpu_check.py",
    }  # fmt: skip  # keys, comparisons and copies, which no other program reads
    found = {}
    for path in sorted((ROOT / "bn_affine_adapters").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strict = any(keyword.arg == "allow_nan" for keyword in node.keywords)
                found.setdefault(path.relative_to(ROOT / "bn_affine_adapters").as_posix(), []).append(strict)
    assert {name for name, strict in found.items() if not all(strict)} == allowed
    assert sum(map(len, found.values())) >= 15


# -- a full disk


@pytest.mark.parametrize("step", [40_000, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_a_run_loses_nothing_and_the_run_goes_on(step, tiny, small_disk, tmp_path):
    words = "epochs=1", "checkpoint_every_steps=3", "seed=1"
    new = saved(tiny(tmp_path / "whole", *words))
    lines, folder, filler = small_disk / "lines.jsonl", small_disk / "run", small_disk / "filler"
    words += (f"results={lines}", "resume=true", "overwrite=true")
    result = tiny(folder, "epochs=1", f"results={lines}")
    old, line, failed = saved(result), lines.read_text(), []
    for leave in range(0, 160_000, step):
        filler.write_bytes(bytes(max(shutil.disk_usage(small_disk).free - leave, 0)))
        try:
            tiny(folder, *words)
            filler.unlink()
            break
        except NoSpaceError as error:
            failed.append(Path(error.what.removesuffix(".").split()[-1]).name)
        filler.unlink()
        assert saved(result) in (old, new)
        assert lines.read_text().startswith(line)
        assert all(json.loads(text) for text in lines.read_text().splitlines())
        assert json.loads((folder / "result.json").read_text())["recipe"]["seed"] == 0
        assert {path.name for path in folder.iterdir()} <= {"adapter", "checkpoint.pt", "result.json"}
    print(f"no space for: {failed}")
    assert {"run"} <= set(failed) <= {"run", "checkpoint.pt", "adapter", "lines.jsonl", "result.json"}
    assert saved(tiny(folder, *words)) == new
    assert [json.loads(text)["recipe"]["seed"] for text in lines.read_text().splitlines()] == [0, 1]


# Of each write: the function that does it, and at which of its calls the disk is full.
WRITES = {
    "checkpoint.pt": (loop, "save_checkpoint", 2),
    "adapter": (training, "save", 1),
    "lines.jsonl": (training, "append_once", 1),
    "result.json": (training, "write_file", 1),
    "log": (loop, "finish_epoch", 1),
}


def filling(function, number, disk, log):
    """The same function, before whose call of this number the disk becomes full."""
    calls = []

    def called(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            log.write("x" * (4096 - log.tell() % 4096))  # its next character needs room
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        return function(*arguments)

    return called


@pytest.mark.parametrize("write", WRITES)
def test_each_write_of_a_run_may_meet_a_full_disk_and_the_run_goes_on(write, tiny, small_disk, tmp_path, monkeypatch):
    words = "epochs=1", "checkpoint_every_steps=2", "seed=1"
    new = saved(tiny(tmp_path / "whole", *words))
    lines, folder = small_disk / "lines.jsonl", small_disk / "run"
    result = tiny(folder, "epochs=1", f"results={lines}")
    old, first, text = saved(result), (folder / "result.json").read_text(), lines.read_text()
    text = json.dumps("x" * (4080 - len(text) % 4096)) + f"\n{text}"  # the next line needs room
    lines.write_text(text)
    words += f"results={lines}", "resume=true", "overwrite=true"
    with monkeypatch.context() as patch, open(small_disk / "log", "w", buffering=1) as log:
        module, name, number = WRITES[write]
        patch.setattr(module, name, filling(getattr(module, name), number, small_disk, log))
        if write == "log":
            patch.setattr(sys, "stderr", log)
        with pytest.raises(NoSpaceError) as caught:
            tiny(folder, *words)
    assert caught.value.what.endswith(f"{write}." if write != "log" else "the log or a file of the tracker.")
    assert saved(result) == (new if write in ("lines.jsonl", "result.json") else old)
    assert (folder / "result.json").read_text() == first
    assert lines.read_text().startswith(text)
    assert all(json.loads(line) for line in lines.read_text().splitlines())
    assert read_checkpoint(folder / "checkpoint.pt")["run"]["step"] == (2 if write == "checkpoint.pt" else 4)
    (small_disk / "filler").unlink()
    assert saved(tiny(folder, *words)) == new
    assert [json.loads(line)["recipe"]["seed"] for line in lines.read_text().splitlines()[1:]] == [0, 1]
    assert {path.name for path in folder.iterdir()} == {"adapter", "checkpoint.pt", "result.json"}


def test_a_run_whose_result_has_no_room_says_so_before_it_trains(tiny, small_disk, monkeypatch, refused):
    monkeypatch.setattr(loop, "train_epoch", None)  # never called
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000))
    with refused(NoSpaceError, f"{small_disk}/run", "bytes free", "are needed"):
        tiny(small_disk / "run", "condition=all")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
