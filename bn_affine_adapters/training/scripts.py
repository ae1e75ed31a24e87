"""A script's options, the base of its adapter, and what it ran on."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from ..adapter.config import BNOnlyConfig
from ..adapter.rebuild import versions
from ..errors import ConfigError, check_keys

Options = TypeVar("Options")


def read_options(
    arguments: list[str], options: type[Options], script: str, about: str | None, own: Callable[[str], dict[str, Any]]
) -> Options:
    """Merge the defaults, what the adapter says for itself, and the key=value arguments; print ``--help`` and exit.

    Args:
        arguments: of the command line.
        options: a dataclass whose fields all have defaults, ``adapter`` among them.
        script: its name in messages, e.g. "evaluate.py".
        about: what ``--help`` prints above the keys.
        own: from ``adapter`` to the options that it sets unless they are given.

    Raises:
        UnknownKeyError: an argument's key is no field.
        ConfigError: the arguments are no key=value, or a value is of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults, names = vars(options()), [field.name for field in fields(options)]  # type: ignore[arg-type]  # a dataclass
    if "-h" in arguments or "--help" in arguments:
        print(about, *(f"  {name}={json.dumps(defaults[name])}" for name in names), sep="\n")
        raise SystemExit(0)
    try:
        given = OmegaConf.from_cli(arguments)
        check_keys(dict(given), set(names), script)
        adapter = given.get("adapter", defaults["adapter"])
        merged = OmegaConf.merge(OmegaConf.structured(options), own(adapter), given)
        return options(**OmegaConf.to_container(merged))  # type: ignore[arg-type]  # OmegaConf promises no str keys
    except OmegaConfBaseException as error:
        raise ConfigError(
            "The arguments cannot be read.", seen=str(error).splitlines()[0], do=f"recipes/{script} --help"
        ) from error


def given_base(config: BNOnlyConfig, pretrained: bool, file: str | None) -> nn.Module | None:
    """Return the base with timm's weights, or those of a file, for an adapter without a seed; None where none is meant.

    Args:
        config: the adapter's.
        pretrained: take the weights that timm names for the architecture.
        file: take these instead.
    """
    if config.seed is not None or not (pretrained or file):
        return None
    overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    return timm.create_model(config.architecture, pretrained=True, **config.model_args, **overlay)


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance(accelerator: Any, checkout: Path) -> dict[str, Any]:
    """Return what a run ran on: hardware, versions, and the commit of its script's checkout, if that is one."""
    cuda = accelerator.device.type == "cuda"
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return {
        "hardware": {
            "device": accelerator.device.type,
            "name": torch.cuda.get_device_name() if cuda else platform.machine(),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
    }
