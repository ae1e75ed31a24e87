"""Measure the server on loopback with real clients, and write what was found into docs/serving.md.

    python recipes/benchmarks/serve.py [--parts speed kill soak hundred] [--seconds 240] [--requests 640]
        [--clients 32] [--rounds 3] [--network cifar_resnet14] [--write]

Each part starts what it measures, in processes of their own. What was measured is kept in serve.json, part by part.

- speed: 16 adapters in one server, two replicas, against 4 processes with one adapter each (uvicorn, the same code
  without Ray and without batches; 16 did not fit beside other programs). Rounds alternate. Every answer is compared
  with that of the adapter alone.
- kill: SIGKILL for one of two replicas while clients ask; which requests are lost.
- soak: adapters come and go, one request in ten is wrong; memory, and every answer compared.
- hundred: one server with 100 adapters, one replica; two processes with one adapter each stand for a hundred.
"""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import timm
import torch
from PIL import Image

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, predict
from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.tables import markdown_table

HERE = Path(__file__).resolve()
KEPT = HERE.with_suffix(".json")
PARTS = ["speed", "kill", "soak", "hundred"]
IMAGES, CLASSES, NEAR = 8, 10, 1e-4
BODY = 200_000  # bytes that the server of the soak takes
APART = """
import asyncio, sys, torch, uvicorn
from starlette.requests import Request
from bn_affine_adapters.deploy.serving.pool import AdapterPool
from bn_affine_adapters.deploy.serving.requests import Limits
from bn_affine_adapters.deploy.serving.service import Service
torch.set_num_threads(1)
async def alone(asked):
    return (await asyncio.to_thread(service.pool.predict, [asked]))[0]
async def app(scope, receive, send):
    await (await service.answer(Request(scope, receive)))(scope, receive, send)
service = Service(AdapterPool([sys.argv[1]]), Limits(), alone)
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", lifespan="off", timeout_keep_alive=75)
"""
warnings.simplefilter("ignore")  # of bases that nobody else can have


class Task(NamedTuple):
    """An adapter's name, its folder, and what it says of each image when its network has no other adapter."""

    name: str
    folder: str
    answers: list[dict[str, float]]


class Seen(NamedTuple):
    """An answer: when it came, its status (0 if there was none), and whether it was right."""

    time: float
    status: int
    right: bool


