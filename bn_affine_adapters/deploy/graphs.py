"""Write a network as one graph that other runtimes run: ONNX or torch.export, its adapter inside or as inputs.

With the adapter as inputs one file of the backbone serves many adapters, each an .npz file of a few kilobytes: all that
an adapter holds, gamma and beta with the statistics folded into them, a head, a control.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ..adapter.fold import copies, parameters
from ..adapter.method import BNOnlyConfig
from ..errors import AdapterError, BNAdapterError, ConfigError, NetworkError
from ..model.peft_model import BNOnlyPeftModel
from ..settings import CUSTOM
from ..sharing.folder import write_file
from .compact import folded, new_file

FORMATS = ("onnx", "pt2")
METADATA = "bn_only_config"  # the adapter's configuration as JSON, in the file's metadata
IMAGES, LOGITS = "images", "logits"  # names in the graph
TRACED, CHECKED = 2, 3  # images in a batch
TOLERANCE = 1e-4  # of the largest logit, or of 1
MOST_BYTES = 2**31 - 2**20  # of one ONNX file, less its own header


class WithInputs(nn.Module):
    """A network whose adapter is given with the images."""

    def __init__(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Hold a network. Args: ``paths`` says for each input which of the network's parameters it is."""
        super().__init__()
        self.network, self.paths = network, dict(paths)

    def forward(self, images: torch.Tensor, adapter: dict[str, torch.Tensor]) -> Any:
        """Run the network with these parameters in place of its own."""
        return functional_call(self.network, {self.paths[key]: value for key, value in adapter.items()}, (images,))


def as_inputs(model: BNOnlyPeftModel, name: str) -> tuple[WithInputs, dict[str, torch.Tensor]]:
    """Return a network that takes its adapter as an input, and the adapter's tensors by name; the model stays.

    The names begin with a digest of the network, so that a graph refuses an adapter of another one.

    Raises:
        AdapterError: statistics do not fold into gamma and beta, or a value is not finite.
    """
    copy, config = folded(model, name), model.peft_config[name]
    for other in set(copy.peft_config) - {name}:
        copy.delete_adapter(other)
    network = copy.get_base_model()
    paths = {id(tensor): path for path, tensor in network.named_parameters()}
    held = {f"{_mark(config)}/{key}": t for key, t in parameters(copies(network, name, config)).items()}
    adapter = {key: tensor.detach().clone() for key, tensor in held.items()}
    for tensor in held.values():
        tensor.detach().zero_()  # the backbone holds no adapter's values
    return WithInputs(network, {key: paths[id(tensor)] for key, tensor in held.items()}), adapter


def _mark(config: BNOnlyConfig) -> str:
    """Return a short digest of all that two adapters of one backbone have in common."""
    digests = [config.backbone_fingerprint, config.frozen_fingerprint, config.layout_hash]
    own = config.traits_fingerprint if config.architecture == CUSTOM else [config.architecture, config.model_args]
    whole = [*(each and each[:32] for each in digests), own]  # a compact file has so many digits
    return sha256(json.dumps(whole, sort_keys=True, allow_nan=False).encode()).hexdigest()[:8]


def write_arrays(model: BNOnlyPeftModel, name: str, file: Path) -> Path:
    """Write an adapter as the further inputs of a graph that was written with ``adapter="inputs"``: an .npz file.

    Raises:
        OutputFolderError, FileError: the file exists, or cannot be written.
        AdapterError: as `as_inputs`.
    """
    target = new_file(file)
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in as_inputs(model, name)[1].items()}
    np.savez(content := io.BytesIO(), **arrays)
    write_file(target, content.getvalue())
    return target


def write_graph(
    network: nn.Module, adapter: dict[str, torch.Tensor], config: BNOnlyConfig, size: list[int] | None, file: Path,
    form: str,
) -> Path:  # fmt: skip
    """Write a network as a graph, and print how the graph's logits differ from PyTorch's.

    Args and Raises: as in `graph_of`; ``file`` does not exist yet.

    Raises:
        OutputFolderError, FileError: the file exists, or cannot be written.
    """
    target = new_file(file)
    content, said = graph_of(network, adapter, config, size, form)
    print(said)
    write_file(target, content)
    return target


