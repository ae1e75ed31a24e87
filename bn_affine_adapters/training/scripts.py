"""How a script starts and ends: its options, the base of its adapter, what it ran on, its errors."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DIVERGED, BNAdapterError, ConfigError, DivergedError, NetworkError, reading
from ..settings import Settings
from ..sharing.compact import read_adapter
from ..sharing.hub import fetch
from .advice import as_command_line
from .options import AdapterOptions
from .recipe import Options, help_text, read
from .terminal import naming_files, printing

if TYPE_CHECKING:
    from torch import nn

    from ..model.peft_model import BNOnlyPeftModel
    from .feed import Feed

PACKAGE = Path(__file__).parents[1]


@contextmanager
def installed(extra: str) -> Generator[None, None, None]:
    """Run what needs the packages of an extra.

    Raises:
        ConfigError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        do = f"pip install 'bn-affine-adapters[{extra}]'"
        raise ConfigError("This needs a package that is not installed.", seen=str(error), do=do) from error


def run_script(command: Callable[[list[str]], None], extra: str = "train") -> None:
    """Run a command with the arguments of this process; an error ends it with its three parts.

    The status is 3 if training diverged, 130 after Ctrl-C, else 1.
    """
    with printing(status=1):
        try:
            with installed(extra), naming_files():
                command(sys.argv[1:])
        except BNAdapterError as error:
            text = as_command_line(error, keys=True)
            if not isinstance(error, DivergedError):
                sys.exit(text)
            print(text, file=sys.stderr)
            sys.exit(DIVERGED)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def accuracy_text(dataset: str, split: str, top1: float, images: int) -> str:
    """Return an accuracy as people read it, with the images that it was measured on."""
    return f"{top1:.2f} % top-1 on {Path(dataset).name}/{split} ({images:,} images)"


def read_options(
    arguments: list[str], options: type[Options], script: str, about: str | None, own: Callable[[str], dict[str, Any]]
) -> Options:
    """Merge the defaults, what the adapter says for itself, and the key=value arguments; print ``--help`` and exit.

    Args:
        arguments: of the command line; the first may be the adapter itself, without ``adapter=``.
        options: a dataclass whose fields all have defaults, ``adapter`` among them.
        script: its name in messages, e.g. "bn-adapters validate".
        about: what ``--help`` prints above the keys.
        own: from ``adapter`` to the options that it sets unless they are given.

    Raises:
        UnknownKeyError: an argument's key is no field.
        ConfigError: the arguments are no key=value, or a value is of the wrong type or out of its range.
        FileError: the file of pretrained weights cannot be read.
    """
    if "-h" in arguments or "--help" in arguments:
        print(about, help_text(options()), sep="\n")
        raise SystemExit(0)
    if arguments and "=" not in arguments[0]:
        arguments = [f"adapter={arguments[0]}", *arguments[1:]]
    messages = {"what": script, "do": f"give key=value arguments; {script} --help lists them"}
    given: Any = read(options, arguments, **messages)
    check_readable(given.pretrained_file)
    return read(options, own(given.adapter), arguments, **messages)


def check_readable(file: str | None) -> None:
    """Raise FileError if a file that is needed later cannot be read; there may be none."""
    if file:
        with reading(file):
            Path(file).open("rb").close()


def data_options(adapter: str) -> dict[str, Any]:
    """Return the data options in an adapter's own configuration."""
    from .feed import own_options

    return own_options(read_adapter(fetch(adapter), Settings).data_config)


def as_the_adapter_counts(options: AdapterOptions, feed: "Feed") -> Settings:
    """Number the classes of a feed as an adapter names them, and return the adapter's settings.

    Raises:
        DataError: the network has other classes than the data, or another number of them.
    """
    from .data import check_classes

    config = read_adapter(fetch(options.adapter), Settings)
    if config.label_names:
        feed.number_classes(config.label_names)
    check_classes(feed.test, config.model_args.get("num_classes", len(feed.label_names)))
    return config


def load_adapter(options: AdapterOptions, feed: "Feed") -> "BNOnlyPeftModel":
    """Rebuild and verify an adapter's network for a test split, on its device.

    An adapter without a seed is loaded on the weights of ``pretrained_file``, or on timm's if ``pretrained``. The
    classes of the feed are numbered as the adapter names them.

    Raises:
        DataError: the network has other classes than the data, or another number of them.
    """
    from ..model.loading import load_bn_only_model

    config = as_the_adapter_counts(options, feed)
    given = config.seed is None and (options.pretrained or options.pretrained_file)
    base = timm_network(str(config.architecture), config.model_args, True, options.pretrained_file) if given else None
    return load_bn_only_model(options.adapter, base, device=feed.accelerator.device)


def timm_network(name: str, arguments: dict[str, Any], pretrained: bool, file: str | None = None) -> "nn.Module":
    """Return a network of timm, with the weights of ``file`` instead of timm's download if it is given.

    Raises:
        NetworkError: timm cannot create it, or cannot download or read its weights.
    """
    import timm

    overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments, **overlay)
    except Exception as error:  # every architecture takes arguments, and reads weights, in its own way
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise NetworkError(
            f"timm cannot create the network {name}.",
            seen=f"{type(error).__name__}: {reason}; model_args={arguments}, pretrained={pretrained}",
            do="choose a name of timm.list_models() and arguments that it takes; without a connection to the Hub, give "
            "pretrained_file=FILE.safetensors",
        ) from error


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(package: Path = PACKAGE) -> str | None:
    """Return the commit of a package, if it lies in a git checkout that tracks it, and not just in one's folder."""
    git = ["git", "-C", str(package)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def provenance(accelerator: Any) -> dict[str, Any]:
    """Return what a run ran on: hardware, versions, and this package's commit, if it is a checkout."""
    import torch

    from ..adapter.rebuild import versions

    cuda = accelerator.device.type == "cuda"
    return {
        "hardware": {
            "device": accelerator.device.type,
            "name": torch.cuda.get_device_name() if cuda else platform.machine(),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "commit": commit(),
    }
