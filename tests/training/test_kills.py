"""Real runs are ended at random steps, and resume to the bytes and the result line of a run that never was.

    BNAA_KILLS=50 python -m pytest -s tests/training/test_kills.py

With the variable, that many single processes are killed, a fifth as many runs of two processes and of sweeps, and the
job is larger; each line that is printed is one kill. Without it, a few kills of a small job.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import forked
import psutil
import pytest

from bn_affine_adapters.training.checkpoint import read_checkpoint
from bn_affine_adapters.training.lines import TIMES

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("BNAA_KILLS", 0))
SEED = int(os.environ.get("BNAA_KILLS_SEED", 0))
EVERY = 4  # steps between two checkpoints
TINY = ("model=test_resnet", "image_size=8", "threads=1", f"checkpoint_every_steps={EVERY}", "resume=true")
ONE = ("batch_size=64", f"epochs={8 if KILLS else 2}", "eval_every=10")
DRAWS = (
    "model_args={drop_path_rate: 0.3, drop_rate: 0.5}", "condition=bn+head", "streaming=true", "flip=true",
    "workers=1", "batch_size=128", f"epochs={4 if KILLS else 2}", "eval_every=10",
)  # fmt: skip


def launch(folder, *arguments, processes=1):
    """Start a run into a folder; return its processes."""
    folder.mkdir(exist_ok=True)
    where = f"output_dir={folder}", f"results={folder}/results.jsonl"
    return forked.start([*TINY, *arguments, *where], folder / "log.txt", processes)


def outcome(folder):
    """What a finished run left: its files, and its one result line without the times."""
    assert {path.name for path in folder.iterdir()} <= {
        "adapter", "checkpoint.pt", "log.txt", "result.json", "results.jsonl",
    }, "a killed run left something behind"  # fmt: skip
    (line,) = folder.joinpath("results.jsonl").read_text().splitlines()
    files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.name != "results.json"}
    return files, {key: value for key, value in json.loads(line).items() if key not in TIMES}


def finished(run, folder):
    for process in run:
        process.join(300)
        assert process.exitcode == 0, (folder / "log.txt").read_text()


def mark(path):
    try:
        return path.stat().st_mtime_ns, path.stat().st_ino
    except FileNotFoundError:
        return None


def wait_for_step(run, folder, step, pace):
    """Wait until a run is about at a step: for as many checkpoints as come before it, then by the pace of a step."""
    path = folder / "checkpoint.pt"
    deadline = time.monotonic() + 240
    while not (folder / ".lock").exists() and run[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    last = mark(path)
    for _ in range(step // EVERY):
        while mark(path) == last and run[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        last = mark(path)
    time.sleep(random.uniform(0, EVERY * pace))


def end(run, number):
    """Send a signal to a run; SIGKILL goes to all its processes and their workers, any other one to the last."""
    everyone = [each for process in run for each in family(process.pid)]
    for each in everyone if number == signal.SIGKILL else [run[-1]]:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(each.pid, number)
    for process in run:
        process.join(120)
    _, alive = psutil.wait_procs(everyone, 20)
    assert not alive
    return run[-1].exitcode


def family(pid):
    """Return a process and its children, none where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ended_at_random_steps(tmp_path, arguments, number, times, processes=1):
    """Yield (the log, the exit status) of each run that was ended; its folder then has what a whole run has."""
    whole = tmp_path / "whole"
    finished(launch(whole, *arguments, processes=processes), whole)
    expected, result = outcome(whole), json.loads((whole / "result.json").read_text())
    epochs, batch = result["recipe"]["epochs"], result["recipe"]["batch_size"]
    steps = epochs * -(-1438 // batch)
    pace = result["seconds"] / steps
    print(f"\n{steps} steps in {result['seconds']} s; {result['top1']} %")
    generator = random.Random(SEED)
    for index in range(times):
        folder, aim = tmp_path / str(index), generator.randrange(steps)
        run = launch(folder, *arguments, processes=processes)
        wait_for_step(run, folder, aim, pace)
        status = end(run, number)
        log = (folder / "log.txt").read_text()
        at = "no checkpoint"
        if (folder / "checkpoint.pt").exists():
            past = read_checkpoint(folder / "checkpoint.pt")["run"]
            at = f"epoch {len(past['replicates'][0]['epochs'])}, step {past['step']}"
        finished(launch(folder, *arguments, processes=processes), folder)
        same = outcome(folder) == expected
        print(f"{index + 1}: {signal.Signals(number).name} at about step {aim}, status {status}, {at}: same {same}")
        assert same
        yield log, status


def test_a_run_killed_at_a_random_step_resumes_to_the_same_bytes_and_one_line(tmp_path, record_property):
    for _, status in ended_at_random_steps(tmp_path, ONE, signal.SIGKILL, KILLS or 1):
        assert status in (-signal.SIGKILL, 0)
    record_property("runs ended by SIGKILL", KILLS or 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_a_random_step_ends_a_run_in_one_line_and_it_resumes_to_the_same_bytes(
    number, tmp_path, record_property
):
    for log, status in ended_at_random_steps(tmp_path, ONE, number, KILLS or 1):
        assert "Traceback" not in log
        said = log.count(f"stopped by {number.name}, epoch")
        begun = "epoch 1/" in log  # before its first step a process ends at once
        assert (status, said) in {(128 + number, 1), (0, 0)} if begun else status in (128 + number, -number)
    record_property(f"runs ended by {number.name}", KILLS or 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_draw_resume_to_the_same_bytes(number, tmp_path, record_property):
    ended = list(ended_at_random_steps(tmp_path, DRAWS, number, KILLS // 5 or 1, processes=2))
    record_property(f"runs of two processes ended by {number.name}", len(ended))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_with_two_workers_resumes_to_the_same_lines(number, tmp_path, record_property):
    settings = {
        "config": "digits",
        "set": {"image_size": 8, "epochs": 8 if KILLS else 3, "eval_every": 8, "model_args": {"drop_path_rate": 0.3}},
        "conditions": {"bn": {}, "bn+head": {"condition": "bn+head"}},
        "networks": ["test_resnet"],
    }

    def begin(name):
        path, log = tmp_path / f"{name}.yaml", tmp_path / f"{name}.txt"
        path.write_text(json.dumps({**settings, "results": str(tmp_path / f"{name}.jsonl")}), encoding="utf-8")
        command = [sys.executable, "-m", "bn_affine_adapters.training.sweep", path, "checkpoint_every_steps=4"]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*command, "--output", tmp_path / name, "--workers", "2"], cwd=ROOT, stdout=file, stderr=file
            )

    def lines(name):
        text = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(text) == 2
        return sorted(json.dumps({k: v for k, v in json.loads(line).items() if k not in TIMES}) for line in text)

    assert begin("whole").wait(600) == 0, (tmp_path / "whole.txt").read_text()
    generator = random.Random(SEED + 1)
    for index in map(str, range(KILLS // 5 or 1)):
        process = begin(index)
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob(f"{index}/*/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 5))
        children = family(process.pid)
        process.send_signal(number)
        status = process.wait(120)
        _, alive = psutil.wait_procs(children, 60)
        assert not alive, "a run went on without its sweep"
        done = (tmp_path / f"{index}.jsonl").read_bytes().count(b"\n")
        assert begin(index).wait(600) == 0, (tmp_path / f"{index}.txt").read_text()
        same = lines(index) == lines("whole")
        print(f"{index}: {number.name}, status {status}, {done} of 2 runs were finished: same {same}")
        assert same
    record_property(f"sweeps ended by {number.name}", KILLS // 5 or 1)