def images() -> list[bytes]:
    """Return the files that are sent."""
    random, found = np.random.default_rng(0), []
    for _ in range(IMAGES):
        pixels = random.integers(0, 256, (4, 4, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        found.append(file.getvalue())
    return found


def tasks(root: Path, network: str, count: int) -> list[Task]:
    """Save adapters of one network, each with gamma, beta and head of its own, and ask each of them alone."""
    model = get_bn_only_model(timm.create_model(network, num_classes=CLASSES), BNOnlyConfig(seed=0, train_head=True))
    start = {key: value.clone() for key, value in model.state_dict().items() if "bn_only_layers" in key}
    found, sent = [], [Image.open(io.BytesIO(data)) for data in images()]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if key in start and tensor.is_floating_point() and "running" not in key:
                    tensor.copy_(start[key] + 0.2 * torch.randn(tensor.shape, generator=generator))
        folder = root / f"task_{number}"
        model.save_pretrained(folder)
        answers = [{each.label: each.probability for each in classes} for classes in predict(model, sent, CLASSES)]
        found.append(Task(folder.name, str(folder), answers))
    return found


# -- servers


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(root: Path, *command: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server until the end of the block; yield its address and process when it answers."""
    port, log = command[command.index("--port") + 1] if "--port" in command else command[-1], root / "log.txt"
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, cwd=root)
    url, end = f"http://127.0.0.1:{port}", time.time() + 300
    try:
        while True:
            if process.poll() is not None or time.time() > end:
                raise SystemExit(f"no server: {log.read_text()[-2000:]}")
            try:
                answers = httpx.get(f"{url}/healthz").status_code == 200
            except httpx.HTTPError:
                answers = False
            if answers and ("--port" not in command or "ready: " in log.read_text()):  # all replicas are
                break
            time.sleep(0.5)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def together(root: Path, served: list[Task], *options: str) -> Any:
    """Start one server of several adapters."""
    launcher = str(HERE.parents[1] / "serve.py")
    return started(root, launcher, *(task.folder for task in served), "--port", str(free_port()), *options)


def processes(server: psutil.Process) -> list[psutil.Process]:
    """Return a server and what it started."""
    return [server, *server.children(recursive=True)]


def replicas(server: psutil.Process) -> list[psutil.Process]:
    """Return the replicas of a server."""
    found = []
    for process in server.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def cpu(servers: list[psutil.Process]) -> float:
    """Return the processor seconds of processes that still run."""
    return sum(sum(process.cpu_times()[:2]) for process in servers if process.is_running())


def megabytes(servers: list[psutil.Process]) -> float:
    """Return the memory of processes; what they share is counted once, in parts (PSS)."""
    return round(sum(process.memory_full_info().pss for process in servers if process.is_running()) / 1e6, 1)


# -- clients

WRONG: list[tuple[int, Callable[[bytes], dict[str, Any]]]] = [
    (404, lambda image: {"data": {"adapter": "nobody"}, "files": {"image": image}}),
    (400, lambda image: {"data": {"adapter": "task_0"}, "files": {"image": image[: len(image) // 2]}}),
    (413, lambda image: {"data": {"adapter": "task_0"}, "files": {"image": bytes(BODY)}}),
]


def is_right(response: httpx.Response, expected: dict[str, float]) -> bool:
    """Tell whether an answer is that of the adapter alone."""
    found = {each["label"]: each["probability"] for each in response.json()["predictions"]}
    return found.keys() == expected.keys() and all(abs(found[key] - expected[key]) < NEAR for key in found)


async def client(urls: dict[str, str], asked: list[Task], number: int, more: Callable[[], bool], wrong: int) -> list:
    """Ask one request after another, in an order of its own, while there are more; one in ``wrong`` is wrong."""
    random, sent, seen = np.random.default_rng(number), images(), []
    async with httpx.AsyncClient(timeout=120) as session:
        while more():
            task, n = asked[random.integers(len(asked))], int(random.integers(IMAGES))
            fields: dict[str, Any] = {"data": {"adapter": task.name, "top_k": CLASSES}, "files": {"image": sent[n]}}
            status = 200
            if wrong and random.integers(wrong) == 0:
                status, make = WRONG[random.integers(len(WRONG))]
                fields = make(sent[n])
            try:
                response = await session.post(f"{urls[task.name]}/predict", **fields)
            except httpx.HTTPError:
                seen.append(Seen(time.time(), 0, False))
                continue
            right = is_right(response, task.answers[n]) if status == response.status_code == 200 else True
            seen.append(Seen(time.time(), response.status_code, right and response.status_code == status))
    return seen


def asked_by(
    clients: int,
    urls: dict[str, str],
    asked: list[Task],
    requests: int = 0,
    seconds: float = 0,
    wrong: int = 0,
    beside: Callable[[], None] | None = None,
) -> list[Seen]:
    """Let clients ask so many requests, or for so many seconds, while ``beside`` runs in a thread; return all seen."""
    left, end = iter(range(requests)), time.time() + seconds

    def more() -> bool:
        return next(left, None) is not None if requests else time.time() < end

    async def run() -> list[Seen]:
        watching = asyncio.create_task(asyncio.to_thread(beside)) if beside else None
        found = await asyncio.gather(*(client(urls, asked, number, more, wrong) for number in range(clients)))
        if watching:
            await watching
        return [each for some in found for each in some]

    return asyncio.run(run())


# -- parts


def round_of(side: tuple[Any, Any, Any], clients: int, requests: int) -> tuple[float, float, int]:
    """Return requests a second, processor ms of the servers a request, and the number of wrong answers."""
    servers, urls, asked = side
    start, before = time.perf_counter(), cpu(servers)
    seen = asked_by(clients, urls, asked, requests)
    taken = time.perf_counter() - start
    return requests / taken, (cpu(servers) - before) * 1000 / requests, sum(not each.right for each in seen)


def compared(
    root: Path, mixed: list[Task], apart: list[Task], count: int, clients: int, requests: int, rounds: int
) -> dict[str, Any]:
    """Compare one server of all adapters with a process for each of some, round by round."""
    with ExitStack() as stack:
        url, server = stack.enter_context(together(root, mixed, "--replicas", str(count), "--max-adapters", "200"))
        ports = [str(free_port()) for _ in apart]
        starts = [started(root, "-c", APART, task.folder, port) for task, port in zip(apart, ports, strict=True)]
        with ThreadPoolExecutor(len(apart)) as threads:
            each = list(threads.map(stack.enter_context, starts))
        sides: dict[str, Any] = {
            "together": (processes(server), dict.fromkeys([task.name for task in mixed], url), mixed),
            "apart": ([p for _, p in each], {t.name: u for t, (u, _) in zip(apart, each, strict=True)}, apart),
        }
        for _, urls, asked in sides.values():
            asked_by(clients, urls, asked, requests=4 * len(asked))  # loads every adapter
        taken = [{name: round_of(side, clients, requests) for name, side in sides.items()} for _ in range(rounds)]
        found = {
            name: {
                "a_second": round(median(one[name][0] for one in taken), 1),
                "cpu_ms": round(median(one[name][1] for one in taken), 2),
                "wrong": sum(one[name][2] for one in taken),
                "MB": megabytes(side[0]),
                "processes": len(side[0]),
            }
            for name, side in sides.items()
        }
        found["together"]["replicas_MB"] = megabytes(replicas(server))
    ratio = median(one["together"][0] / one["apart"][0] for one in taken)
    return {**found, "ratio": round(ratio, 2), "adapters": len(mixed), "apart_count": len(apart), "asked": requests}


def speed(root: Path, network: str, clients: int, requests: int, rounds: int, **_: Any) -> dict[str, Any]:
    """Measure 16 adapters in one server against 4 processes."""
    made = tasks(root, network, 16)
    return compared(root, made, made[:4], 2, clients, requests, rounds)


def hundred(root: Path, network: str, clients: int, requests: int, rounds: int, **_: Any) -> dict[str, Any]:
    """Measure 100 adapters in one server against two processes."""
    made = tasks(root, network, 100)
    return compared(root, made, made[:2], 1, clients, requests, rounds)


def kill(root: Path, network: str, clients: int, **_: Any) -> dict[str, Any]:
    """Kill a replica while clients ask; return what was lost, and when there are two again."""
    made, killed = tasks(root, network, 16), 0.0
    with together(root, made, "--replicas", "2") as (url, server):
        before = {process.pid for process in replicas(server)}

        def strike() -> None:
            nonlocal killed
            time.sleep(5)
            os.kill(min(before), signal.SIGKILL)
            killed = time.time()

        seen = asked_by(clients, dict.fromkeys([task.name for task in made], url), made, seconds=25, beside=strike)
        end = time.time() + 120
        while len(replicas(server)) < 2 and time.time() < end:
            time.sleep(0.5)
        again = asked_by(clients, dict.fromkeys([task.name for task in made], url), made, requests=200)
        new = len({process.pid for process in replicas(server)} - before)
    lost = [each for each in seen if each.status != 200]
    return {
        "asked": len(seen) + len(again),
        "lost": dict(Counter(each.status for each in lost)),
        "lost_within_s": round(max((each.time - killed for each in lost), default=0.0), 2),
        "before_the_kill": sum(each.time < killed for each in lost),
        "clients": clients,
        "wrong": sum(not each.right for each in [*seen, *again] if each.status == 200),
        "new_replicas": new,
        "after": dict(Counter(each.status for each in again)),
    }


def soak(root: Path, network: str, seconds: int, **_: Any) -> dict[str, Any]:
    """Ask for more adapters than fit, and one request in ten wrongly; watch memory."""
    made, memory = tasks(root, network, 40), []
    with together(root, made, "--max-adapters", "8", "--max-body", str(BODY)) as (url, server):
        (replica,) = replicas(server)
        urls = dict.fromkeys([task.name for task in made], url)
        asked_by(8, urls, made, seconds=20)  # warm

        def watch() -> None:
            end = time.time() + seconds
            while time.time() < end:
                memory.append(replica.memory_info().rss / 1e6)
                time.sleep(1)

        seen = asked_by(8, urls, made, seconds=seconds, wrong=10, beside=watch)
        metrics = httpx.get(f"{url}/metrics").text
    counts = {line.split("{")[0]: float(line.split()[-1]) for line in metrics.splitlines() if "requests" not in line}
    tenth = max(1, len(memory) // 10)
    return {
        "seconds": seconds,
        "statuses": dict(sorted(Counter(each.status for each in seen).items())),
        "wrong": sum(not each.right for each in seen),
        "loads": int(counts["bn_adapters_loads_total"]),
        "evictions": int(counts["bn_adapters_evictions_total"]),
        "first_MB": round(median(memory[:tenth]), 1),
        "last_MB": round(median(memory[-tenth:]), 1),
    }


def measure(parts: list[str], **options: Any) -> dict[str, Any]:
    """Run the parts named, and keep what each found."""
    torch.set_num_threads(1)
    for part in parts:
        with tempfile.TemporaryDirectory() as root:
            found = {**globals()[part](Path(root), **options), "machine": machine(), "network": options["network"]}
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        KEPT.write_text(json.dumps({**kept, part: found}, indent=1, sort_keys=True) + "\n")
    return json.loads(KEPT.read_text())


def page(found: dict[str, Any]) -> str:
    """Return the section of docs/serving.md."""
    texts = [globals()[f"{part}_text"](found[part]) for part in PARTS if part in found]
    head = f"""Written by `python recipes/benchmarks/serve.py --write`;
{next(iter(found.values()))["machine"]}.
Clients and servers share the cores with other programs: times are long."""
    return "\n\n".join([head, *texts])


def sides(found: dict[str, Any], apart: str, scale: float = 1) -> str:
    """Return a table of the two sides of a comparison; ``scale`` times the memory of the processes measured."""
    rows = [
        [name, side["a_second"], side["cpu_ms"], f"{times * side['MB']:,.0f}", side["wrong"]]
        for name, side, times in (("one server", found["together"], 1), (apart, found["apart"], scale))
    ]
    return markdown_table(["", "requests a second", "processor ms a request", "memory, MB", "lost or wrong"], rows)


def speed_text(found: dict[str, Any]) -> str:
    """Return what the part speed found, in words."""
    return f"""### One server against a process for each task

32 clients ask {found["network"]}, images of 40 px, {found["asked"]} requests a round. Every answer is compared with
that of the adapter alone. The server has two replicas; a process for each task is the same code behind uvicorn, without
Ray and without batches. Rounds alternate; the median ratio of requests a second is {found["ratio"]}.

{sides(found, f"{found['apart_count']} processes")}

The memory of the server is that of all its processes, Ray's own too; its two replicas have
{found["together"]["replicas_MB"]:,.0f} MB of it. On a CPU a batch of small images takes about as long as its images one
after another, and Ray's proxy adds its own time to each request: what one server saves is memory."""


def hundred_text(found: dict[str, Any]) -> str:
    """Return what the part hundred found, in words."""
    scale = found["adapters"] / found["apart_count"]
    apart = f"{found['apart_count']} processes; memory of {found['adapters']} by proportion"
    return f"""### A hundred adapters

One server with one replica and 100 adapters of {found["network"]}, against processes with one adapter each. A hundred
processes do not fit here: {found["apart_count"]} were measured, and their memory is multiplied. Rounds alternate; the
ratio of requests a second is {found["ratio"]}.

{sides(found, apart, scale)}

The replica has {found["together"]["replicas_MB"]:,.0f} MB, the rest is Ray's."""


def kill_text(found: dict[str, Any]) -> str:
    """Return what the part kill found, in words."""
    lost = ", ".join(f"{count} with status {status}" for status, count in found["lost"].items()) or "none"
    return f"""### A replica is killed

One of two replicas gets SIGKILL while {found["clients"]} clients ask, each one request at a time. Of {found["asked"]:,}
requests were lost: {lost}; {found["before_the_kill"]} of them before the kill, the last {found["lost_within_s"]} s
after it. Ray answers so for what was in the replica. All others were answered, {found["wrong"]} of them wrongly. Ray
started {found["new_replicas"]} new replica."""


def soak_text(found: dict[str, Any]) -> str:
    """Return what the part soak found, in words."""
    statuses = ", ".join(f"{count:,} with {status}" for status, count in found["statuses"].items())
    grown = found["last_MB"] - found["first_MB"]
    return f"""### Adapters that come and go

{found["seconds"]} s, 8 clients, 40 adapters of which 8 fit, one request in ten wrong on purpose: an adapter that does
not exist, half an image, a body that is too large. Answers:
{statuses}; {found["wrong"]} wrong answers or statuses.
{found["loads"]:,} loads and {found["evictions"]:,} evictions. The replica's memory was {found["first_MB"]} MB in the
first tenth and {found["last_MB"]} MB in the last, {grown:+.1f} MB. safetensors 0.8 keeps 64 bytes of each tensor that
PEFT reads by it, which is {found["loads"] * 77 * 64 / 1e6:.1f} MB for these loads."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every `finally`
    usual: dict[str, Any] = {"parts": PARTS, "network": "cifar_resnet14", "clients": 32, "requests": 640}
    benchmark(__file__, __doc__, measure, page, page="serving.md", **usual, rounds=3, seconds=240)