def graph_of(
    network: nn.Module, adapter: dict[str, torch.Tensor], config: BNOnlyConfig, size: list[int] | None, form: str
) -> tuple[bytes, str]:
    """Return a network as the file of a graph, and what to say of it; the graph is run and compared.

    Args:
        network: in evaluation mode, float32, on the CPU; it takes images, and the adapter if there is one.
        adapter: the further inputs, none if everything is inside.
        config: of the adapter, for the file's metadata.
        size: of an image, (C, H, W).
        form: "onnx" or "pt2".

    Raises:
        ConfigError: it is not known which images the network takes, it takes no such images, or packages are missing.
        NetworkError: the network has no such graph.
        AdapterError: the graph gives other logits.
    """
    if form == "onnx":
        _check_installed()
    inputs: Any = [(batch, adapter) if adapter else (batch,) for batch in _images(size)]
    axes = {0: torch.export.Dim("batch")}
    dynamic = (axes, dict.fromkeys(adapter)) if adapter else (axes,)
    with _explained(f"The network does not take images of data_config's size {size}.", ConfigError), torch.no_grad():
        network(*inputs[0])
    with _explained("The network does not take batches of any number of images, as a graph does."), torch.no_grad():
        expected = _parts(network(*inputs[1]))
    with _explained("torch.export does not take this network."):
        program = torch.export.export(network, inputs[0], dynamic_shapes=dynamic, strict=False)
    about = {METADATA: json.dumps(config.to_dict(), allow_nan=False)}
    content, found, said = (_onnx if form == "onnx" else _pt2)(program, about, len(expected), inputs[1], dynamic)
    return content, f"{len(content):,} bytes, {said}{_difference(expected, found)}"


def _images(size: list[int] | None) -> tuple[torch.Tensor, ...]:
    """Return a batch to trace a network with, and one of another size to check the graph."""
    if size is None:
        do = "data_config={'input_size': [3, H, W]} in the configuration"
        raise ConfigError("It is not known which images the network takes.", seen="data_config=None", do=do)
    return torch.randn(TRACED + CHECKED, *size, generator=torch.Generator().manual_seed(0)).split([TRACED, CHECKED])


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        do = "pip install 'bn-affine-adapters[onnx]'"
        raise ConfigError("ONNX needs packages that are not installed.", seen=str(error), do=do) from error


def _onnx(
    program: Any, about: dict[str, str], outputs: int, inputs: tuple[Any, ...], dynamic: Any
) -> tuple[bytes, list[torch.Tensor] | None, str]:
    """Return (an ONNX file, its outputs for these inputs if onnxruntime is installed, what to say of it)."""
    import onnx

    if (size := sum(tensor.nbytes for tensor in program.state_dict.values())) > MOST_BYTES:
        seen = f"{size:,} bytes of weights; at most {MOST_BYTES:,}"
        raise NetworkError("The network is too large for one ONNX file.", seen=seen, do='format="pt2"')
    images, *adapter = inputs
    feed = {IMAGES: images, **(adapter[0] if adapter else {})}
    names = [LOGITS] if outputs == 1 else [f"{LOGITS}.{number}" for number in range(outputs)]
    with _explained("ONNX cannot express this network."):
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[*feed], output_names=names, dynamic_shapes=dynamic
        )
        assert made is not None  # without a file's name
        made.model.metadata_props.update(about)
        onnx.checker.check_model(made.model_proto)
        content = made.model_proto.SerializeToString()
    said = f"opset {made.model.opset_imports['']}"
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return content, None, f"{said}, not run: onnxruntime is not installed"
    with _explained("onnxruntime does not run the graph of this network."):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = session.run(None, {key: tensor.numpy() for key, tensor in feed.items()})
    return content, [torch.from_numpy(part) for part in found], f"{said}, in onnxruntime "


def _pt2(
    program: Any, about: dict[str, str], _outputs: int, inputs: tuple[Any, ...], _dynamic: Any
) -> tuple[bytes, list[torch.Tensor], str]:
    """Return (a file of torch.export, its outputs for these inputs, what to say of it). Args: as `_onnx`."""
    with _explained("torch.export cannot save this network."), torch.no_grad():
        program.example_inputs = None  # they would be saved, the adapter's values among them
        torch.export.save(program, file := io.BytesIO(), extra_files=about)
        found = _parts(torch.export.load(io.BytesIO(file.getvalue())).module()(*inputs))
    return file.getvalue(), found, "in PyTorch "


def _parts(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor] | None) -> str:
    """Return in words how much logits differ.

    Raises:
        AdapterError: by more than rounding.
    """
    if found is None:
        return ""
    largest = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    allowed = TOLERANCE * max(1.0, *(float(part.abs().max()) for part in expected))
    if not largest <= allowed:
        seen, do = f"they differ by {largest:.3g}; allowed is {allowed:.3g}", 'format="timm"'
        raise AdapterError("The graph gives other logits than the network.", seen=seen, do=do)
    return f"the logits of {CHECKED} random images differ by at most {largest:.3g}"


@contextmanager
def _explained(what: str, kind: type[BNAdapterError] = NetworkError) -> Iterator[None]:
    """Turn what the exporters raise, of many kinds and often of many pages, into one error of this package."""
    try:
        # They warn of operators that this network does not have, and print whole graphs.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    except BNAdapterError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or "no reason given"
        seen = f"{type(cause).__name__}: {reason}"[:400]
        raise kind(what, seen=seen, do='format="timm", or model.save_pretrained(folder)') from error
