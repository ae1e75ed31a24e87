"""Training and validation, run as their users run them."""

import json
import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from bn_affine_adapters import reinit_
from bn_affine_adapters.errors import AdapterFileError, ConfigError, DataError, OutputFolderError, UnknownKeyError
from bn_affine_adapters.norms.find import norm_layers
from bn_affine_adapters.training import loop
from bn_affine_adapters.training.data import hold_out
from bn_affine_adapters.training.feed import Feed, accuracy
from bn_affine_adapters.training.network import build_network, configuration, count
from bn_affine_adapters.training.recipe import CONDITIONS, FULL_CONDITIONS

ROOT = Path(__file__).parents[2]
# One epoch of this takes about a second: the digits at their own size.
TINY = ("image_size=8", "batch_size=128", "epochs=1", "threads=1")


@pytest.fixture(scope="module")
def train():
    return import_module("bn_affine_adapters.training.train")


@pytest.fixture(scope="module")
def validate():
    return import_module("bn_affine_adapters.training.validate")


pytestmark = pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")


def tiny(train, output, *arguments):
    return train.train(train.read_recipe([*TINY, f"output_dir={output}", *arguments]))[0].result


ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


def files(adapter):
    """The adapter's files by name, without the results beside them, whose seconds differ."""
    names = sorted(path.name for path in Path(adapter).iterdir())
    assert names == [*ADAPTER, "results.json"]
    return {name: Path(adapter, name).read_bytes() for name in ADAPTER}


@pytest.mark.slow  # .ci/run has the same of the README's command
def test_the_default_job_passes_92_percent_with_1120_parameters(train, tmp_path):
    # One thread: with several, other tests beside it would hold each of them up. .ci/run times the job by itself.
    result = train.train(train.read_recipe([f"output_dir={tmp_path / 'run'}", "threads=1"]))[0].result
    assert result["trained"] == 1_120
    assert result["top1"] >= 92


def test_a_person_sees_a_summary_and_a_program_one_line_of_json(train, validate, tmp_path, capsys):
    folder = tmp_path / "run"
    train.command([*TINY, f"output_dir={folder}"])
    result = json.loads((folder / "result.json").read_text())
    assert capsys.readouterr().out.splitlines() == [
        f"accuracy  {result['top1']:.2f} % top-1 on digits/test (359 images)",
        "trained   1,120 of 175,258 parameters (0.64 %)",
        f"adapter   {folder}/adapter, {(folder / 'adapter' / ADAPTER[1]).stat().st_size / 1000:.1f} kB",
        f"time      {result['seconds']:.1f} s",
        f"next      bn-adapters validate {folder}/adapter",
    ]
    validate.command([f"{folder}/adapter"])
    assert capsys.readouterr().out.splitlines() == [
        f"accuracy  {result['top1']:.2f} % top-1 on digits/test (359 images)",
        f"adapter   {folder}/adapter, on the weights of seed 0, verified",
    ]
    validate.command(["--json", f"adapter={folder}/adapter"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"top1": result["top1"], "top5": result["top5"], "split": "test", "images": 359, "seed": 0}
    AcceleratorState._reset_state(reset_partial_state=True)
    train.command([*TINY, f"output_dir={folder}", "overwrite=true", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "result.json").read_text())


def test_a_run_takes_all_cores_unless_told(train, tmp_path):
    train.start(train.read_recipe(["threads=0", f"output_dir={tmp_path / 'run'}"]))
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    train.start(train.read_recipe(["threads=1", f"output_dir={tmp_path / 'run'}"]))
    assert torch.get_num_threads() == 1


def test_the_same_seed_twice_gives_the_same_adapter_bytes(train, tmp_path):
    first, second, other = (
        tiny(train, tmp_path / str(i), f"seed={seed}")["adapter"] for i, seed in enumerate((0, 0, 1))
    )
    assert files(first) == files(second)
    assert files(first)["adapter_model.safetensors"] != files(other)["adapter_model.safetensors"]


def launch(*arguments, processes=1, **popen):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = command if processes > 1 else [sys.executable]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*command, "recipes/train.py", *TINY, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen,
    )  # fmt: skip


