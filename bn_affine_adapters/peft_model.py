"""BNOnlyPeftModel: PEFT's model with honest counts, whole files and nothing unpickled, on every path."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import BN_ONLY, BNOnlyConfig
from .errors import AdapterError, AdapterFileError, ConfigError, NoSpaceError
from .layer import BNOnlyLayer


class BNOnlyPeftModel(PeftModel):
    """What `get_bn_only_model`, `peft.get_peft_model` and `PeftModel.from_pretrained` return for a BNOnlyConfig."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Wrap a network and stay in its mode. Args: as `peft.PeftModel`."""
        super().__init__(model, *args, **kwargs)
        self.training = model.training

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trained, all) parameters of the network as the active adapter runs it, each counted once."""
        elsewhere: set[int] = set()
        for layer in self.modules():
            if isinstance(layer, BNOnlyLayer):
                elsewhere |= {id(p) for p in layer.parameters()} - {id(p) for p in layer.active_module().parameters()}
        used = [p for p in self.parameters() if id(p) not in elsewhere]
        return sum(p.numel() for p in used if p.requires_grad), sum(p.numel() for p in used)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors, each whole or not at all.

        Args: as `peft.PeftModel.save_pretrained`.

        Raises:
            ConfigError: ``safe_serialization=False`` asks for a pickle.
            NoSpaceError: the disk is full; an adapter that was there before is untouched.
        """
        if not safe_serialization:
            raise ConfigError("An adapter is never pickled.", seen="safe_serialization=False", do="leave it out")
        if any(layer.merged for layer in self.modules() if isinstance(layer, BNOnlyLayer)):
            raise AdapterError(
                "A merged adapter cannot be saved: its layers have changed places with the base's.",
                seen=f"merged: {', '.join(self.active_adapters)}",
                do="model.unmerge_adapter() first, or save the network that merge_and_unload() returns",
            )
        kwargs.setdefault("save_embedding_layers", False)  # "auto" would look the base up on the network
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            super().save_pretrained(str(scratch), True, *args, **kwargs)
            for file in sorted(scratch.rglob("*")):
                place = target / file.relative_to(scratch)
                if file.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    os.replace(file, place)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
                raise
            raise NoSpaceError(
                f"There is no space left to save the adapter in {target}.",
                seen=f"{shutil.disk_usage(target).free:,} bytes free",
                do="free some space and save again; what was there before is untouched",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write no card on save: PEFT's template is for language models."""

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter's tensors, refusing anything but a whole safetensors file; undone when it fails.

        Args: as `peft.PeftModel.load_adapter`.

        Raises:
            AdapterFileError: the file is missing, truncated or a pickle.
            AdapterTensorError: its tensors do not fit the network.
        """
        folder = Path(model_id, kwargs.get("subfolder") or "")
        known = adapter_name in self.peft_config
        if folder.is_dir():
            check_files(folder)
            config = read_config(folder)
            if known:
                _check_same(config, self.peft_config[adapter_name], adapter_name)
        try:
            return super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        except Exception:
            if not known and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise


def _check_same(theirs: BNOnlyConfig, ours: BNOnlyConfig, name: str) -> None:
    keys = ["seed", "weight_init", "architecture", "backbone_fingerprint"]
    keys += ["target_modules"] if theirs.norm_layers is not None else []
    different = [key for key in keys if getattr(theirs, key) != getattr(ours, key)]
    if different:
        raise AdapterError(
            f"The adapter {name!r} of this network is another one: its tensors cannot be replaced by these.",
            seen=f"different: {', '.join(different)}",
            do="load it under a name of its own",
        )


def check_files(folder: Path) -> None:
    """Raise AdapterFileError unless a folder holds a configuration and a readable safetensors file."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    here = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else None
    seen = "no such folder" if here is None else f"the folder holds {', '.join(here) or 'nothing'}"
    for file in (folder / CONFIG_NAME, weights):
        if file.is_file():
            continue
        pickled = file == weights and (folder / WEIGHTS_NAME).exists()
        raise AdapterFileError(
            f"{folder} has no {file.name}" + (f"; {WEIGHTS_NAME} is a pickle and is never loaded." if pickled else "."),
            seen=seen,
            do="give a folder that model.save_pretrained(...) wrote",
        )
    try:
        with safe_open(weights, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{weights} is not a whole safetensors file.",
            seen=f"{weights.stat().st_size:,} bytes; {error}",
            do="download or save the adapter again",
        ) from error


def read_config(folder: Path) -> BNOnlyConfig:
    """Read and check an adapter folder's configuration.

    Raises:
        AdapterFileError: it is not JSON, or belongs to another PEFT method.
        UnknownKeyError, FormatVersionError, ConfigError: a key or value is not usable, or it names no network.
    """
    path = folder / CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFileError(
            f"{path} is not a JSON file.", seen=str(error), do="download or save the adapter again"
        ) from error
    method = content.get("peft_type") if isinstance(content, dict) else None
    if method != BN_ONLY:
        raise AdapterFileError(
            f"{folder} holds no adapter of norm layers.", seen=f"peft_type={method!r}", do="load it with peft itself"
        )
    config = BNOnlyConfig(**BNOnlyConfig.check_kwargs(**content))
    if config.architecture is None or config.fresh:
        raise ConfigError(
            f"{folder} does not say which network it belongs to.",
            seen=f"architecture={config.architecture!r}, backbone_fingerprint={config.backbone_fingerprint!r}",
            do="save the adapter again with model.save_pretrained",
        )
    return config
