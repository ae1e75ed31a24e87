"""Adapters of every format version that was ever written stay readable, and mean the same network."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bn_affine_adapters import load_bn_only_model
from bn_affine_adapters.settings import FORMAT_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = range(1, FORMAT_VERSION + 1)


def test_there_is_an_adapter_of_every_format_version():
    found = {path.name: json.loads((path / "adapter_config.json").read_text()) for path in GOLDEN.glob("adapter-v*/")}
    assert {name: config["format_version"] for name, config in found.items()} == {f"adapter-v{v}": v for v in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_adapter_rebuilds_the_network_that_was_saved(version):
    model = load_bn_only_model(GOLDEN / f"adapter-v{version}", verify="full")
    expected = json.loads((GOLDEN / f"adapter-v{version}.json").read_text())
    images = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        logits = model(images)[0]
    # Convolutions round differently from machine to machine; the weights do not, and are verified bit for bit.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_adapter_is_as_accurate_as_it_was(version):
    evaluate = import_module("bn_affine_adapters.training.validate")
    result = evaluate.run(evaluate.read_options([f"adapter={GOLDEN / f'adapter-v{version}'}"]))
    expected = json.loads((GOLDEN / f"adapter-v{version}.json").read_text())
    assert result["images"] == 359
    assert result["top1"] == pytest.approx(expected["top1"], abs=0.3)
