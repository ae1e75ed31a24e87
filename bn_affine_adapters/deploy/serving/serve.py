"""Serve adapters of one network over HTTP: `bn-adapters serve ADAPTER... [--prefix me/] [--port 8000]`."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .requests import Limits

APPLICATION = "bn-adapters"  # its name in Ray Serve
WAITING = 1000  # requests that wait for a replica; further ones get status 503
GRACE = 5.0  # seconds that Ray waits longer than a request may take


def application(pool: dict[str, Any], limits: Limits, *, replicas: int, batch: int, wait: float, gpus: float) -> Any:
    """Return an application of Ray Serve.

    Args:
        pool: arguments of `AdapterPool`, which each replica has one of.
        limits: on each request.
        replicas: processes that answer.
        batch: images at most that pass the network together.
        wait: seconds that an image waits for others to fill its batch.
        gpus: of each replica; a fraction shares one.
    """
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    from ...model.prediction import Prediction
    from .pool import AdapterPool, Asked
    from .service import Service

    class Server:
        def __init__(self) -> None:
            replica = serve.get_replica_context().replica_id.unique_id
            self.pool = AdapterPool(**pool, device="cuda" if gpus else "cpu")
            self.service = Service(self.pool, limits, self.predict, replica)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait)
        async def predict(self, asked: list[Asked]) -> list[list[Prediction] | Exception]:
            return await asyncio.to_thread(self.pool.predict, asked)

        async def __call__(self, request: Request) -> Response:
            return await self.service.answer(request)

    how = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}
    waiting = {"max_ongoing_requests": 2 * batch, "max_queued_requests": WAITING}
    ending = {"graceful_shutdown_timeout_s": 2 * limits.seconds + GRACE, "graceful_shutdown_wait_loop_s": 0.2}
    return serve.deployment(Server, **how, **waiting, **ending).bind()


@contextmanager
def serving(address: str, host: str, port: int, limits: Limits) -> Iterator[None]:
    """Start Ray and its HTTP proxy here, or connect to a cluster; at the end let replicas answer what they have begun.

    In a cluster, what else it serves goes on.
    """
    # Before Ray is imported: it would report to its makers, and give way to every other program.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray import serve

    # Requests pass the object store by, so that a small /dev/shm is enough; that of a cluster is its own.
    here = {"include_dashboard": False, "object_store_memory": 100_000_000} if address == "local" else {}
    http = {"host": host, "port": port, "request_timeout_s": 2 * limits.seconds + GRACE}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", **here)
        serve.start(proxy_location="EveryNode", http_options=http)
        yield
        serve.delete(APPLICATION)
        if address == "local":
            serve.shutdown()
    finally:
        ray.shutdown()


def ended_by_a_signal() -> threading.Event:
    """Return what is set by SIGTERM or Ctrl-C."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, whose own handler ends the process at once
        signal.signal(number, lambda *_: ended.set())
    return ended


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("adapters", nargs=-1, required=True)
@click.option("--prefix", "prefixes", multiple=True, help="Also serve Hub ids that begin so: me/. Repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 to be reached from elsewhere.")
@click.option("--port", default=8000, show_default=True)
@click.option("--replicas", default=1, show_default=True, help="Processes, each with the network and adapters.")
@click.option("--max-adapters", default=64, show_default=True, help="Loaded at the same time, in each replica.")
@click.option("--max-megabytes", default=512, show_default=True, help="Of the adapters that are loaded.")
@click.option("--batch", default=32, show_default=True, help="Images that pass the network together, at most.")
@click.option("--wait", default=5.0, show_default=True, help="ms that an image waits for others.")
@click.option("--max-body", default=Limits.body, show_default=True, help="Bytes of a request's body.")
@click.option("--max-pixels", default=Limits.pixels, show_default=True, help="Of an image: width times height.")
@click.option("--timeout", default=Limits.seconds, show_default=True, help="Seconds to send a body, and to answer.")
@click.option("--gpus", default=0.0, show_default=True, help="Of each replica; a fraction shares one.")
@click.option("--address", default="local", show_default=True, help="auto: the Ray cluster that runs here.")
def command(adapters: tuple[str, ...], prefixes: tuple[str, ...], **options: Any) -> None:
    """Serve ADAPTERS, folders and Hub ids of one network, over HTTP. SIGTERM lets it answer what it has begun.

    \b
    Example:
      bn-adapters serve runs/signs/adapter me/leaves --prefix me/ --port 8000
    """
    from .pool import AdapterPool  # not at the top: --help needs no torch

    limits = Limits(options["max_body"], options["max_pixels"], options["timeout"])
    pool = {"adapters": adapters, "prefixes": prefixes, "max_adapters": options["max_adapters"]}
    pool["max_bytes"] = options["max_megabytes"] * 1_000_000
    AdapterPool(**pool)  # an error is shown here, before a process starts
    keys = ("replicas", "batch", "gpus")
    served = application(pool, limits, wait=options["wait"] / 1000, **{key: options[key] for key in keys})
    with serving(options["address"], options["host"], options["port"], limits):
        from ray.serve import run

        ended = ended_by_a_signal()  # first: the first replica answers before `run` returns
        run(served, name=APPLICATION)
        click.echo(f"ready: http://{options['host']}:{options['port']}")
        ended.wait()
