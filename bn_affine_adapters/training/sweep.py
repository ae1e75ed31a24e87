"""Train conditions x networks x replicates, as one YAML file lists them, and write one JSON line for each run.

    bn-adapters sweep NAME|FILE.yaml [key=value ...] [--dry-run] [--workers 2] [--ray]

NAME is a packaged sweep, such as `paper` or `digits`. A sweep that was killed continues with the same command: runs in
the results file are finished and skipped, and interrupted runs resume from their checkpoints. key=value arguments
change the recipe of every run. `--help` lists the options.
"""

import asyncio
import fcntl
import json
import math
import os
import platform
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from subprocess import SubprocessError
from typing import IO, Any, NamedTuple

import click

from ..errors import ConfigError, NetworkError
from ..sharing.folder import check_space, try_writing, writing
from ..sharing.results import strict_json
from .lines import mend, read_results, write_line
from .options import DataOptions
from .recipe import Recipe, run_key, words
from .scripts import cores, run_script
from .sweeps import PlannedRun, Sweep, epochs_done, planned_runs, read_sweep, result_of
from .tables import text_table

SCRIPTS = {"train": ["-m", "bn_affine_adapters.training.train"], "analyse": ["-m", "bn_affine_adapters.study.analyse"]}
PATIENCE = 20  # s, in which a run that is to end writes its checkpoint
RETRIES = 3  # of a run whose Ray worker or node died
# On Linux the kernel kills a run when the process that started it ends, so that no orphan writes to its folder.
STARTER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Outcome(NamedTuple):
    """The end of a run: its result line, or the error; and the process that did it."""

    line: dict[str, Any] | None
    error: str
    where: str


class Cluster(NamedTuple):
    """The address of a Ray cluster, none for this machine, and what a run gets of it; gpus None: a usual share."""

    address: str | None
    cpus: float
    gpus: float | None


Report = Callable[[PlannedRun, Outcome], None]  # called at the end of each run


async def work(run: PlannedRun, analyse: bool) -> Outcome:
    """Train or resume a run, and analyse it, each in a process of its own."""
    where = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if result_of(run) is None:
            await call(run, "train", run.arguments)
        if (result := result_of(run)) is None:
            raise SubprocessError(f"{run.folder / 'result.json'} is not the result of this recipe")
        line = {key: value for key, value in result.items() if key not in ("adapter", "network")}
        if analyse and math.isfinite(line["loss"]):  # a diverged run has no distribution of gamma
            await call(run, "analyse", analysis_arguments(run))
            line["analysis"] = json.loads((run.folder / "analysis.json").read_text(encoding="utf-8"))["analysis"]
        return Outcome(line, "", where)
    except (SubprocessError, OSError, ValueError, KeyError) as error:
        return Outcome(None, str(error), where)


def analysis_arguments(run: PlannedRun) -> list[str]:
    """Return the arguments that analyse what a run saved, on the data that it was tested on."""
    from .feed import own_options

    saved = run.folder / ("adapter" if (run.folder / "adapter").is_dir() else "network")
    usual = {**asdict(DataOptions()), "pretrained": False, "pretrained_file": None}
    saved_with_it = own_options(DataOptions().data_config)
    data = {key: getattr(run.recipe, key) for key in usual if key not in saved_with_it}
    changed = {key: value for key, value in data.items() if value != usual[key]}
    return words({"adapter": str(saved), "output": str(run.folder / "analysis.json"), **changed})


async def call(run: PlannedRun, script: str, arguments: list[str]) -> None:
    """Run one of the scripts to its end; append its output to the run's log.

    Raises:
        SubprocessError: it failed; the message is the end of its log.
        NoSpaceError: it failed, and the disk is full.
    """
    log = run.folder / "log.txt"
    with log.open("ab") as file:
        start = file.tell()
        command = [sys.executable, "-c", STARTER, *SCRIPTS[script], *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=file, stderr=STDOUT)
    try:
        status = await process.wait()
    except asyncio.CancelledError:  # the sweep ends: training writes a checkpoint and ends
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), PATIENCE)
        except TimeoutError:
            process.kill()
            await process.wait()
        raise
    if status:
        check_space(run.folder, 4096)  # a full disk took the end of the log too
        tail = log.read_bytes()[start:].decode(errors="replace").splitlines()[-15:]
        raise SubprocessError(f"{script}: exit status {status}\n    " + "\n    ".join(tail))


