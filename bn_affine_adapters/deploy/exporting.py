"""Write an adapted network for tools that do not know this package: timm, PEFT, ONNX, torch.export; a compact file."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import peft
import timm
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..adapter.method import BNOnlyConfig
from ..errors import (
    AdapterError,
    BNAdapterError,
    ConfigError,
    OutputFolderError,
    RebuildError,
    check_choice,
    check_keys,
    reading,
)
from ..model.peft_model import BNOnlyPeftModel
from ..norms.find import logits_of, named_layers
from ..seed.rules import constants_only
from ..settings import PEFT_PREFIX, hub_id, zoo_of
from ..sharing.folder import written_whole
from .compact import write_compact
from .graphs import FORMATS as GRAPHS
from .graphs import as_inputs, write_arrays, write_graph

# The keys that an export keeps of timm's configuration, the origin only for given weights, and of data_config.
_ORIGIN = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
OPTIONS = dict.fromkeys(("bits", "images", "test", "qr"), ("compact",)) | {"adapter": GRAPHS}  # and their formats
_DATA = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def export(
    model: BNOnlyPeftModel, folder: str | os.PathLike[str],
    format: Literal["timm", "ln_tuning", "compact", "onnx", "pt2", "npz"] = "timm",
    adapter_name: str | None = None, **options: Any,
) -> Path:  # fmt: skip
    """Write a network for timm or as a graph, or an adapter for PEFT, a compact file, a graph; no model is changed.

    Args:
        model: what `get_bn_only_model` or `load_bn_only_model` returned.
        folder: does not exist yet, or is empty; for all formats but "timm" and "ln_tuning" it is a file.
        format: "timm" is for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, in float32; "ln_tuning" for
            ``peft.PeftModel.from_pretrained(base, FOLDER)`` with the base ``load_bn_only_model(adapter).unload()``;
            "compact" for `load_bn_only_model`, for inference alone; "onnx" for onnxruntime, "pt2" for
            ``torch.export.load``; "npz" is an adapter for a graph that was written with ``adapter="inputs"``.
        adapter_name: by default the active adapter.
        options: of "compact": see `bn_affine_adapters.deploy.compact.write_compact`. Of "onnx" and "pt2": ``adapter``,
            "inside", or "inputs" for a graph that takes the arrays of any adapter of this backbone beside the images.

    Returns:
        The folder or file. Before this returns, it has been loaded with the same logits, ONNX if onnxruntime is there.

    Raises:
        OutputFolderError, FileError: the folder is not empty, or the file exists; it cannot be written.
        NetworkError: timm does not build the same network (RebuildError), or torch.export or ONNX does not take it.
        AdapterError: there is no one such adapter, the result gives other logits, or statistics do not fold.
        ConfigError: there is no such format or option, or the network takes no images of data_config's size.

    >>> import tempfile, timm
    >>> from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
    >>> model = get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in export(model, folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    _check_options(format, options)
    return _write(model, _chosen(model, adapter_name), Path(folder), format, options)


def _write(model: BNOnlyPeftModel, name: str, folder: Path, format: str, options: dict[str, Any]) -> Path:
    if format == "compact":
        return write_compact(model, name, folder, **options)
    if format == "npz":
        return write_arrays(model, name, folder)
    if format in GRAPHS:
        return _write_graph(model, name, folder, format, **options)
    with written_whole(_empty(folder)) as files:
        (_write_timm if format == "timm" else _write_ln_tuning)(_merged(model, name), model.peft_config[name], files)
    return folder


def _check_options(format: str, options: dict[str, Any]) -> None:
    check_choice("format", format, ("timm", "ln_tuning", "compact", *GRAPHS, "npz"))
    check_keys(options, OPTIONS, "export")
    for key in options:
        if format not in OPTIONS[key]:
            do = f"leave it out, or format={' or '.join(OPTIONS[key])}"
            raise ConfigError(f"{key}: for the {OPTIONS[key][0]} format.", seen=f"format={format}", do=do)


def _write_graph(model: BNOnlyPeftModel, name: str, file: Path, format: str, adapter: str = "inside") -> Path:
    check_choice("adapter", adapter, ("inside", "inputs"))
    config = model.peft_config[name]
    if adapter == "inputs":
        network, arrays = as_inputs(model, name)
        return write_graph(network, arrays, config, _creation(network.network, config)[1], file, format)
    plain = _merged(model, name).float()
    return write_graph(plain, {}, config, _creation(plain, config)[1], file, format)


def export_network(network: nn.Module, config: BNOnlyConfig, folder: str | os.PathLike[str]) -> Path:
    """Write a network of timm that trained as a whole, as `export` does; the network is not changed.

    Args and Raises: as in `export`; ``config`` has the architecture, model_args, data_config and label_names.
    """
    with written_whole(_empty(folder)) as files:
        _write_timm(_on_cpu(deepcopy(network)), config, files)
    return Path(folder)


def _chosen(model: BNOnlyPeftModel, adapter_name: str | None) -> str:
    names = model.active_adapters if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in model.peft_config:
        seen, do = f"{len(names)}: {', '.join(names)}", f"choose adapter_name from {', '.join(model.peft_config)}"
        raise AdapterError("One adapter is exported: the one named, or the only active one.", seen=seen, do=do)
    return names[0]


def _empty(folder: str | os.PathLike[str]) -> Path:
    """Return the full path of a folder that does not exist or is empty.

    Raises:
        OutputFolderError: it is a file, or not empty.
    """
    path = Path(folder).resolve()
    with reading(path):
        names = sorted(file.name for file in path.iterdir())[:5] if path.is_dir() else []
    if seen := "a file" if path.is_file() else ", ".join(names):
        raise OutputFolderError(f"{path} is not an empty folder.", seen=seen, do="export to a new folder")
    return path


def _merged(model: BNOnlyPeftModel, name: str) -> nn.Module:
    """Return a copy of one adapter's plain network."""
    copy = deepcopy(model)
    copy.unmerge_adapter()
    return _on_cpu(copy.merge_and_unload(adapter_names=[name]))


def _on_cpu(plain: nn.Module) -> nn.Module:
    plain.eval().requires_grad_(False)
    return plain.to("cpu").to(memory_format=torch.contiguous_format)  # in another format sums round differently


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    # Cloned, because safetensors refuses tensors that share memory.
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def _creation(plain: nn.Module, config: BNOnlyConfig) -> tuple[dict[str, Any], list[int] | None, bool]:
    """Return (creation arguments, input size (C, H, W) if known, whether this is the only size that it takes)."""
    cfg: Any = getattr(plain, "pretrained_cfg", None) or {}
    args, size = dict(config.model_args), (config.data_config or {}).get("input_size") or cfg.get("input_size")
    if not size or not cfg.get("input_size"):
        return args, size, False
    if strict := bool(cfg.get("fixed_input_size")):  # otherwise timm builds the network for data_config's size
        height, width = cfg["input_size"][1:]
        own = args.setdefault("img_size", height if height == width else [height, width])  # not all take a list
        strict = not args.get("dynamic_img_size") and args.get("strict_img_size", True)
        size = [0, *([own, own] if isinstance(own, int) else own)] if strict else size
    return args, [args.get("in_chans", cfg["input_size"][0]), *size[1:]], strict


def _write_timm(plain: nn.Module, config: BNOnlyConfig, folder: Path) -> None:
    if zoo_of(config.architecture) != "timm":
        what = "timm cannot build a network of own code or of another library, and so could not load the export."
        do = 'format="ln_tuning", or save the state dict of the network that merge_and_unload() returns'
        raise RebuildError(what, seen=f"architecture={config.architecture!r}", do=do)
    args, size, strict = _creation(plain, config)
    kept = ("first_conv", "classifier", *(_ORIGIN if config.seed is None else ()))
    cfg = {key: value for key, value in vars(plain)["pretrained_cfg"].items() if key in kept}
    cfg |= {key: value for key, value in (config.data_config or {}).items() if key in _DATA}
    cfg |= {"input_size": size, "fixed_input_size": strict, "num_classes": plain.num_classes}
    if args.get("in_chans", 3) != 3:
        cfg["first_conv"] = None  # timm before 1.0.31 expects three channels there, and redraws it at random
    tensors, cfg["architecture"] = _tensors(plain), config.architecture
    # timm's own attributes describe the base with its head and arguments, and may not fit into JSON.
    vars(plain).update(state_dict=lambda: tensors, pretrained_cfg=cfg, _model_args={})
    timm.models.save_for_hf(plain, folder, {"label_names": config.label_names}, safe_serialization=True)
    content = json.loads((file := folder / "config.json").read_text()) | {"model_args": args, "pretrained_cfg": cfg}
    file.write_text(json.dumps(content, indent=2, allow_nan=False))  # ASCII, as timm's own
    cfg["file"] = str(folder / "model.safetensors")  # not "local-dir:", which some versions of timm parse as a URL
    expected = _answers(plain, size)
    with _noticing(RebuildError, "timm does not load the export as the same network."):
        with constants_only():
            again = timm.create_model(config.architecture, pretrained=True, pretrained_cfg=cfg, **args)
        _compare(tensors | expected, again.state_dict() | _answers(again, size))


def _write_ln_tuning(plain: nn.Module, config: BNOnlyConfig, folder: Path) -> None:
    # Heads too, each of their layers by itself: PEFT loads no nested keys, and would wrap modules_to_save.
    owned, mark = named_layers(plain, config.target_modules, "of the adapter"), ".ln_tuning_layers."
    parts = ((f"{n}.{inner}".strip("."), part) for n, layer in owned.items() for inner, part in layer.named_modules())
    layers = {name: part for name, part in parts if part._parameters or part._buffers}
    tensors = {f"{PEFT_PREFIX}{n}{mark}{key}": t for n, part in layers.items() for key, t in _tensors(part).items()}
    about = {
        "format": "pt",
        "bn_only_config": json.dumps(config.to_dict(), allow_nan=False),
    }  # tells which base this is for
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=about)
    # PEFT matches a list against the ends of names, but a pattern against whole names.
    stock_config = peft.LNTuningConfig(target_modules="|".join(map(re.escape, layers)), inference_mode=True)
    stock_config.base_model_name_or_path = hub_id(config.base_model_name_or_path) if config.seed is None else None
    stock_config.save_pretrained(str(folder))
    size = _creation(plain, config)[1]
    expected = _answers(plain, size)
    for layer in layers.values():  # set to zero, so that correct values must come from the file
        layer.load_state_dict({k: t * 0 for k, t in layer.state_dict().items()})
    what = "Stock PEFT does not load the export as the same network."
    with _noticing(AdapterError, what), warnings.catch_warnings(action="ignore"):  # one for each BatchNorm
        stock = peft.PeftModel.from_pretrained(plain, str(folder), torch_device="cpu")
        held = {k.replace(f"{mark}default.", mark): t for k, t in stock.state_dict().items() if mark in k}
        _compare(tensors | expected, held | _answers(stock, size))


def _answers(model: nn.Module, size: list[int] | None) -> dict[str, torch.Tensor]:
    """Return the network's outputs for two images, in float32, by number; none if the size of its images is unknown."""
    if size is None:
        return {}
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    with _noticing(ConfigError, f"The network does not take images of data_config's size {size}."), torch.no_grad():
        outputs = logits_of(model.float().eval()(images))
    return {f"output {i}": part for i, part in enumerate(outputs if isinstance(outputs, tuple | list) else [outputs])}


def _compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [key for key in ours if key in theirs and not _same(ours[key].to(theirs[key].dtype), theirs[key])]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(ours)} tensors differ, the first is {wrong[0]}")


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Tell whether two tensors are equal, with NaN in the same places: a network that diverged can be exported too."""
    numbers = ours.nan_to_num(), theirs.nan_to_num()
    return ours.shape == theirs.shape and ours.isnan().equal(theirs.isnan()) and numbers[0].equal(numbers[1])


@contextmanager
def _noticing(kind: type[BNAdapterError], what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause, do = error.__cause__ or error, "choose the other format, or model.save_pretrained(folder)"
        raise kind(what, seen=f"{type(cause).__name__}: {cause}", do=do) from error
