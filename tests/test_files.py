"""Files that may not be read or written, and terminals: our own errors at every door, and no traceback."""

from pathlib import Path

import pytest
import timm
import yaml
from click.testing import CliRunner
from conftest import without_privileges
from PIL import Image

from bn_affine_adapters import BNOnlyConfig, cli, get_bn_only_model
from bn_affine_adapters.settings import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

TINY = "model=test_resnet", "image_size=8", "held_out=900", "epochs=1", "threads=1"

pytestmark = pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")


@pytest.fixture(scope="module")
def model():
    config = BNOnlyConfig(seed=0, label_names=["cat", "dog", "Bär"], data_config={"input_size": [3, 32, 32]})
    return get_bn_only_model(timm.create_model("test_resnet", num_classes=3), config)


@pytest.fixture
def adapter(model, tmp_path):
    model.save_pretrained(folder := tmp_path / "adapter")
    return folder


@pytest.fixture
def locked(tmp_path):
    """A folder that may be read alone."""
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "lines.jsonl").touch()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def run(*words, charset="utf-8"):
    """Run a command line without root's privileges; return its exit code, output and errors."""
    with without_privileges():
        result = CliRunner(charset=charset).invoke(cli.main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout, result.stderr


# -- permissions

READERS = {
    "inspect": ["inspect", "ADAPTER"],
    "verify": ["verify", "ADAPTER"],
    "predict": ["predict", "ADAPTER", "image.png"],
    "card": ["card", "ADAPTER", "me/x"],
    "push": ["push", "ADAPTER", "me/x"],
    "export": ["export", "ADAPTER", "out"],
    "diff": ["diff", "ADAPTER", "ADAPTER"],
    "validate": ["validate", "ADAPTER"],
    "analyse": ["analyse", "ADAPTER"],
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kept", [".", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_an_adapter_that_may_not_be_read_is_one_own_error(command, kept, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (adapter / kept).chmod(0)
    code, _, err = run(*[adapter if word == "ADAPTER" else word for word in READERS[command]])
    (adapter / kept).chmod(0o755)
    assert code == 2
    assert err.startswith("FileAccessError: "), err
    assert str(adapter) in err.splitlines()[0]
    assert [line[:9] for line in err.splitlines()[1:]] == ["  seen:  ", "  do:    "]


SWEEP = {"config": "digits", "conditions": {"bn": {}}, "networks": ["test_resnet"], "results": "lines.jsonl"}
TUNING = {"config": "digits", "set": {"held_out": 288}, "space": {"norm_init": ["ones"]}, "trials": 1}
WRITERS = {
    "train": ["train", *TINY, "output_dir=LOCKED/run"],
    "train results": ["train", *TINY, "output_dir=run", "results=LOCKED/new.jsonl"],
    "train dataset": ["train", *TINY, "dataset=nothing", "output_dir=run", "results=LOCKED/new.jsonl"],
    "analyse": ["analyse", "ADAPTER", "output=LOCKED/out.json"],
    "sweep": ["sweep", "sweep.yaml", "--output", "LOCKED/runs"],
    "sweep results": ["sweep", "locked.yaml", "--output", "runs"],
    "tune": ["tune", "tune.yaml", "--output", "LOCKED/study"],
    "card": ["card", "ADAPTER", "me/x", "--output", "LOCKED/card"],
    "card here": ["card", "ADAPTER", "me/x", "--output", "LOCKED"],
    "export": ["export", "ADAPTER", "LOCKED/out"],
    "predict": ["predict", "ADAPTER", "image.png", "--out", "LOCKED/out.csv"],
    "configs": ["configs", "copy", "digits", "LOCKED/digits.yaml"],
    "gpu-check": ["gpu-check", "--device", "cpu", "--toy", "--out", "LOCKED/out"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_that_may_not_be_written_is_one_own_error_at_the_start(command, locked, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("image.png")
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    Path("locked.yaml").write_text(yaml.safe_dump(SWEEP | {"results": f"{locked}/new.jsonl"}))
    Path("tune.yaml").write_text(yaml.safe_dump(TUNING))
    words = [word.replace("LOCKED", str(locked)).replace("ADAPTER", str(adapter)) for word in WRITERS[command]]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-3].startswith(f"FileAccessError: {locked}"), err
    assert [line[:9] for line in err.splitlines()[-2:]] == ["  seen:  ", "  do:    "]
    assert sorted(path.name for path in locked.iterdir()) == ["lines.jsonl"]
    assert not Path("run").exists()