async def run_here(runs: list[PlannedRun], analyse: bool, workers: int, report: Report) -> None:
    """Do runs on this machine, at most ``workers`` at a time; report each when it ends."""
    free = asyncio.Semaphore(workers)

    async def one(run: PlannedRun) -> None:
        async with free:
            report(run, await work(run, analyse))

    await asyncio.gather(*map(one, runs))


def run_on_ray(runs: list[PlannedRun], analyse: bool, workers: int, report: Report, cluster: Cluster) -> None:
    """Do runs as Ray tasks; report each when it ends. A run whose worker dies is retried."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: no report to Ray's makers
        import ray
    except ImportError as error:
        do = "pip install 'bn-affine-adapters[ray]', or leave out --ray"
        raise ConfigError("Ray is not installed.", seen=str(error), do=do) from error
    address, cpus, gpus = cluster
    ray.init(address=address or "local", log_to_driver=False, **({} if address else {"num_cpus": workers * cpus}))
    waiting: dict[Any, PlannedRun] = {}
    try:
        there = ray.cluster_resources().get("GPU", 0)
        gpus = gpus if gpus is not None else 0.25 * bool(there)
        if not address and gpus > there:
            raise ConfigError("There are too few GPUs.", seen=f"{there:g}, {gpus:g} a run", do="--gpus-per-run 0")
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(work_from)
        waiting = {task.remote(os.getcwd(), run, analyse): run for run in runs}
        while waiting:
            done = ray.wait(list(waiting), num_returns=1)[0][0]
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Outcome(None, f"{type(error).__name__}: {error}", "Ray")
            report(waiting.pop(done), outcome)
    finally:
        for task in waiting:
            ray.cancel(task)
        ray.shutdown()


def work_from(folder: str, run: PlannedRun, analyse: bool) -> Outcome:
    """Do one run from the sweep's working folder; return the outcome."""
    os.chdir(folder)
    return asyncio.run(work(run, analyse))


def open_results(path: Path) -> tuple[IO[bytes], dict[str, bool]]:
    """Return the results file, to append to, and what is `finished` in it; mend a torn last line.

    Raises:
        ConfigError: another sweep writes to it, or a line of it is not a result.
        FileError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        do = "wait for it, or give this sweep another results file"
        raise ConfigError(f"Another sweep writes to {path}.", seen=str(error), do=do) from error
    if done := mend(file):
        click.echo(f"{path}: {done}", err=True)
    return file, finished(path)


def finished(path: Path) -> dict[str, bool]:
    """Return the keys of the runs in a results file, and whether each needs no analysis any more."""
    lines = read_results(path) if path.exists() else []
    return {run_key(line["recipe"]): "analysis" in line or not math.isfinite(line.get("loss", 0)) for line in lines}


def dry_run(runs: list[PlannedRun], done: Mapping[str, bool]) -> dict[str, Any]:
    """Return all runs with their state, and the hours that are left of each by a step measured here."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], tuple[int, int, float]] = {}
    threads = runs[0].recipe.threads or cores()
    torch.set_num_threads(threads)
    for order, run in enumerate(runs, 1):
        kind = run.network, run.condition
        if kind not in measured:
            click.echo(f"measuring {run.condition}, {run.network}", err=True)
            measured[kind] = measured_cost(run.recipe, accelerator)
        trained, steps, seconds = measured[kind]
        epochs = epochs_done(run)
        state = f"resumes at epoch {epochs}" if epochs else "to run"
        ended = run.key in done or result_of(run) is not None
        left = 0 if ended else (run.recipe.epochs - epochs) * steps
        row = {"order": order, "condition": run.condition, "network": run.network, "replicate": run.replicate}
        cost = {"trained": trained, "steps": left, "hours": seconds * left / 3600}
        rows.append({**row, "state": "finished" if ended else state, **cost})
    cuda = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {threads} thread" + "s" * (threads > 1)
    total = {"hours": sum(row["hours"] for row in rows), "unit": f"{'GPU' if cuda else 'CPU'}-hours on {name}"}
    return {"runs": rows, "total": total}