def test_two_processes_train_and_save_one_adapter_with_the_losses_of_one(train, tmp_path):
    # A small learning rate: rounding grows chaotically with the steps at a large one.
    options = ("lr=0.01", "image_size=16")
    process = launch(*options, f"output_dir={tmp_path / 'two'}", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    one = tiny(train, tmp_path / "one", *options)
    assert (two["hardware"]["processes"], one["hardware"]["processes"]) == (2, 1)
    assert len(two["first_losses"]) == len(one["first_losses"]) == 12
    assert two["first_losses"][:1] == pytest.approx(one["first_losses"][:1], rel=1e-5)
    assert two["first_losses"] == pytest.approx(one["first_losses"], rel=1e-3)
    assert sorted(files(two["adapter"])) == ADAPTER
    ours, theirs = (load_file(Path(r["adapter"], "adapter_model.safetensors")) for r in (one, two))
    assert len(ours) == 75
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].double(), tensor.double(), rtol=1e-2, atol=1e-3, msg=name)


def test_a_killed_run_resumes_to_the_adapter_of_one_never_killed(train, tmp_path):
    options = ("epochs=6", "checkpoint_every=1")
    process = launch(*options, f"output_dir={tmp_path / 'killed'}", start_new_session=True)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert checkpoint.exists(), output
    done = len(torch.load(checkpoint, weights_only=True)["run"]["replicates"][0]["epochs"])
    assert 1 <= done < 6, "the run ended before it was killed: nothing was tested"
    resumed = tiny(train, tmp_path / "killed", *options, "resume=true")
    whole = tiny(train, tmp_path / "whole", *options)
    assert len(resumed["epochs"]) == 6
    assert resumed["epochs"] == whole["epochs"]
    assert files(resumed["adapter"]) == files(whole["adapter"])


@pytest.mark.parametrize("condition", ["all", "no-affine"])
def test_a_network_that_trained_whole_is_saved_as_a_timm_checkpoint(condition, train, tmp_path):
    result = tiny(train, tmp_path / "run", f"condition={condition}")
    assert "adapter" not in result
    assert sorted(path.name for path in Path(result["network"]).iterdir()) == [
        "config.json", "model.safetensors", "results.json",
    ]  # fmt: skip
    drawn = reinit_(timm.create_model("cifar_resnet14"), 0).state_dict()
    network = timm.create_model(f"local-dir:{result['network']}", pretrained=True)
    same = {key for key, tensor in network.state_dict().items() if torch.equal(tensor, drawn[key])}
    frozen = {f"{name}.{key}" for name in norm_layers(network) for key in ("weight", "bias")}
    assert same == (frozen if condition == "no-affine" else set())
    assert len(frozen) == 30
    recipe = train.read_recipe(list(TINY))
    assert round(accuracy(network, Feed(recipe, Accelerator()))["top1"], 4) == result["top1"]
    again = tiny(train, tmp_path / "run", f"condition={condition}", "overwrite=true")
    assert again["epochs"] == result["epochs"]


def test_a_network_that_trained_whole_under_autocast_is_saved_without_it(train, tmp_path):
    result = tiny(train, tmp_path / "run", "condition=all", "precision=bf16")
    assert timm.create_model(f"local-dir:{result['network']}", pretrained=True).num_classes == 10


