"""Signals, launchers that die, processes that do not answer, two runs in one folder: real ones."""

import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch

from bn_affine_adapters.errors import OutputFolderError
from bn_affine_adapters.training import lock
from bn_affine_adapters.training.lock import locked

ROOT = Path(__file__).parents[2]
STOPPING = ROOT / "bn_affine_adapters" / "training" / "stopping.py"
TINY = ("model=test_resnet", "image_size=8", "batch_size=64", "threads=1", "resume=true", "eval_every=100")
# A process that waits to be asked to stop; alone, since the package takes seconds to import.
WAITS = """
import sys, time, runpy
Stopping = runpy.run_path(sys.argv[1])["Stopping"]
with Stopping() as stopping:
    print("ready", flush=True)
    while not (number := stopping.asked()):
        time.sleep(0.01)
    print(number, stopping.reason, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def waits(seconds=0.0, before=(), **environment):
    command = [*before, sys.executable, "-c", WAITS, str(STOPPING), str(seconds)]
    environment = {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_first_signal_is_noted_and_a_second_one_ends_the_process_at_once(number):
    process = waits(60)
    process.send_signal(number)
    assert process.stdout.readline() == f"{int(number)} stopped by {number.name}\n"
    process.send_signal(signal.SIGTERM)  # as launchers do at once, after the process group has had it
    time.sleep(0.1)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(10) == -number


def test_a_signal_that_is_ignored_stays_so():
    process = waits(before=["nohup", "sh", "-c", 'trap "" INT; exec "$@"', "sh"])
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 0


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_notices_that_its_launcher_has_died_and_no_other_parent(launched):
    environment = {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    process = waits(before=["sh", "-c", '"$@"; true', "sh"], **environment)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    if launched:
        assert process.stdout.read() == f"{int(signal.SIGTERM)} its launcher has ended\n"
        child.wait(10)
    else:
        time.sleep(0.2)
        assert child.is_running()
        child.kill()


def test_the_handlers_of_before_are_there_again():
    spec = importlib.util.spec_from_file_location("stopping", STOPPING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with module.Stopping():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


# -- two runs, one folder


def in_another_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_one_run_at_a_time_writes_to_a_folder_and_a_second_one_hears_of_it(tmp_path, refused):
    (first,) = forked.start([*TINY, "epochs=300", f"output_dir={tmp_path}"], tmp_path / "log.txt")
    deadline = time.monotonic() + 120
    while not (tmp_path / ".lock").exists() and first.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    with (
        refused(
            OutputFolderError, f"Another run writes to {tmp_path}", f"process {first.pid} on {socket.gethostname()}"
        ),
        locked(tmp_path),
    ):
        pass
    (second,) = forked.start([*TINY, "overwrite=true", f"output_dir={tmp_path}"], tmp_path / "second.txt")
    second.join(120)
    assert second.exitcode == 1
    said = (tmp_path / "second.txt").read_text()
    assert f"`kill {first.pid}`" in said
    assert "Traceback" not in said
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):  # a lock of a process that is gone is stale
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_where_the_file_system_has_no_locks_the_process_is_looked_for(tmp_path, refused, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", without)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    for owner, words in (
        ({"pid": os.getpid(), "host": here}, ["wait for it"]),
        ({"pid": gone.pid, "host": "elsewhere"}, ["on elsewhere", f"delete {tmp_path}/.lock"]),
        ({"pid": gone.pid, "host": here}, []),
        ("{", []),
    ):
        (tmp_path / ".lock").write_text(owner if isinstance(owner, str) else json.dumps(owner))
        if not words:
            with locked(tmp_path):
                continue
        with refused(OutputFolderError, *words), locked(tmp_path):
            pass


def test_a_lock_removes_what_killed_runs_left_half_written_and_nothing_else(tmp_path):
    kept = [tmp_path / "checkpoint.pt", tmp_path / "adapter" / "adapter_config.json", tmp_path / "notes.saving"]
    litter = [
        tmp_path / ".saving-abc" / "files" / "x",
        tmp_path / ".saving-7-result.json",
        tmp_path / "checkpoint.part",
    ]
    litter += [tmp_path / "adapter" / ".saving-x" / "files" / "y"]
    for path in (*kept, *litter):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with locked(tmp_path):
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([tmp_path / ".lock", *kept])
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]


def test_a_worker_does_not_keep_the_lock_of_a_process_that_was_killed(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import fcntl
file = os.open({str(tmp_path / ".lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
worker = os.fork()
if worker == 0:
    import time
    time.sleep(60)
print(worker, flush=True)
os.close(1)
os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.wait()
    with locked(tmp_path):
        os.kill(worker, 0)
    os.kill(worker, signal.SIGKILL)


# -- several processes


def test_a_process_that_is_stopped_ends_the_other_with_an_error_after_the_timeout(tmp_path):
    words = [*TINY, "epochs=400", "timeout=2", "checkpoint_every_steps=5", f"output_dir={tmp_path / 'run'}"]
    run = forked.start(words, tmp_path / "log.txt", processes=2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and run[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run[1].pid, signal.SIGSTOP)
    run[0].join(60)
    os.kill(run[1].pid, signal.SIGKILL)
    run[1].join()
    log = (tmp_path / "log.txt").read_text()
    assert run[0].exitcode == 1, log
    assert "LostProcessError: Another of the 2 processes has ended, or not answered for 2 s." in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_writes_a_checkpoint_and_ends(tmp_path):
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "recipes/train.py", *TINY]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "epochs=2000", f"output_dir={tmp_path / 'run'}"], cwd=ROOT, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 240
    while "epoch 2/" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, log.read_text()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, 60)
    assert not alive
    assert "its launcher has ended, epoch" in log.read_text()
    past = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["run"]
    assert len(past["replicates"][0]["epochs"]) >= 1
