"""Files that may not be read or written, and terminals: our own errors at every door, and no traceback."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from click.testing import CliRunner
from conftest import without_privileges
from PIL import Image

from bn_affine_adapters import BNOnlyConfig, cli, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import FileAccessError, FileError, NoSpaceError, disk_is_full
from bn_affine_adapters.settings import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.folder import check_space, try_writing, write_file
from bn_affine_adapters.training.terminal import naming_files, printing

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


def test_in_python_the_errors_are_our_own_and_the_ones_that_a_caller_expects(model, adapter, locked, refused):
    with without_privileges():
        for write in (
            model.save_pretrained,
            lambda folder: export(model, folder),
            lambda f: write_card(adapter, "a/b", output=f),
        ):
            with refused(FileAccessError, f"{locked}", "Permission denied", "chmod") as caught:
                write(locked / "new")
            assert isinstance(caught.value, PermissionError)
        (adapter / CONFIG_NAME).chmod(0)
        with refused(FileAccessError, f"{adapter / CONFIG_NAME} cannot be read"):
            load_bn_only_model(adapter)


@pytest.mark.parametrize("key", ["pretrained_file", "config", "checkpoint", "dataset", "image", "lines"])
def test_another_file_that_may_not_be_read_is_an_own_error_that_names_it(key, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}")
    Path("folder/train/cat").mkdir(parents=True)
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_text("{}")
    names = {"checkpoint": "run/checkpoint.pt", "dataset": "folder"}
    commands = {
        "pretrained_file": ["train", *TINY, "pretrained=true", "seed=null", "pretrained_file=file", "output_dir=new"],
        "config": ["train", "--config", "file"],
        "checkpoint": ["train", *TINY, "output_dir=run", "resume=true"],
        "dataset": ["train", *TINY, "dataset=folder", "output_dir=new"],
        "image": ["predict", adapter, "file"],
        "lines": ["card", adapter, "me/x", "--results", "file"],
    }
    Path(names.get(key, "file")).chmod(0)
    code, _, err = run(*commands[key])
    Path(names.get(key, "file")).chmod(0o755)
    assert code == 2
    assert names.get(key, "file") in err
    assert "Traceback" not in err
    kinds = {"pretrained_file": "FileAccessError", "checkpoint": "CheckpointError", "config": "ConfigError"}
    assert err.splitlines()[-3].startswith(kinds.get(key, "")), err


@pytest.fixture
def read_only_disk(tmp_path):
    """A file system on which nothing can be written, not even by root."""
    (folder := tmp_path / "read-only").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a file system of its own: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_file_system_is_refused_before_data_are_read(read_only_disk, tmp_path):
    for words in (
        ["output_dir=DISK/run"],
        ["output_dir=DISK"],
        ["results=DISK/lines.jsonl", f"output_dir={tmp_path / 'run'}"],
    ):
        code, _, err = run("train", *TINY, "dataset=nothing", *[w.replace("DISK", str(read_only_disk)) for w in words])
        assert code == 2
        assert err.startswith(f"FileAccessError: {read_only_disk}"), err
        assert "Read-only file system" in err


def test_a_result_that_may_not_be_replaced_is_refused_before_data_are_read(tmp_path, model):
    output = tmp_path / "run"
    model.save_pretrained(output / "adapter")
    for name in ("result.json", "adapter/results.json"):
        (output / name).write_text("{}")
        if subprocess.run(["chattr", "+i", output / name], capture_output=True, check=False).returncode:
            pytest.skip("needs root, and a file system whose files can be immutable")
        code, _, err = run("train", *TINY, "dataset=nothing", f"output_dir={output}", "overwrite=true")
        subprocess.run(["chattr", "-i", output / name], check=True)
        assert code == 2
        assert err.startswith(f"FileAccessError: {output / name}"), err
        assert (output / name).read_text() == "{}"


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_refused(tmp_path, refused):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with refused(FileError, str(path)):
            try_writing(path, replaced=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("umask", [0o022, pytest.param(0o077, marks=pytest.mark.slow)])
def test_every_file_has_the_mode_that_the_umask_says(umask, model, tmp_path):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "new")
        (tmp_path / "old").mkdir()
        model.save_pretrained(tmp_path / "old")
        export(model, tmp_path / "timm")
        export(model, tmp_path / "peft", "ln_tuning")
        write_card(tmp_path / "new", "me/x", results={"dataset": "me/data", "top1": 50.0})
        assert run("train", *TINY, f"output_dir={tmp_path / 'run'}", "checkpoint_every=1")[0] == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) >= 20
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}
    assert not wrong


# -- full disks


def test_a_card_on_a_full_disk_is_the_one_before(adapter, small_disk, refused):
    write_card(adapter, "me/x", output=small_disk)
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    assert set(before) == {"README.md", "gamma.png"}
    (small_disk / "filler").write_bytes(bytes(200_000))
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with refused(NoSpaceError, str(small_disk), "0 bytes free"):
        write_card(adapter, "me/y", output=small_disk, results={"dataset": "me/data", "top1": 50.0})
    assert {path.name: path.read_bytes() for path in small_disk.iterdir() if path.name in before} == before


def test_a_device_is_written_into_and_stays_one(refused):
    write_file(Path(os.devnull), b"content")
    with refused(NoSpaceError, "/dev/full"):
        write_file(Path("/dev/full"), b"content")
    assert not Path(os.devnull).is_file()
    assert not Path("/dev/full").is_file()


def test_a_full_disk_is_known_from_a_number_or_from_words():
    full = OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded")
    full += RuntimeError("I/O error (os error 28)"), RuntimeError("Os { code: 28, kind: StorageFull }")
    assert all(map(disk_is_full, full))
    assert not any(map(disk_is_full, (OSError(13, "Permission denied"), OSError("28"), RuntimeError("os error 13"))))


def test_room_is_counted_in_bytes(tmp_path, refused):
    check_space(tmp_path, 1000)
    with refused(NoSpaceError, f"{2**70:,} are needed"):
        check_space(tmp_path, 2**70)


# -- terminals

ENCODINGS = {  # in C, click prints UTF-8
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
PRINTERS = {
    "inspect": ["inspect", "ADAPTER"],
    "verify": ["verify", "ADAPTER"],
    "predict": ["predict", "ADAPTER", "bär 犬.png"],
    "predict json": ["predict", "ADAPTER", "bär 犬.png", "--json"],
    "missing": ["predict", "ADAPTER", "no 犬.png"],
    "card": ["card", "ADAPTER", "me/x", "--output", "card 犬"],
    "export": ["export", "ADAPTER", "out 犬"],
    "diff": ["diff", "ADAPTER", "ADAPTER"],
    "configs": ["configs"],
    "show": ["configs", "show", "cifar10"],
    "copy": ["configs", "copy", "digits", "neu 犬.yaml"],
    "train": ["train", *TINY, "output_dir=run 犬"],
    "no such key": ["train", "犬=1"],
    "validate": ["validate", "ADAPTER"],
    "no such sweep": ["sweep", "犬"],
    "help": ["train", "--help"],
}


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **changes}


@pytest.mark.parametrize("command", PRINTERS)
def test_a_terminal_without_a_character_gets_its_escape(command, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model.peft_config["default"], "label_names", ["犬", "Bär", "✓"])
    model.save_pretrained("adapter 犬")
    Image.new("RGB", (40, 40)).save("bär 犬.png")
    words = [word.replace("ADAPTER", "adapter 犬") for word in PRINTERS[command]]
    code, out, err = run(*words, charset="latin-1")
    assert code == (2 if command in ("missing", "no such key", "no such sweep", "validate") else 0), err
    plain = ("verify", "diff", "configs", "show", "help")
    assert ("\\u72ac" in out + err) == (command not in plain), out + err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_process_in_another_encoding_ends_well(encoding, tmp_path):
    command = [sys.executable, "-m", "bn_affine_adapters.cli", "configs", "copy", "digits", "犬.yaml"]
    how = {"cwd": tmp_path, "capture_output": True, "check": False}
    done = subprocess.run(command, env=environment(**ENCODINGS[encoding]), **how)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip().endswith(b".yaml")
    assert (tmp_path / "犬.yaml").is_file()


@pytest.mark.parametrize("module", ["cli configs", "cli --help", "training.train --help", "training.validate --help"])
def test_an_end_that_takes_no_more_is_one_line_and_a_status(module):
    name, *words = module.split()
    command = [sys.executable, "-m", f"bn_affine_adapters.{name}", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert done.returncode == (2 if name == "cli" else 1)
    assert done.stderr == "error: what is printed cannot be written: No space left on device\n"


def test_another_error_of_the_system_is_not_taken_for_one_of_the_terminal():
    with pytest.raises(ConnectionResetError), printing(status=2):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(FileAccessError, match="/nowhere cannot be read or written"), naming_files():
        raise PermissionError(13, "Permission denied", "/nowhere")


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m bn_affine_adapters.training.train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
