"""BNOnlyPeftModel: PEFT's model with honest counts, whole files and nothing unpickled, on every path."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .errors import AdapterFileError, ConfigError, NoSpaceError
from .layer import BNOnlyLayer


class BNOnlyPeftModel(PeftModel):
    """What `get_bn_only_model`, `peft.get_peft_model` and `PeftModel.from_pretrained` return for a BNOnlyConfig."""

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
        if folder.is_dir():
            check_files(folder)
        known = adapter_name in self.peft_config
        try:
            return super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        except Exception:
            if not known and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise


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


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checked adapter folder."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # safe_open is no mapping
