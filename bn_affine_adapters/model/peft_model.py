"""BNOnlyPeftModel: PEFT's model with correct counts, files that are complete or absent, and no pickles."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..adapter.checks import choose_layers
from ..adapter.control import Control
from ..adapter.layer import adapter_layers
from ..adapter.method import BNOnlyConfig
from ..adapter.mixed import split_logits
from ..adapter.rebuild import create_pretrained, verify
from ..adapter.tensors import value_problem
from ..errors import AdapterError, AdapterTensorError, BNAdapterError, ConfigError, check_adapter, check_choice
from ..lean import Report, lean_, plain_
from ..settings import CUSTOM, LEAN, SAFETENSORS_WEIGHTS_NAME, hub_id
from ..sharing.card import write_card
from ..sharing.contents import read_tensors
from ..sharing.folder import check_files, check_header, read_config, writing, written_whole
from ..sharing.hub import cached_commit, fetch, fetch_base, push_folder


class BNOnlyPeftModel(PeftModel):
    """What `get_bn_only_model`, `peft.get_peft_model` and `PeftModel.from_pretrained` return for a BNOnlyConfig."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Wrap a network and keep its mode. Args: as in `peft.PeftModel`."""
        super().__init__(model, *args, **kwargs)
        self.training = model.training
        self._checked: tuple[Any, ...] = ()  # the last DistributedDataParallel and adapters that fit each other

    def get_base_model(self) -> nn.Module:
        """Return the network, with its per-adapter layers; it runs as it is when no adapter is left."""
        return self.base_model.model

    def forward(self, *args: Any, adapter_names: list[str] | None = None, padded: bool = False, **kwargs: Any) -> Any:
        """Run the network with the active adapter, or each image with an adapter of its own.

        Args:
            args: of the network: the images.
            adapter_names: of each image, the name of its adapter, or "__base__" for none. In evaluation mode, and
                without gradients. All images pass the frozen layers together.
            padded: where heads have different widths, return one tensor, (N, classes of the widest), with -inf for
                classes that an image's head does not have.
            kwargs: of the network.

        Returns:
            What the network returns; with heads of different widths a list of logits, (classes,) for each image.

        Raises:
            AdapterError: a name is unknown, the list is not as long as the batch, the model trains or is merged, or the
                images of several adapters cannot pass a layer together.
        """
        if adapter_names is None:
            return super().forward(*args, **{**kwargs, "padded": True} if padded else kwargs)
        tuner = self.base_model
        batch = tuner.batch_of(adapter_names, args, kwargs)
        with torch.no_grad():
            logits = tuner.mixture.run(tuner.model, batch, *args, **kwargs)
        return split_logits(logits, batch, padded)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse what PEFT would ignore, whenever it runs the network (`forward` and others)."""
        ignored = [key for key in sorted(self.special_peft_forward_args) if kwargs.get(key) is not None]
        if ignored:
            raise AdapterError(
                "Only the forward of the model takes several adapters: here all images go through the active one.",
                seen=f"{ignored[0]}={kwargs[ignored[0]]!r}"[:200],
                do="model(images, adapter_names=[...]), or one batch for each adapter after model.set_adapter(name)",
            )
        if not torch.compiler.is_compiling():
            self._check_distributed()
        yield

    def _check_distributed(self) -> None:
        """Raise AdapterError if the DistributedDataParallel that runs this network was built for another adapter."""
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        now = (id(ddp), *self.active_adapters)
        buckets = getattr(getattr(ddp, "reducer", None), "_get_zeros_like_grad_buckets", None)
        if buckets is None or now == self._checked or not torch.is_grad_enabled():
            return
        reduced = {id(parameter) for bucket in buckets() for parameter in bucket.parameters()}
        alone = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in reduced]
        if alone:
            raise AdapterError(
                "DistributedDataParallel would not share the gradients of this adapter: it was built for another one.",
                seen=f"active: {', '.join(self.active_adapters)}; {len(alone)} parameters, the first is {alone[0]}",
                do="DistributedDataParallel(model) again after model.set_adapter(name)",
            )
        self._checked = now

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trained, all) parameters of the network as the active adapter runs it, each counted once."""
        elsewhere: set[int] = set()
        replaced = 0
        for layer in adapter_layers(self):
            active = layer.active_module()
            used = {id(p) for p in active.parameters()}
            if isinstance(active, Control):
                used |= {id(p) for p in active.conv.parameters()}
                replaced += active.replaced
            elsewhere |= {id(p) for p in layer.parameters()} - used
        counted = [p for p in self.parameters() if id(p) not in elsewhere]
        return sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted) - replaced

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors, each whole or not at all.

        Every frozen value is compared with the fingerprint written when the network was wrapped.

        Args: as in `peft.PeftModel.save_pretrained`.

        Raises:
            AdapterError: the network has changed since it was wrapped, so that loading would give another one.
            ConfigError: ``safe_serialization=False`` asks for a pickle.
            AdapterTensorError: a value is not finite, so that the adapter could not be loaded again.
            FileError: the folder cannot be written, or the disk is full; an adapter there before is untouched.
        """
        if not safe_serialization:
            raise ConfigError("An adapter is never pickled.", seen="safe_serialization=False", do="leave it out")
        if not self.peft_config:
            seen, do = "all adapters were deleted", "model.add_adapter(name, config) first"
            raise AdapterError("There is no adapter to save.", seen=seen, do=do)
        for name in self.peft_config if selected_adapters is None else selected_adapters:
            if name in self.peft_config:  # PEFT refuses the others
                self.base_model.check_unchanged(name)
        kwargs.setdefault("save_embedding_layers", False)  # "auto" would ask the Hub for the base
        target = Path(save_directory)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as scratch:
            super().save_pretrained(str(scratch), True, selected_adapters, *args, **kwargs)
            for file in scratch.rglob(SAFETENSORS_WEIGHTS_NAME):
                _check_values(file)

    def set_lean(self, level: str | None, input_size: tuple[int, ...] | None = None) -> Report | None:
        """Turn lean training on or off, see `bn_affine_adapters.lean.lean_`; return what it saves.

        Args:
            level: "exact", "rounded", "smallest", or None for the plain network.
            input_size: of the image with which it is measured, (C, H, W); by default that of data_config.

        Raises:
            ConfigError: there is no such level.
        """
        check_choice("lean", level, LEAN)
        plain_(self.get_base_model())
        self.base_model.lean = None
        if level is not None:
            active = self.peft_config.get(self.active_adapter)
            data = (active.data_config if active else None) or {}
            self.base_model.lean = lean_(self.get_base_model(), level, input_size or data.get("input_size"))
        return self.base_model.lean

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write no card when saving: PEFT's is for language models, and ours needs the repository's name."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_name: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: Any = None,
        use_temp_dir: Any = None,
        **options: Any,
    ) -> CommitInfo:
        """Push an adapter in one commit: its two files, the model card with a figure, and the results.

        Args:
            repo_id: "me/name", or "name" for the token's owner; created if it does not exist.
            adapter_name: by default the active adapter.
            safe_serialization: only True; an adapter is never pickled.
            max_shard_size: ignored; PEFT passes it, but an adapter is one file.
            use_temp_dir: ignored; older callers pass it.
            options: of `hub.push_folder`: private, token, revision (a branch), create_pr, commit_message,
                commit_description, tag, card; and of `card.write_card`: results, license, tags, datasets.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns.

        Raises:
            HubError: the push failed. The adapter is kept in a folder that the message or a note of the error names.
            AdapterError: there is no such adapter.
        """
        name = adapter_name or self.active_adapter
        check_adapter(name, self.peft_config, "to push")
        config = self.peft_config[name]
        if config.seed is None and hub_id(config.base_model_name_or_path) is None:
            _pin_base(config, self.get_base_model())
        scratch = Path(tempfile.mkdtemp(prefix="bn-adapter-"))
        try:
            self.save_pretrained(scratch, safe_serialization, selected_adapters=[name])
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        folder = scratch if name == "default" else scratch / name
        try:
            # The results are written to the folder too, so that a failed push can be resumed from it.
            write_card(folder, repo_id, results=options.pop("results", ()), write_readme=False)
            commit = push_folder(folder, repo_id, **options)
        except BaseException as error:
            error.add_note(f"The adapter is kept in {folder}")
            raise
        shutil.rmtree(scratch, ignore_errors=True)
        return commit

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate an adapter: its norm layers, statistics, head, number of classes and label names.

        Args:
            adapter_name: of an adapter that is loaded.
            inference_mode: nothing requires a gradient then. Switching takes less than a millisecond, however many
                adapters there are.

        Raises:
            AdapterError: there is no such adapter.
        """
        check_adapter(adapter_name, self.peft_config, "to activate")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, also the last one: the network then runs without an adapter.

        Raises:
            AdapterError: there is no such adapter, or it is merged.
        """
        check_adapter(adapter_name, self.peft_config, "to delete")
        super().delete_adapter(adapter_name)

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter from a complete safetensors file; if loading fails, the model is as before.

        Args: as in `peft.PeftModel.load_adapter`; ``model_id`` is a folder or a Hub id.

        Raises:
            AdapterFileError: the file is missing, truncated or a pickle.
            AdapterTensorError: its tensors do not fit the network.
            HubError: the adapter is not on the Hub, needs another token, or the Hub cannot be reached.
        """
        where: dict[str, Any] = {key: kwargs.pop(key, None) for key in ("revision", "subfolder", "token", "cache_dir")}
        folder = fetch(model_id, **where, local_files_only=bool(kwargs.pop("local_files_only", False)))
        known = self.peft_config.get(adapter_name)
        check_files(folder, max_parameters=None)
        config = read_config(folder)
        if known is not None:
            _check_same(config, known, adapter_name)
        if known is not None and known.built_here:
            known.built_here = False  # this file's header was compared with the outline; that of the next one was not
        else:
            choose_layers(self.get_base_model(), config)
            check_header(folder, self.get_base_model(), config)
        read_tensors(folder, config)
        try:
            return super().load_adapter(str(folder), adapter_name, *args, **kwargs)
        except Exception:
            if known is None and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise


