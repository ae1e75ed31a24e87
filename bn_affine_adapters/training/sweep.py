"""Train conditions x networks x replicates, as one YAML file lists them; one JSON line a run, and no run twice.

    python recipes/sweep.py sweeps/NAME.yaml [key=value ...] [--dry-run] [--workers 2] [--ray]

A killed sweep goes on with the same command: what is in the results file is finished, what was killed resumes from
its checkpoint. key=value arguments change every run's recipe. `--help` lists the options.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

import click
import torch

from .. import BNAdapterError
from ..errors import ConfigError, NetworkError
from .feed import DataOptions, Feed
from .lines import read_results
from .network import measured_step
from .recipe import Recipe, run_key
from .scripts import cores
from .sweeps import Run, epochs_done, plan, read_sweep, result_of, shown

SCRIPTS = {"train": ["-m", "bn_affine_adapters.training.train"], "analyse": ["-m", "bn_affine_adapters.study.analyse"]}
RETRIES = 3  # of a run whose Ray worker or node died
# Linux ends a run with the process that started it, however that ended: no orphan goes on writing to its folder.
STARTER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Outcome(NamedTuple):
    """What became of a run: its result line, or why there is none; and where it was."""

    line: dict[str, Any] | None
    error: str
    where: str


Outcomes = Generator[tuple[Run, Outcome], None, None]


def work(run: Run, analyse: bool) -> Generator[None, None, Outcome]:
    """Train, or resume, and analyse a run in processes of its own; yield while they run, return the outcome."""
    where = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if result_of(run) is None:
            yield from call(run, ["train", *run.words])
        if (result := result_of(run)) is None:
            raise subprocess.SubprocessError(f"{run.folder / 'result.json'} is not the result of this recipe")
        line = {key: value for key, value in result.items() if key not in ("adapter", "network")}
        if analyse and math.isfinite(line["loss"]):  # gammas that are no numbers have no distribution
            yield from call(run, analysis(run))
            line["analysis"] = json.loads((run.folder / "analysis.json").read_text(encoding="utf-8"))["analysis"]
        return Outcome(line, "", where)
    except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        return Outcome(None, str(error), where)


def analysis(run: Run) -> list[str]:
    """Return the arguments that analyse what a run saved, on the data that it was tested on."""
    saved = run.folder / ("adapter" if (run.folder / "adapter").is_dir() else "network")
    usual, data = asdict(DataOptions()), {key: getattr(run.recipe, key) for key in asdict(DataOptions())}
    data |= {key: getattr(run.recipe, key) for key in ("pretrained", "pretrained_file")}
    usual |= {"pretrained": False, "pretrained_file": None}
    saved_with_it = ("image_size", "mean", "std")
    own = {key: value for key, value in data.items() if value != usual[key] and key not in saved_with_it}
    words = [f"{key}={shown(value)}" for key, value in own.items()]
    return ["analyse", f"adapter={saved}", f"output={run.folder / 'analysis.json'}", *words]


def call(run: Run, words: list[str]) -> Generator[None, None, None]:
    """Run one of the scripts, its output added to the run's log; yield until it ends.

    Raises:
        SubprocessError: it failed; the message is the end of its log.
    """
    log = run.folder / "log.txt"
    with log.open("ab") as file:
        start = file.tell()
        command = [sys.executable, "-c", STARTER, *SCRIPTS[words[0]], *words[1:]]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            yield
    finally:
        stop(process)
    if process.returncode:
        tail = log.read_bytes()[start:].decode(errors="replace").splitlines()[-15:]
        raise subprocess.SubprocessError(f"{words[0]}: exit status {process.returncode}\n    " + "\n    ".join(tail))


def stop(process: subprocess.Popen) -> None:
    """End a process that still runs, and wait until it has."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def here(runs: list[Run], analyse: bool, workers: int) -> Outcomes:
    """Do runs on this machine, so many side by side; yield each with its outcome when it ends."""
    waiting = list(runs)
    active: list[tuple[Run, Generator[None, None, Outcome]]] = []
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                active.append((waiting[0], work(waiting.pop(0), analyse)))
            for run, steps in list(active):
                try:
                    next(steps)
                except StopIteration as end:
                    active.remove((run, steps))
                    yield run, end.value
            time.sleep(0.05)
    finally:
        for _, steps in active:
            steps.close()


