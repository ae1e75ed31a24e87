"""A compact file is looked at and pushed like an adapter's folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi

from bn_affine_adapters import load_bn_only_model
from bn_affine_adapters.cli import main
from bn_affine_adapters.errors import AdapterFileError, ConfigError
from bn_affine_adapters.settings import COMPACT_NAME
from bn_affine_adapters.sharing.hub import push_folder

FILE = Path(__file__).parents[1] / "golden" / "compact-v1-8bits.safetensors"


def invoke(*command):
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("inside", [False, True])
def test_inspect_shows_the_settings_of_a_compact_file(inside, tmp_path):
    place = tmp_path if inside else FILE
    if inside:
        shutil.copy(FILE, tmp_path / COMPACT_NAME)
    found = json.loads(invoke("inspect", place, "--json"))
    assert (found["architecture"], found["bits"], found["compact_version"]) == ("cifar_resnet14", 8, 1)
    assert found["files"] == {COMPACT_NAME if inside else FILE.name: FILE.stat().st_size}
    assert load_bn_only_model(FILE).peft_config["default"].backbone_fingerprint.startswith(found["fingerprint"])
    assert "cifar_resnet14" in invoke("inspect", place)


@pytest.mark.parametrize("inside", [False, True])
def test_a_compact_file_is_pushed_with_a_card_and_nothing_that_lies_beside_it(inside, hub, alice, tmp_path):
    file = tmp_path / (COMPACT_NAME if inside else "digits.safetensors")
    shutil.copy(FILE, file)
    (tmp_path / "notes.txt").write_text("mine")
    line = {"dataset": "digits", "split": "test", "top1": 94.5}
    push_folder(tmp_path if inside else file, "alice/small", token=alice, results=[line])
    api = HfApi(token=alice)
    names = {name for name in api.list_repo_files("alice/small") if not name.startswith(".")}
    assert names == {COMPACT_NAME, "README.md", "results.json"}
    card = Path(api.hf_hub_download("alice/small", "README.md")).read_text()
    assert f"One file of {FILE.stat().st_size:,} bytes, for inference: all trained values in 8 bits" in card
    assert "94.5 %" in card
    assert "made with" not in card
    x = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
    assert torch.equal(load_bn_only_model("alice/small")(x), load_bn_only_model(FILE)(x))


def test_the_command_line_pushes_a_compact_file_again_and_keeps_what_a_person_wrote(hub, alice, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", alice)
    invoke("push", FILE, "alice/small", "--private")
    api = HfApi(token=alice)
    card = Path(api.hf_hub_download("alice/small", "README.md")).read_text() + "\nWritten by a person.\n"
    api.upload_file(repo_id="alice/small", path_or_fileobj=card.encode(), path_in_repo="README.md")
    invoke("push", FILE, "alice/small", "--tag", "v1")
    card = Path(api.hf_hub_download("alice/small", "README.md", revision="v1")).read_text()
    assert card.count("for inference: all trained values in 8 bits") == 1
    assert card.rstrip().endswith("Written by a person.")


def test_a_card_is_written_for_a_folder_with_a_compact_file(tmp_path):
    shutil.copy(FILE, tmp_path / COMPACT_NAME)
    invoke("card", tmp_path, "me/small")
    assert "for inference: all trained values in 8 bits" in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {COMPACT_NAME, "README.md"}


def test_what_is_no_compact_file_is_not_pushed(hub, alice, tmp_path, refused):
    (tmp_path / "x.safetensors").write_bytes(FILE.read_bytes()[:-9])
    with refused(AdapterFileError, "not a whole compact adapter"):
        push_folder(tmp_path / "x.safetensors", "alice/small", token=alice)
    with refused(ConfigError, "not the name of a repository"):
        push_folder(FILE, "alice/a/b", token=alice)
    assert not HfApi(token=alice).repo_exists("alice/small")
