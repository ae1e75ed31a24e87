"""A run that stops between two steps and resumes is the run that never stopped, whatever is random in it."""

import os
import random
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import each_once

from bn_affine_adapters.training import loop

# An epoch has 5 steps of the digits in memory; streaming leaves the last, smaller one out.
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


@pytest.fixture(scope="module")
def train():
    return import_module("bn_affine_adapters.training.train")


@pytest.fixture(autouse=True)
def each_run_begins_as_in_a_process_of_its_own():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


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


@each_once(kind=RANDOM, stop=[1, 6, 3])
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