def on_ray(
    runs: list[Run], analyse: bool, workers: int, *, address: str | None, cpus: float, gpus: float | None
) -> Outcomes:
    """Do runs as Ray tasks; yield each with its outcome when it ends. A run whose worker dies is retried."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: no report to Ray's makers
        import ray
    except ImportError as error:
        do = "pip install 'bn-affine-adapters[ray]', or leave out --ray"
        raise ConfigError("Ray is not installed.", seen=str(error), do=do) from error
    ray.init(address=address or "local", log_to_driver=False, **({} if address else {"num_cpus": workers * cpus}))
    waiting: dict[Any, Run] = {}
    try:
        there = ray.cluster_resources().get("GPU", 0)
        gpus = gpus if gpus is not None else 0.25 * bool(there)
        if not address and gpus > there:
            raise ConfigError("There are too few GPUs.", seen=f"{there:g}, {gpus:g} a run", do="--gpus-per-run 0")
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(alone)
        waiting = {task.remote(run, analyse, os.getcwd()): run for run in runs}
        while waiting:
            done = ray.wait(list(waiting), num_returns=1)[0][0]
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Outcome(None, f"{type(error).__name__}: {error}", "Ray")
            yield waiting.pop(done), outcome
    finally:
        for task in waiting:
            ray.cancel(task)
        ray.shutdown()


def alone(run: Run, analyse: bool, folder: str) -> Outcome:
    """Do one run from the sweep's working folder; return the outcome."""
    os.chdir(folder)
    steps = work(run, analyse)
    with contextlib.closing(steps):
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            time.sleep(0.05)


def open_results(path: Path) -> tuple[IO[bytes], dict[str, bool]]:
    """Return the results file, to append to, and what is `finished` in it; mend a torn last line.

    Raises:
        ConfigError: another sweep writes to it, or a line of it is not a result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        do = "wait for it, or give this sweep another results file"
        raise ConfigError(f"Another sweep writes to {path}.", seen=str(error), do=do) from error
    file.seek(0)
    whole, newline, rest = file.read().rpartition(b"\n")
    if rest:
        try:  # no beginning of an object is an object: this one is whole, perhaps edited by hand
            json.loads(rest)
            file.write(b"\n")
            done = "it is whole, and its newline added"
        except ValueError:
            file.truncate(len(whole + newline))
            done = "it is torn, and cut off"
        click.echo(f"{path}: the last line, {len(rest)} bytes, has no newline: {done}", err=True)
    return file, finished(path)


def finished(path: Path) -> dict[str, bool]:
    """Return the keys of the runs in a results file, if it is there, and whether each was analysed or cannot be."""
    lines = read_results(path) if path.exists() else []
    return {run_key(line["recipe"]): "analysis" in line or not math.isfinite(line.get("loss", 0)) for line in lines}


def append(file: IO[bytes], line: dict[str, Any]) -> None:
    """Add a whole line to the end of a file and see it onto the disk, or leave the file as it was."""
    end, text = os.fstat(file.fileno()).st_size, json.dumps(line).encode() + b"\n"
    try:
        if file.write(text) != len(text):
            raise OSError(f"{file.name} took only a part of a line")
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def dry_run(runs: list[Run], done: Mapping[str, bool]) -> dict[str, Any]:
    """Return all runs with their state, and the hours that are left of each by a step measured here."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], tuple[int, int, float]] = {}
    cuda, threads = accelerator.device.type == "cuda", runs[0].recipe.threads or cores()
    torch.set_num_threads(threads)
    for order, run in enumerate(runs, 1):
        of = run.network, run.condition
        if of not in measured:
            click.echo(f"measuring {run.condition}, {run.network}", err=True)
            measured[of] = measured_cost(run.recipe, accelerator)
        trained, steps, seconds = measured[of]
        epochs = epochs_done(run)
        state = f"resumes at epoch {epochs}" if epochs else "to run"
        ended = run.key in done or result_of(run) is not None
        left = 0 if ended else (run.recipe.epochs - epochs) * steps
        rows.append({"order": order, "condition": run.condition, "network": run.network, "replicate": run.replicate})
        rows[-1] |= {"state": "finished" if ended else state, "trained": trained, "steps": left}
        rows[-1] |= {"hours": seconds * left / 3600}
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {threads} thread" + "s" * (threads > 1)
    total = {"hours": sum(row["hours"] for row in rows), "unit": f"{'GPU' if cuda else 'CPU'}-hours on {name}"}
    return {"runs": rows, "total": total}


