"""The answers of a server, path by path; it needs Starlette, and no Ray."""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ...model.prediction import Prediction
from .pool import AdapterPool, Asked
from .requests import Limits, as_answer, decode, read_request, refused

PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere, and no browser takes an answer for another type than it has.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'",
    "x-content-type-options": "nosniff",
}
log = logging.getLogger(__name__)


class Service:
    """Answer requests about the adapters of a pool."""

    def __init__(
        self,
        pool: AdapterPool,
        limits: Limits,
        batched: Callable[[Asked], Awaitable[list[Prediction] | Exception]],
        replica: str = "0",
    ) -> None:
        """Take a pool; ``batched`` collects what is asked at the same time for `AdapterPool.predict`."""
        self.pool, self.limits, self.batched, self.replica = pool, limits, batched, replica
        self.statuses: Counter[int] = Counter()
        self.seconds = 0.0
        # They bound how many images are decoded at once, which no slow Hub holds up.
        self.decoders, self.loaders = ThreadPoolExecutor(os.cpu_count()), ThreadPoolExecutor(8)
        self.paths: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/": ("GET", self._page),
            "/adapters": ("GET", self._adapters),
            "/predict": ("POST", self._predict),
            "/healthz": ("GET", self._healthz),
            "/metrics": ("GET", self._metrics),
        }

    async def answer(self, request: Request) -> Response:
        """Answer one request, whatever it asks; an error is JSON with its three parts."""
        start = time.perf_counter()
        headers = {}
        try:
            method, path = self.paths.get(request.url.path, ("", None))
            if path is None:
                do = f"ask for {', '.join(self.paths)}"
                raise refused(404, "There is no such path.", request.url.path[:200], do)
            if request.method != method:
                headers["allow"] = method
                raise refused(405, "The path takes another method.", request.method, method)
            response = await path(request)
        except Exception as error:
            known = as_answer(error)
            if known is not error:
                log.warning("%s %s: %s", request.method, request.url.path, error, exc_info=known.status == 500)
            parts = {"what": known.what, "seen": known.seen, "do": known.do}
            response = JSONResponse({"error": parts}, known.status, headers)
        response.headers.update(_HEADERS)
        self.statuses[response.status_code] += 1
        self.seconds += time.perf_counter() - start
        return response

    async def _predict(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(self.limits.seconds):
                name, data, top_k = await read_request(request, self.limits)
        except TimeoutError as error:
            seen, do = f"{self.limits.seconds:g} s are over", "send it faster, or a smaller one"
            raise refused(408, "The body did not arrive in time.", seen, do) from error
        self.pool.check_name(name)
        async with asyncio.timeout(self.limits.seconds):
            loop = asyncio.get_running_loop()
            if name not in self.pool.held:
                await loop.run_in_executor(self.loaders, self.pool.load, name)
            pixels = await loop.run_in_executor(self.decoders, self._pixels, name, data)
            found = await self.batched(Asked(name, pixels, top_k))
        if isinstance(found, Exception):
            raise found
        return JSONResponse({"adapter": name, "predictions": [each._asdict() for each in found]})

    def _pixels(self, name: str, data: bytes) -> Any:
        return self.pool.pixels(name, decode(data, self.limits))

    async def _adapters(self, request: Request) -> Response:
        held = dict(self.pool.held)
        rows: list[dict[str, Any]] = [
            {"name": n, "loaded": n in held} for n in dict.fromkeys([*self.pool.sources, *held])
        ]
        for row in rows:
            if own := held.get(row["name"]):
                row |= {"bytes": own.bytes, "labels": (own.config.label_names or [])[:1000]}
        return JSONResponse({"adapters": rows, "prefixes": self.pool.prefixes})

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "replica": self.replica, "loaded": len(self.pool.held)})

    async def _metrics(self, request: Request) -> Response:
        held = list(self.pool.held.values())
        numbers: dict[str, float] = {f"{key}_total": count for key, count in self.pool.counts.items()}
        numbers |= {"seconds_total": self.seconds, "loaded": len(held), "bytes": sum(each.bytes for each in held)}
        labels = f'replica="{self.replica}"'
        lines = [f"bn_adapters_{key}{{{labels}}} {number}" for key, number in numbers.items()]
        requests = sorted(self.statuses.items())
        lines += [f'bn_adapters_requests_total{{{labels},status="{code}"}} {count}' for code, count in requests]
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))