@pytest.mark.parametrize("kind", ["condition=bn", "condition=all", "condition=random2"])
def test_a_run_that_was_stopped_resumes_to_the_result_of_one_never_stopped(kind, train, tmp_path):
    options = (kind, "checkpoint_every=1", "resume=true")
    whole = tiny(train, tmp_path / "whole", *options, "epochs=2")
    recipe = train.read_recipe([*TINY, *options, "epochs=2", f"output_dir={tmp_path / 'cut'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", stop_after(1, loop.train_epoch))
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = train.train(recipe)[0].result
    assert resumed["epochs"] == whole["epochs"]
    if kind != "condition=all":
        assert files(resumed["adapter"]) == files(whole["adapter"])


def stop_after(epochs, train_epoch):
    """The same function, interrupted before the epoch that comes after so many."""

    def interrupted(*arguments):
        if arguments[-1] == epochs:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    return interrupted


def test_images_held_out_are_neither_trained_on_nor_of_the_test_split(train, tmp_path):
    recipe = train.read_recipe([*TINY, "held_out=100"])
    feed, whole = (Feed(r, Accelerator()) for r in (recipe, train.read_recipe(list(TINY))))
    pixels = [
        {image.numpy().tobytes() for image in split}
        for split in (feed._train_tensors.images, feed._test_tensors.images)
    ]
    assert (len(feed.train.dataset), len(feed.test.dataset)) == (1338, 100)
    assert not pixels[0] & pixels[1]
    assert pixels[0] | pixels[1] == {image.numpy().tobytes() for image in whole._train_tensors.images}
    other = Feed(train.read_recipe([*TINY, "held_out=100", "data_seed=1"]), Accelerator())
    assert torch.equal(other._test_tensors.images, feed._test_tensors.images)
    assert tiny(train, tmp_path / "run", "held_out=100")["split"] == "100 held out of train"


@pytest.mark.parametrize("count", [-1, 1438, 5000])
def test_what_is_held_out_leaves_something_to_train_on(count, feed, refused):
    with refused(DataError, "1438"):
        hold_out(feed.train, count)


def test_replicates_side_by_side_are_runs_of_their_own(train, tmp_path, refused):
    # A small learning rate, where rounding does not grow: see tests/training/test_stacked.py.
    options = ("lr=0.001", "seed=3", "data_seed=5", "checkpoint_every=1", "epochs=2", "condition=random2")
    lines = tmp_path / "results.jsonl"
    tiny(train, tmp_path / "both", *options, "replicates=2", f"results={lines}")
    both = [json.loads((tmp_path / "both" / f"seed-{seed}" / "result.json").read_text()) for seed in (3, 4)]
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = tiny(train, tmp_path / "alone", *options, "seed=4", "data_seed=6")
    assert [(r["recipe"]["seed"], r["recipe"]["data_seed"]) for r in both] == [(3, 5), (4, 6)]
    assert both[1]["recipe"] == alone["recipe"]
    assert both[1]["first_losses"] == pytest.approx(alone["first_losses"], rel=1e-4)
    assert [result["hardware"]["side_by_side"] for result in (*both, alone)] == [2, 2, 1]
    ours, theirs = (load_file(Path(r["adapter"], "adapter_model.safetensors")) for r in (both[1], alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].double(), tensor.double(), rtol=1e-3, atol=1e-5, msg=name)
    assert len(lines.read_text().splitlines()) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    saved = [files(result["adapter"]) for result in both]
    again = tiny(train, tmp_path / "both", *options, "replicates=2", "resume=true")
    assert again["epochs"] == both[0]["epochs"]
    assert [files(result["adapter"]) for result in both] == saved
    AcceleratorState._reset_state(reset_partial_state=True)
    with refused(ConfigError, "replicates: 2 -> 1"):
        tiny(train, tmp_path / "both", *options, "resume=true")


def test_a_compiled_run_has_the_losses_of_an_eager_one(train, tmp_path, monkeypatch):
    compiler = torch.compile
    seen = []
    # Without a C++ compiler: what is captured, not what code is made of it.
    monkeypatch.setattr(torch, "compile", lambda model, **how: seen.append(how) or compiler(model, backend="aot_eager"))
    ours, theirs = (tiny(train, tmp_path / str(i), *extra) for i, extra in enumerate([["compile=reduce-overhead"], []]))
    assert seen == [{"mode": "reduce-overhead", "dynamic": False}]
    assert ours["first_losses"] == pytest.approx(theirs["first_losses"], rel=1e-4)


COUNTS = {
    "bn": 1_120,
    "bn+head": 1_120 + 650,
    "head": 650,
    "gamma": 560,
    "beta": 560,
    "bn+shortcut+head": 1_120 + 2_560 + 650,
    "shortcut+head": 2_560 + 650,
    "random2": 1_120,
    "input-affine": 902,
    "mask": 173_488,
    "signed-mask": 173_488,
    "filter-affine": 1_120,
    "all": 175_258,
    "no-affine": 175_258 - 1_120,
}


@pytest.fixture(scope="module")
def feed(train):
    return Feed(train.read_recipe(list(TINY)), Accelerator())


@pytest.mark.parametrize("condition", COUNTS)
def test_a_condition_trains_the_papers_number_of_parameters(train, feed, condition):
    recipe = train.read_recipe([*TINY, f"condition={condition}"])
    trained, total = count(build_network(recipe, configuration(recipe, feed.label_names), feed))
    assert trained == COUNTS[condition]
    assert total == 175_258 + (trained if condition == "input-affine" else 0)  # in front of the network's own


@pytest.mark.parametrize(("choice", "gain"), [({}, 1.0), ({"layer_scale": "constructor"}, 1e-6)])
@pytest.mark.parametrize("condition", ["bn", "all"])
def test_layer_scales_start_alike_whatever_trains(train, feed, condition, choice, gain):
    words = [f"{key}={value}" for key, value in choice.items()]
    recipe = train.read_recipe([*TINY, "model=test_convnext2", f"condition={condition}", *words])
    network = build_network(recipe, configuration(recipe, feed.label_names), feed)
    gains = [tensor for name, tensor in network.named_parameters() if name.endswith(".gamma")]
    assert len(gains) == 4
    assert all(torch.allclose(tensor, torch.tensor(gain)) for tensor in gains)


def test_pretrained_layer_scales_are_kept(train, feed):
    recipe = train.read_recipe([*TINY, "model=test_convnext2", "seed=null", "pretrained=true"])
    assert configuration(recipe, feed.label_names).layer_scale is None


def test_every_condition_was_counted():
    assert set(COUNTS) == {*CONDITIONS, *FULL_CONDITIONS}


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(train, tmp_path):
    # Frozen statistics, so that the parts of a batch do not depend on each other.
    options = ("running_statistics=frozen", "lr=0.001")
    whole, parts = (tiny(train, tmp_path / str(n), *options, f"accumulation={n}") for n in (1, 4))
    assert parts["first_losses"] == pytest.approx(whole["first_losses"], rel=1e-4)


# The images as they are: what streams is then what lies in memory.
STREAMED = ("streaming=true", "workers=1", "crop_scale=[1.0,1.0]", "crop_ratio=[1.0,1.0]", "test_crop=1.0")


def test_streamed_images_train_the_adapter_of_those_in_memory(train, tmp_path):
    # 1,438 images in batches of 128 leave 30 for the last one.
    memory, streamed = (tiny(train, tmp_path / str(i), "epochs=2", *more) for i, more in enumerate(((), STREAMED)))
    assert streamed["epochs"] == memory["epochs"]
    ours, theirs = (files(result["adapter"])["adapter_model.safetensors"] for result in (streamed, memory))
    assert ours == theirs


def test_streamed_parts_of_unequal_size_give_the_gradient_of_the_whole_batch(train, tmp_path):
    # Frozen statistics, so that the parts of a batch do not depend on each other. Ten images in four parts: 2, 3, 2, 3.
    options = ("running_statistics=frozen", "lr=0.001", "held_out=1238", "batch_size=10", *STREAMED)
    whole, parts = (tiny(train, tmp_path / str(n), *options, f"accumulation={n}") for n in (1, 4))
    assert parts["first_losses"] == pytest.approx(whole["first_losses"], rel=1e-4)
    ours, theirs = (load_file(Path(result["adapter"], ADAPTER[1])) for result in (parts, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow  # tests/training/test_data.py has what their parts hold
def test_two_processes_stream_the_augmented_images_of_one(train, tmp_path):
    options = ("lr=0.01", "image_size=16", "held_out=1000", "streaming=true", "workers=1", "flip=true")
    process = launch(*options, "accumulation=3", f"output_dir={tmp_path / 'two'}", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    alone = tiny(train, tmp_path / "one", *options)
    both = json.loads((tmp_path / "two" / "result.json").read_text())
    assert both["hardware"]["processes"] == 2
    # Batch statistics are those of a third of a batch.
    assert both["first_losses"] == pytest.approx(alone["first_losses"], rel=0.05)


def test_a_data_set_that_cannot_be_found_is_one_clear_error(train, tmp_path):
    with pytest.raises(DataError, match="no-such-folder"):
        tiny(train, tmp_path / "run", "dataset=./no-such-folder")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pictures(tmp_path):
    """Make a folder of so many digits in two classes, and four of each to test on."""

    def make(count):
        images = load_digits().images
        for split, rows in (("train", range(count)), ("test", range(8))):
            for i in rows:
                (folder := tmp_path / "pictures" / split / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
                Image.fromarray((images[i] * 15).astype("uint8")).resize((16, 16)).save(folder / f"{i}.png")
        return tmp_path / "pictures"

    return make


SMALL = ("model=resnet18", "image_size=16", "batch_size=8")


@pytest.mark.parametrize("lean", ["null", "exact"])
def test_a_last_image_alone_joins_the_batch_before(lean, train, pictures, tmp_path):
    """In BatchNorm it would have one pixel: torch refuses to train on it."""
    result = tiny(train, tmp_path / "run", f"dataset={pictures(17)}", *SMALL, f"lean={lean}")
    assert len(result["first_losses"]) == 2


def test_a_batch_of_one_pixel_is_refused(train, pictures, tmp_path, refused):
    with refused(DataError, "BatchNorm cannot train on one image", "batch_size"):
        tiny(train, tmp_path / "run", f"dataset={pictures(3)}", *SMALL, "batch_size=1")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_cannot_be_decoded_are_left_out_counted_and_named(
    streaming, train, validate, pictures, tmp_path, refused, capsys
):
    folder = pictures(20)
    for broken in ("train/cat/4.png", "train/dog/7.png", "test/dog/1.png"):
        (folder / broken).write_bytes((folder / broken).read_bytes()[:60])
    how = [f"dataset={folder}", "model=test_resnet", "batch_size=6", f"streaming={str(streaming).lower()}", "workers=0"]
    with refused(DataError, "of the split t"):
        tiny(train, tmp_path / "stopped", *how)
    capsys.readouterr()
    result = tiny(train, tmp_path / "run", *how, "on_bad_image=skip")
    assert result["left_out"] == {"train": 2, "test": 1}
    assert len(result["first_losses"]) == 3
    said = capsys.readouterr().err
    assert "2 of 20 images of train cannot be decoded, and are left out" in said
    assert "1 of 8 images of test" in said
    assert all(name in said for name in ("4.png", "7.png", "1.png"))
    found = validate.run(validate.read_options([result["adapter"], f"dataset={folder}", "on_bad_image=skip"]))
    assert found["images"] == 7
    with refused(ConfigError, "on_bad_image has no such value"):
        train.read_recipe(["on_bad_image=leave"])


def test_a_class_without_an_image_to_train_on_is_named(train, pictures, tmp_path):
    folder = pictures(20)
    (folder / "test" / "owl").mkdir()
    (folder / "test" / "cat" / "0.png").rename(folder / "test" / "owl" / "0.png")
    with pytest.warns(UserWarning, match="No image to train on is of 1 of 3 classes: owl"):
        tiny(train, tmp_path / "run", f"dataset={folder}", "model=test_resnet", "batch_size=8")


def test_mixed_precision_checkpoints_trackers_and_result_files_work_together(train, tmp_path):
    results = tmp_path / "all.jsonl"
    result = tiny(
        train, tmp_path / "run", "precision=bf16", "tracker=tensorboard", "checkpoint_every=1", f"results={results}"
    )
    lines = results.read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["top1"] == result["top1"]
    assert "adapter" not in json.loads(lines[0])
    assert str(tmp_path) not in lines[0]
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int64}


def test_an_output_folder_that_holds_something_is_left_alone_unless_asked(train, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(OutputFolderError, match="kept"):
        tiny(train, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    tiny(train, tmp_path, "overwrite=true")
    assert (tmp_path / "adapter").is_dir()
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_checkpoint_of_another_recipe_is_refused(train, tmp_path):
    tiny(train, tmp_path, "checkpoint_every=1")
    with pytest.raises(ConfigError, match=r"lr: 0\.3 -> 0\.2"):
        tiny(train, tmp_path, "checkpoint_every=1", "resume=true", "lr=0.2")


def test_a_wrong_class_count_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(DataError, match="12 outputs, 10 classes"):
        tiny(train, tmp_path / "run", "model_args={num_classes: 12}")
    assert not (tmp_path / "run").exists()


def test_an_error_ends_a_launcher_with_three_lines_and_no_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "epoch=3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / "train.py"), run_name="__main__")
    assert ended.value.code.startswith("UnknownKeyError: The recipe has no key 'epoch'.\n  seen:  ")
    assert len(ended.value.code.splitlines()) == 3


def test_validate_refuses_what_it_does_not_know(validate, tmp_path):
    with pytest.raises(UnknownKeyError, match="adapter"):
        validate.read_options(["adaptor=x"])
    with pytest.raises(AdapterFileError, match="the folder holds nothing"):
        validate.read_options([f"adapter={tmp_path}"])
    with pytest.raises(AdapterFileError, match="the folder holds nothing"):
        validate.read_options([str(tmp_path), "batch_size=3"])


def test_trackio_logs_into_a_local_folder_and_stdout_stays_the_result(tmp_path):
    pytest.importorskip("trackio")
    words = [*TINY, "tracker=trackio", f"output_dir={tmp_path / 'run'}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bn_affine_adapters.training.train", *words], cwd=tmp_path, text=True, check=False,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    with closing(sqlite3.connect(tmp_path / "trackio" / "bn_affine_adapters.db")) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    assert [step for step, _ in rows] == [1]
    assert json.loads(rows[0][1])["top1"] == pytest.approx(result["top1"], abs=1e-3)