def measured_cost(recipe: Recipe, accelerator: Any) -> tuple[int, int, float]:
    """Return the parameters that train, the steps of an epoch, and the seconds of a step."""
    feed = Feed(recipe, accelerator)
    try:
        trained, seconds = measured_step(recipe, feed)
    except RuntimeError as error:  # too large for the memory, or images too small for it
        raise NetworkError(
            f"{recipe.model} takes no training step here.", seen=str(error), do="leave it out, or another machine"
        ) from error
    return trained, feed.steps, seconds


def table(told: dict[str, Any]) -> str:
    """Return a dry run as a table and its sum."""
    rows = [list(told["runs"][0])]
    for row in told["runs"]:
        rows.append([f"{v:.4f}" if k == "hours" else f"{v:,}" if isinstance(v, int) else v for k, v in row.items()])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{told['total']['hours']:.4f} {told['total']['unit']}, training steps alone"])


@click.command(help=__doc__)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1)
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs; runs/sweeps/NAME.")
@click.option(
    "--workers",
    default=1,
    type=click.IntRange(1),
    help="Runs side by side on this machine, on one device; --ray shares out GPUs.",
)
@click.option("--dry-run", is_flag=True, help="Print the runs, their order, and hours from a measured step.")
@click.option("--json", "as_json", is_flag=True, help="Print the dry run as JSON.")
@click.option("--ray", "use_ray", is_flag=True, help="Run through Ray, on this machine unless --ray-address is given.")
@click.option("--ray-address", help="Address of a Ray cluster, or auto.")
@click.option("--gpus-per-run", type=float, help="Share of a GPU, through Ray; 0.25, or 0 where there is none.")
@click.option("--cpus-per-run", default=1.0, help="CPUs, through Ray; also the threads unless threads= says.")
def main(file: Path, changes: tuple[str, ...], output: Path | None, workers: int, **options: Any) -> None:
    """Plan, run what is not finished, append a line a run; exit with 1 if one failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every `finally`
    on_a_cluster = options["use_ray"] or options["ray_address"]
    share = max(1, int(options["cpus_per_run"])) if on_a_cluster else max(1, cores() // workers) if workers > 1 else 0
    try:
        sweep = read_sweep(file)
        runs = plan(sweep, list(changes), output or Path("runs/sweeps", file.stem), threads=share)
        if options["dry_run"]:
            told = dry_run(runs, finished(Path(sweep.results)))
            click.echo(json.dumps(told) if options["as_json"] else table(told))
            return
        results, done = open_results(Path(sweep.results))
        lack = {run.key for run in runs if sweep.analyse and not done.get(run.key, True)}
        # What is not here any more would have to be trained again, and its line is good without.
        left = [run for run in runs if run.key not in done or (run.key in lack and result_of(run) is not None)]
        without = len(lack - {run.key for run in left})
        note = f", {without} of them without analysis: their folders are not here" if without else ""
        click.echo(f"{len(runs)} runs, {len(runs) - len(left)} finished{note}")
        ray = {"address": options["ray_address"], "cpus": options["cpus_per_run"], "gpus": options["gpus_per_run"]}
        outcomes = on_ray(left, sweep.analyse, workers, **ray) if on_a_cluster else here(left, sweep.analyse, workers)
        failed = collect(outcomes, results, len(left))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if failed:
        sys.exit(f"{len(failed)} of {len(left)} runs failed:\n" + "\n".join(f"  {run}" for run in failed))


def collect(outcomes: Outcomes, results: IO[bytes], total: int) -> list[Run]:
    """Append the line of every run as it ends, and tell; return the runs that failed."""
    failed = []
    with contextlib.closing(outcomes):
        for number, (run, (line, error, where)) in enumerate(outcomes, 1):
            if line is None:
                failed.append(run)
                click.echo(
                    f"{number}/{total} {run}: FAILED, {where}\n  {error}\n  log: {run.folder / 'log.txt'}", err=True
                )
                continue
            append(results, line)
            click.echo(f"{number}/{total} {run}: {line['top1']:.2f} %, {line['seconds']:.0f} s, {where}")
    return failed


if __name__ == "__main__":
    main()
