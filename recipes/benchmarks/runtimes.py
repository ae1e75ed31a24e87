"""Run ten families of timm in onnxruntime, and compare their logits with PyTorch's.

    python recipes/benchmarks/runtimes.py [NETWORK ...] [--write]

Each network is drawn from seed 0 and exported twice: with its adapter inside, and as a backbone whose adapter is given
as inputs. --write puts the table into docs/deploy.md.
"""

import argparse
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
CLASSES, IMAGES = 10, 3
# network: (creation arguments, pixels); small ones of each family, with few blocks where only large ones exist
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 64),
    "densenet121": ({}, 64),
    "efficientnet_lite0": ({}, 64),
    "mobilenetv3_small_050": ({}, 64),
    "ghostnet_050": ({}, 64),
    "regnetx_002": ({}, 64),
    "repvgg_a0": ({}, 64),
    "convnext_atto": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (1, 1, 1, 1)}, 56),
}


class Measured(NamedTuple):
    """The sizes of three files, and how far from PyTorch's the logits of both graphs are, over the largest logit."""

    inside_bytes: int
    inside: float
    backbone_bytes: int
    inputs: float
    adapter_bytes: int


def measured(name: str) -> Measured:
    """Export a network in both forms and run both on images that it was not exported with."""
    import onnxruntime

    arguments, pixels = FAMILIES[name]
    network = timm.create_model(name, num_classes=CLASSES, **arguments)
    config = BNOnlyConfig(seed=0, train_head=True, data_config={"input_size": [3, pixels, pixels]})
    model = get_bn_only_model(network, config).eval()
    images = torch.randn(IMAGES, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).numpy()

    def difference(file: Path, arrays: dict[str, Any]) -> float:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images.numpy(), **arrays})
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        inside = export(model, Path(folder, "inside.onnx"), "onnx")
        backbone = export(model, Path(folder, "backbone.onnx"), "onnx", adapter="inputs")
        adapter = export(model, Path(folder, "adapter.npz"), "npz")
        sizes = [file.stat().st_size for file in (inside, backbone, adapter)]
        with np.load(adapter) as arrays:
            found = difference(inside, {}), difference(backbone, dict(arrays))
    return Measured(sizes[0], found[0], sizes[1], found[1], sizes[2])


def row(name: str) -> list[str]:
    """Return a network's line of the table."""
    found = measured(name)
    cells = [f"{found.inside_bytes:,}", f"{found.inside:.0e}", f"{found.backbone_bytes:,}", f"{found.inputs:.0e}"]
    print(name, *cells, f"{found.adapter_bytes:,}", sep="\t", flush=True)
    return [name, *cells, f"{found.adapter_bytes:,}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["network", "inside, bytes", "difference", "backbone, bytes", "difference", "adapter, bytes"]
    table = markdown_table(heads, [row(name) for name in options.networks])
    if options.write:
        write_section(PAGE, "runtimes", table)
