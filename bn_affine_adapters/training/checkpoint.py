"""The state of a training run on disk, from which a killed one goes on: checkpoint.pt in its output folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .recipe import Recipe, recorded, run_key


def trained_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: trained parameters and buffers."""
    trained = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.requires_grad}
    return {**trained, **dict(network.named_buffers())}


def save_checkpoint(path: Path, recipe: Recipe, network: nn.Module, optimizer: Any, scaler: Any, run: dict) -> None:
    """Write what training changes, the optimiser's state and the history so far, whole or not at all."""
    state = {
        "recipe": json.dumps(recorded(recipe)),
        "tensors": trained_tensors(network),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "run": run,
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, recipe: Recipe, network: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore what `save_checkpoint` wrote; return the history.

    Raises:
        ConfigError: the checkpoint belongs to another recipe.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    usual, now = (json.loads(json.dumps(recorded(r))) for r in (Recipe(), recipe))
    before = {**usual, **json.loads(state["recipe"])}  # a key that is newer than the checkpoint had its default
    before["replicates"], now["replicates"] = len(state["run"]["replicates"]), recipe.replicates
    if run_key(before) != run_key(now) or before["replicates"] != now["replicates"]:
        raise ConfigError(
            f"{path} belongs to another recipe.",
            seen=", ".join(f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k]),
            do="resume with the same keys, or overwrite=true to start again",
        )
    for name, tensor in trained_tensors(network).items():
        tensor.copy_(state["tensors"][name])
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["run"]
