"""The state of a training run on disk, from which a killed one goes on: checkpoint.pt in its output folder."""

import io
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BNAdapterError, CheckpointError, ConfigError
from ..sharing.folder import write_file
from .recipe import Recipe, recorded, run_key


def trained_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: trained parameters and buffers."""
    trained = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.requires_grad}
    return {**trained, **dict(network.named_buffers())}


def save_checkpoint(
    path: Path, recipe: Recipe, network: nn.Module, optimizer: Any, scaler: Any, run: dict, generators: list
) -> None:
    """Write what training changes, the optimiser's state and the history so far, whole or not at all.

    Args:
        path: the file.
        recipe: of the run.
        network: whose `trained_tensors` are kept.
        optimizer: of them.
        scaler: of losses in fp16, or None.
        run: the history, and the position in the epoch.
        generators: each process's `generator_states`.

    Raises:
        FileError: it cannot be written, or the disk is full; the checkpoint before is untouched.
    """
    state = {
        "recipe": json.dumps(recorded(recipe), allow_nan=False),
        "tensors": trained_tensors(network),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "run": run,
        "generators": generators,
    }
    content = io.BytesIO()  # torch.save into a file on a full disk ends with an error that does not say so
    torch.save(state, content)
    write_file(path, content.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file cannot be read, or is no checkpoint.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        json.loads(state["recipe"]), dict(state["tensors"]), state["optimizer"], state["scaler"]
        _ = state["run"]["seconds"], [(past["epochs"], past["first_losses"]) for past in state["run"]["replicates"]]
    except Exception as error:  # torch, pickle and zipfile raise many kinds, and advise to unpickle whatever is there
        reason = f"{type(error).__name__}, {path.stat().st_size:,} bytes" if path.exists() else "no such file"
        raise CheckpointError(
            f"{path} is not a whole checkpoint.",
            seen=reason,
            do=f"put back a copy of it, or delete it to start again: rm {shlex.quote(str(path))}",
        ) from error
    return state


def check_recipe(path: Path, state: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise ConfigError unless a checkpoint belongs to a recipe; a key newer than the checkpoint had its default."""
    usual, now = (json.loads(json.dumps(recorded(r))) for r in (Recipe(), recipe))
    before = {**usual, **json.loads(state["recipe"])}
    before["replicates"], now["replicates"] = len(state["run"]["replicates"]), recipe.replicates
    if run_key(before) != run_key(now) or before["replicates"] != now["replicates"]:
        raise ConfigError(
            f"{path} belongs to another recipe.",
            seen=", ".join(f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k]),
            do="resume with the same keys; to start again, overwrite=true resume=false",
        )


def load_checkpoint(path: Path, recipe: Recipe, network: nn.Module, optimizer: Any, scaler: Any) -> tuple[dict, list]:
    """Restore what `save_checkpoint` wrote; return the history and each process's states of generators.

    Raises:
        ConfigError: the checkpoint belongs to another recipe.
        CheckpointError: it is not whole, or does not fit the network.
    """
    state = read_checkpoint(path)
    check_recipe(path, state, recipe)
    ours, kept = trained_tensors(network), state["tensors"]
    try:
        if wrong := [n for n in ours.keys() | kept.keys() if n not in ours or ours[n].shape != kept[n].shape]:
            raise ValueError(f"{len(wrong)} tensors do not fit, e.g. {sorted(wrong)[0]}")
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, BNAdapterError):
            raise
        do = "resume with the versions of the packages that it was started with, or overwrite=true resume=false"
        seen = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} does not fit the network.", seen=seen, do=do) from error
    for name, tensor in ours.items():
        tensor.copy_(kept[name])
    return state["run"], state.get("generators", [])