def _check_values(file: Path) -> None:
    """Raise AdapterTensorError if a file holds values that no adapter is loaded with."""
    problems = [f"{name} has {p}" for name, tensor in load_file(file).items() if (p := value_problem(name, tensor))]
    if problems:
        raise AdapterTensorError(
            "This adapter could not be loaded again, and is not saved.",
            seen=f"{len(problems)} problems; {'; '.join(sorted(problems)[:3])}",
            do="train again with a smaller learning rate",
        )


def _pin_base(config: BNOnlyConfig, network: nn.Module) -> None:
    """Record the repository and commit of pretrained weights, if those in the client's cache are the network's."""
    repo = (getattr(network, "pretrained_cfg", None) or {}).get("hf_hub_id")
    commit = cached_commit(repo) if repo and config.architecture != CUSTOM else None
    if commit is None:
        return
    pinned = deepcopy(config)
    pinned.base_model_name_or_path, pinned.revision, pinned.verify = repo, commit, "full"
    try:
        file = fetch_base(pinned, local_files_only=True)
        verify(create_pretrained(str(config.architecture), config.model_args, file), pinned)
    except BNAdapterError:
        return  # other weights; the card says that they have to be passed as model=
    config.base_model_name_or_path, config.revision = repo, commit


def _check_same(theirs: BNOnlyConfig, ours: BNOnlyConfig, name: str) -> None:
    keys = ["seed", "weight_init", "architecture", "backbone_fingerprint"]
    keys += ["target_modules"] if theirs.norm_layers is not None else []
    different = [key for key in keys if getattr(theirs, key) != getattr(ours, key)]
    if different:
        raise AdapterError(
            f"The adapter {name!r} of this network has other settings, so that these tensors cannot replace its own.",
            seen=f"different: {', '.join(different)}",
            do="load it under another name",
        )
