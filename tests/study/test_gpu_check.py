"""bn-adapters gpu-check at toy size: faults end no other item, what was cut goes on; recipes/pack_data.py."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import script
from PIL import Image

from bn_affine_adapters.cli import main
from bn_affine_adapters.errors import NetworkError
from bn_affine_adapters.seed import draws
from bn_affine_adapters.study.gpu import checks, runs
from bn_affine_adapters.study.gpu.child import ITEMS
from bn_affine_adapters.study.gpu.gpu_check import PARTS, locked, run_part, summary, to_do
from bn_affine_adapters.study.gpu.options import NotEnoughTime, Options
from bn_affine_adapters.training.data import decode, load_splits
from bn_affine_adapters.training.lines import read_results

ROOT = Path(__file__).parents[2]
TOY = ["gpu-check", "--device", "cpu", "--toy"]
# Imported when a part's process starts: too much memory, and what the kernel does where memory is short.
FAULTS = """
import sys
if sys.orig_argv[1:3] == ["-m", "bn_affine_adapters.study.gpu.child"]:
    import os, signal, timm, torch
    create = timm.create_model
    def faulty(name, **settings):
        if name == "test_resnet":
            torch.empty(2**50)
        if name == "test_convnext":
            os.kill(os.getpid(), signal.SIGKILL)
        return create(name, **settings)
    timm.create_model = faulty
