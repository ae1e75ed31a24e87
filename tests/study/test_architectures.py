"""What is said about an architecture is what its adapter is."""

import json

import pytest
import timm
from click.testing import CliRunner
from conftest import script
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.cli import main
from bn_affine_adapters.errors import UnknownArchitectureError
from bn_affine_adapters.study.architectures import architectures, describe, table

SCRIPT = script("benchmarks/architectures")


@pytest.mark.parametrize("name", ["cifar_resnet14", "test_vit", "test_convnext2", "evonorm", "levit_128s"])
def test_the_numbers_are_those_of_a_saved_adapter(name, tmp_path):
    name = "resnetv2_50d_evos" if name == "evonorm" else name
    network = timm.create_model(name)
    total = sum(parameter.numel() for parameter in network.parameters())
    model = get_bn_only_model(network, BNOnlyConfig(seed=0))
    model.save_pretrained(tmp_path)
    found = describe(name)
    assert found.parameters == total
    assert found.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.bytes == (tmp_path / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    assert found.share == 100 * found.trained / total


def test_a_network_without_norm_layers_is_said_to_be_refused():
    found = describe("nf_resnet50")
    assert (found.family, found.norms, found.trained, found.bytes) == ("nfnet", "", 0, 0)
    assert table([found])[1][:4] == ["nf_resnet50", "nfnet", "none: refused", "25,557,032"]


def test_the_command_takes_a_pattern_and_prints_a_table_or_json():
    printed = CliRunner().invoke(main, ["architectures", "test_vit*"], catch_exceptions=False).output.splitlines()
    assert [line.split()[0] for line in printed] == ["architecture", *architectures("test_vit*")]
    line = json.loads(CliRunner().invoke(main, ["architectures", "resnet18", "--json"], catch_exceptions=False).output)
    assert line == {**describe("resnet18")._asdict(), "share": 100 * 9600 / 11689512}


def test_a_pattern_that_matches_nothing_names_the_nearest_architecture(refused):
    with refused(UnknownArchitectureError, "resnet1q8", "resnet18"):
        architectures("resnet1q8")


def test_the_page_has_every_name_once_with_what_the_package_says_today():
    text = SCRIPT.PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "architecture" not in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    written = json.loads(SCRIPT.PAGE.parents[1].joinpath("recipes/benchmarks/architectures.json").read_text())
    assert len({row[0] for row in rows}) == len(rows) == written["names"]
    by_name = {row[0]: row for row in rows}
    statuses = {"resnet18": "rebuilt", "vit_base_patch16_224": "rebuilt", "convnextv2_atto": "loaded"}
    for name, status in {**statuses, "nf_resnet50": "refused"}.items():
        _, expected = table([describe(name)])
        assert [cell for cell in by_name[name] if cell] == [cell for cell in (name, *expected[2:], status) if cell]