def measured_cost(recipe: Recipe, accelerator: Any) -> tuple[int, int, float]:
    """Return the parameters that train, the steps of an epoch, and the seconds of a step."""
    from .feed import Feed
    from .network import measured_step

    feed = Feed(recipe, accelerator)
    try:
        trained, seconds = measured_step(recipe, feed)
    except RuntimeError as error:  # too large for the memory, or images too small for it
        raise NetworkError(
            f"{recipe.model} takes no training step here.", seen=str(error), do="leave it out, or another machine"
        ) from error
    return trained, feed.steps, seconds


def dry_run_text(plan: Mapping[str, Any]) -> str:
    """Return a dry run as a table and its sum."""
    rows = [list(plan["runs"][0])]
    for row in plan["runs"]:
        rows.append([f"{v:.4f}" if k == "hours" else f"{v:,}" if isinstance(v, int) else v for k, v in row.items()])
    return f"{text_table(rows)}\n{plan['total']['hours']:.4f} {plan['total']['unit']}, training steps alone"


@click.command(help=__doc__)
@click.argument("file", metavar="NAME|FILE.yaml")
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
@click.option(
    "--gpus-per-run", type=click.FloatRange(0), help="Share of a GPU, through Ray; 0.25, or 0 where there is none."
)
@click.option(
    "--cpus-per-run",
    default=1.0,
    type=click.FloatRange(0, min_open=True),
    help="CPUs, through Ray; also the threads unless threads= says.",
)
def command(file: str, changes: tuple[str, ...], output: Path | None, workers: int, **options: Any) -> None:
    """Do the runs that are not finished, append a line for each; exit with 1 if one failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every `finally`
    on_ray = options["use_ray"] or options["ray_address"]
    share = max(1, int(options["cpus_per_run"])) if on_ray else max(1, cores() // workers) if workers > 1 else 0
    sweep = read_sweep(file)
    output = output or Path("runs/sweeps", Path(file).stem)
    runs = planned_runs(sweep, list(changes), output, threads=share)
    if options["dry_run"]:
        plan = dry_run(runs, finished(Path(sweep.results)))
        click.echo(strict_json(plan) if options["as_json"] else dry_run_text(plan))
        return
    results, done = open_results(Path(sweep.results))
    failed: list[PlannedRun] = []
    with results:
        try_writing(output / "log.txt", replaced=False)  # as each run does in its own folder
        left = unfinished(sweep, runs, done)
        report = reporter(results, len(left), failed)
        if on_ray:
            cluster = Cluster(options["ray_address"], options["cpus_per_run"], options["gpus_per_run"])
            run_on_ray(left, sweep.analyse, workers, report, cluster)
        else:
            asyncio.run(run_here(left, sweep.analyse, workers, report))
    if failed:
        sys.exit(f"{len(failed)} of {len(left)} runs failed:\n" + "\n".join(f"  {run}" for run in failed))


def unfinished(sweep: Sweep, runs: list[PlannedRun], done: Mapping[str, bool]) -> list[PlannedRun]:
    """Return the runs without a line, and those without an analysis that can still be made; say how many there are."""
    lack = {run.key for run in runs if sweep.analyse and not done.get(run.key, True)}
    # An analysis needs the run's folder. Without it the run would have to be trained again, and its line is good.
    left = [run for run in runs if run.key not in done or (run.key in lack and result_of(run) is not None)]
    without = len(lack - {run.key for run in left})
    note = f", {without} of them without analysis: their folders are not here" if without else ""
    click.echo(f"{len(runs)} runs, {len(runs) - len(left)} finished{note}")
    return left


def reporter(results: IO[bytes], total: int, failed: list[PlannedRun]) -> Report:
    """Return what notes the end of a run: its line goes to the results and onto the disk, or the run to ``failed``."""
    numbers = count(1)

    def report(run: PlannedRun, outcome: Outcome) -> None:
        line, error, where = outcome
        begin = f"{next(numbers)}/{total} {run}"
        if line is None:
            failed.append(run)
            return click.echo(f"{begin}: FAILED, {where}\n  {error}\n  log: {run.folder / 'log.txt'}", err=True)
        with writing(Path(results.name)):
            write_line(results, line)
        click.echo(f"{begin}: {line['top1']:.2f} %, {line['seconds']:.0f} s, {where}")

    return report


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