"""


def check(out, *words):
    return CliRunner().invoke(main, [*TOY, "--out", str(out), *words])


def lines_of(out):
    lines = [json.loads(line) for line in Path(out, "lines.jsonl").read_text().splitlines()]
    return [line for line in lines if line["state"] != "started"]


def states(out):
    return {line["item"]: line["state"] for line in lines_of(out)}


def test_faults_are_found_and_end_no_other_item(tmp_path, monkeypatch):
    out, faults = tmp_path / "out", tmp_path / "faults"
    faults.mkdir()
    (faults / "sitecustomize.py").write_text(FAULTS)
    with monkeypatch.context() as faulty:
        faulty.setenv("PYTHONPATH", os.pathsep.join([str(faults), str(ROOT)]))
        result = check(out, "--parts", "steps", "--only", "eager")
    assert result.exit_code == 13, result.output
    assert "2 done, 2 failed, 0 skipped, 0 cut; failed: steps" in result.output
    steps = {"test_resnet": "failed", "cifar_resnet14": "done", "test_convnext": "failed", "test_vit": "done"}
    assert states(out) == {f"{name} eager": state for name, state in steps.items()}
    errors = {line["item"]: line for line in lines_of(out) if line["state"] == "failed"}
    assert errors["test_resnet eager"]["out_of_memory"]
    assert "status -9" in errors["test_convnext eager"]["error"]


def test_what_is_done_is_not_repeated_and_a_rehearsal_counts_for_no_gpu(tmp_path):
    toy = Options(str(tmp_path), "cpu", "digits", toy=True, only="memory,streaming")
    for item, state in {"memory": "done", "streaming": "failed"}.items():
        toy.note("feed", item, "started")
        toy.note("feed", item, state)
    assert to_do("feed", toy) == ["streaming"]
    assert to_do("feed", replace(toy, toy=False)) == ["memory", "streaming"]


def test_a_folder_is_for_one_process_and_a_torn_line_is_removed(tmp_path):
    options = Options(str(tmp_path), "cpu", "digits", toy=True)
    options.note("feed", "memory", "done")
    with options.lines.open("a") as file:
        file.write('{"part": "fe')  # killed while it wrote
    with locked(options):
        assert states(tmp_path) == {"memory": "done"}
        assert "Another process writes to" in check(tmp_path).output


def test_without_time_a_failure_stays_one(tmp_path):
    options = Options(str(tmp_path), "cpu", "digits", toy=True, deadline=time.time())
    options.note("feed", "memory", "failed", error="wrong")
    run_part("feed", options)
    assert states(tmp_path) == {"memory": "failed", "streaming": "skipped"}
    assert summary(["feed"], options)[1] == 16
    options.note("checks", "graph", "failed", error="wrong")
    text, status = summary(["checks", "feed"], options)
    assert status == 11
    assert text.endswith("failed: checks, feed")


class UntilFirstCheckpoint(Options):
    """The time is over when there is a checkpoint."""

    @property
    def left(self):
        return 0 if any(Path(self.out).rglob("checkpoint.pt")) else 100


@pytest.mark.parametrize("on", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["cut", "on"])
def test_a_run_that_is_cut_goes_on_from_its_checkpoint(on, tmp_path):
    name, log = "cifar_resnet14 bn x2", tmp_path / "runs" / "cifar_resnet14-bn.log"
    with pytest.raises(NotEnoughTime) as stopped:
        runs.train("cifar10", UntilFirstCheckpoint(str(tmp_path), "cpu", "digits", toy=True), name)
    assert stopped.value.state == "cut"
    before = log.read_text()
    assert "epoch 1/2" in before
    assert not (tmp_path / "results.jsonl").exists()
    assert list(tmp_path.rglob("checkpoint.pt"))
    if not on:
        return
    found = runs.train("cifar10", Options(str(tmp_path), "cpu", "digits", toy=True), name)
    assert "epoch 1/2" not in log.read_text()[len(before) :]
    assert "epoch 2/2" in log.read_text()
    assert found["top1"] == [line["top1"] for line in read_results(tmp_path / "results.jsonl")]
    assert len(found["top1"]) == 2


def test_a_run_that_needs_more_time_than_is_left_is_not_begun(tmp_path):
    options = Options(str(tmp_path), "cpu", "digits", toy=True, deadline=time.time() + 60)
    names = list(runs.planned("cifar10", options))
    measured = {"epoch": 1, "epoch_seconds": 300.0}
    options.note("cifar10", names[0], "skipped", **measured)
    for name, needs in zip(names, (300, 300), strict=True):  # the second: half the replicates, and both epochs
        with pytest.raises(NotEnoughTime) as stopped:
            runs.train("cifar10", options, name)
        assert stopped.value.state == "skipped"
        assert stopped.value.found["left_seconds"] == pytest.approx(needs, rel=0.02)


class UntilFifthEpoch(Options):
    """A minute is left until the fifth epoch has ended."""

    @property
    def left(self):
        return 0 if any("epoch 5/" in log.read_text() for log in Path(self.out).rglob("*.log")) else 60


@pytest.mark.slow
@pytest.mark.parametrize(("smallest", "state"), [(1e-6, "skipped"), (2.0, "cut")])
def test_a_run_that_does_not_fit_makes_room_for_one_that_does(smallest, state, tmp_path):
    options = UntilFifthEpoch(str(tmp_path), "cpu", "digits", toy=True)
    plan = runs.planned("cifar10", options)["cifar_resnet14 bn x2"]
    long = replace(plan, words=[*plan.words, "epochs=5000"], recipe=replace(plan.recipe, epochs=5000))
    with pytest.raises(NotEnoughTime) as stopped:
        runs.watch(long, options, smallest)
    assert stopped.value.state == state
    assert stopped.value.found["left_seconds"] > 60


@pytest.mark.parametrize(
    ("change", "words"), [({"a": torch.zeros(2)}, "1 of 2"), ({"c": torch.ones(1)}, "0 of 2")], ids=["bit", "more"]
)
def test_other_bits_or_tensors_are_refused(change, words):
    wanted = {"a": torch.ones(2), "b": torch.ones(3)}
    checks.compare_bits("net", dict(wanted), wanted)
    with pytest.raises(NetworkError, match=words):
        checks.compare_bits("net", wanted | change, wanted)


def test_the_cpu_draws_the_known_networks_and_another_one_is_refused(monkeypatch):
    assert checks.bits("cpu", torch.float32)["networks"] == 3
    fill = draws.fill

    def wrong(out, *arguments):
        fill(out, *arguments)
        out[-1] += 1

    monkeypatch.setattr(draws, "fill", wrong)
    with pytest.raises(NetworkError, match="draws another cifar_resnet14 here"):
        checks.bits("cpu", torch.float32)


@pytest.mark.parametrize("found", [1.1, float("nan")])
def test_other_gradients_are_refused(found):
    assert checks.agree("net", torch.ones(3), torch.ones(3), 1e-8) == 0
    with pytest.raises(NetworkError, match="something else"):
        checks.agree("net", torch.full((3,), found), torch.ones(3), 0.05)


@pytest.mark.slow
def test_failing_tests_of_the_checkout_are_named():
    with pytest.raises(NetworkError, match="test_nothing_is_there"):
        checks.run_tests("tests/test_nothing_is_there.py", "")


def test_what_cannot_begin_says_so(tmp_path):
    assert check(tmp_path, "--parts", "chekcs").exit_code == 2
    if not torch.cuda.is_available():
        result = CliRunner().invoke(main, ["gpu-check", "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert "--device cpu --toy" in result.output
    assert not any(tmp_path.iterdir())


def test_a_dry_run_writes_nothing_and_estimates_the_runs(tmp_path):
    result = check(tmp_path / "out", "--minutes", "2", "--parts", "checks,deep", "--dry-run")
    assert result.exit_code == 0, result.output
    part, seconds, count, *_ = result.output.splitlines()[1].split()
    assert (part, int(count)) == ("checks", len(ITEMS["checks"](Options("", "cpu", ""))))
    assert int(seconds) == 90
    assert "1 x 2 x 23 steps of" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_check_leaves_no_process_and_goes_on(tmp_path):
    words = ["--out", str(tmp_path), "--parts", "checks", "--only", "bits,lean,graph"]
    command = [sys.executable, ROOT / "recipes" / "gpu.py", *TOY[1:], *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "lines.jsonl"
    while not lines.exists() or '"done"' not in lines.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    before = lines.read_text()
    lines.write_text(before + '{"part": "che')  # killed while it wrote
    result = check(tmp_path, *words[2:])
    assert result.exit_code == 0, result.output
    assert lines.read_text().startswith(before)
    found = lines_of(tmp_path)
    assert {line["state"] for line in found} == {"done"}
    assert len(found) == len({line["item"] for line in found}) == 8


@pytest.mark.slow
def test_the_whole_rehearsal_does_every_part_and_skips_none(tmp_path):
    result = check(tmp_path, "--minutes", "30")
    print(result.output)
    assert result.exit_code == 0, result.output
    assert ", 0 failed, 0 skipped, 0 cut" in result.output
    assert {line["part"] for line in lines_of(tmp_path)} == set(PARTS) == set(ITEMS)
    assert len(read_results(tmp_path / "results.jsonl")) == 4


def png_folder(folder):
    for split, count in {"train": 5, "test": 3}.items():
        for index in range(count):
            path = folder / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    return folder


def test_packed_parts_join_to_the_same_images_and_a_missing_part_is_noticed(tmp_path, capsys):
    pack = script("pack_data")
    source, out = png_folder(tmp_path / "source"), tmp_path / "out"
    pack.pack(str(source), out, 2)
    parts = [out / "part-1", out / "part-2"]
    pack.join(out / "joined", parts)
    for before, after in zip(load_splits(str(source)), load_splits(str(out / "joined")), strict=True):
        ours, theirs = decode(before, size=32), decode(after, size=32)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.label_names == theirs.label_names == ("a", "b")
    with pytest.raises(SystemExit, match="does not hold what was packed"):
        pack.join(out / "torn", parts[:1])


@pytest.mark.slow
def test_cifar10_packs_into_two_parts_of_53_mb(bnaa_data, tmp_path, capsys):
    pack = script("pack_data")
    pack.pack(str(bnaa_data / "cifar10"), tmp_path, 2)
    parts = sorted(tmp_path.glob("part-*"))
    assert [round(sum(path.stat().st_size for path in part.rglob("*.parquet")) / 1e6) for part in parts] == [53, 53]
    pack.join(tmp_path / "cifar10", parts)
