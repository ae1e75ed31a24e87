"""What a request asks, read within bounds: of its body, its image and its time."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...errors import (
    AdapterError,
    BNAdapterError,
    ConfigError,
    DataError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    NetworkError,
)

if TYPE_CHECKING:
    from starlette.requests import Request

KEYS = ("adapter", "image", "top_k")
FORMATS = ("JPEG", "PNG", "WEBP")  # decoders that read nothing but the image, and run no other program
MOST_SCANS = 100  # of a JPEG: each passes over the whole image; encoders write about ten
MOST_MARKS = 100  # brackets and commas of JSON: a few bytes of them take much more memory than text
MOST_CLASSES = 1000
# What an error of an adapter means for a client, the first that fits; the Hub refuses access to what does not exist.
_STATUS: tuple[tuple[Any, int], ...] = (
    (HubNotFoundError | HubAccessError, 404),
    (HubUnavailableError, 503),
    (HubError, 502),
    (AdapterError | ConfigError | NetworkError, 422),
)


@dataclass(frozen=True)
class Limits:
    """Bounds on a request.

    Attributes:
        body: bytes of the whole body.
        pixels: of an image, width times height, before it is resized.
        seconds: to read the body, and then to answer.
    """

    body: int = 10_000_000
    pixels: int = 4096**2
    seconds: float = 30.0


class RequestError(BNAdapterError):
    """A request cannot be answered; ``status`` is that of HTTP."""

    status = 400


def refused(status: int, what: str, seen: str, do: str) -> RequestError:
    """Return the error of a request with its status and three parts."""
    error = RequestError(what, seen=seen, do=do)
    error.status = status
    return error


def as_answer(error: Exception) -> RequestError:
    """Return what a client is told of an error: nothing of this server's folders, or of how it failed inside."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DataError):
        return refused(400, error.what, error.seen, error.do)
    if isinstance(error, TimeoutError):
        return refused(504, "The answer takes too long.", "the time of a request is over", "ask again later")
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    what = "The server failed." if status == 500 else "The adapter cannot be served."
    do = "name another adapter" if status < 500 else "try again later"
    return refused(status, what, f"{type(error).__name__}; the server's log has the reason", do)


async def read_request(request: "Request", limits: Limits) -> tuple[str, bytes, int]:
    """Return (adapter, image file, top_k) of a multipart form, or of JSON with the image as base64.

    Raises:
        RequestError: the body is too large or of another type, or does not say what it should.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"multipart/form-data": _form, "application/json": _json}
    if kind not in readers:
        do = "send multipart/form-data, or application/json with the image as base64"
        raise refused(415, "The body has another type.", repr(kind[:100]), do)
    fields = await readers[kind](_bounded(request, limits.body))
    if strange := [key for key in KEYS[:2] if key not in fields] or [key for key in fields if key not in KEYS]:
        seen, do = f"{strange[0][:100]!r}; given: {sorted(fields)}", "send adapter, image and, if wanted, top_k"
        raise refused(400, "A field is missing, or there is one too many.", seen, do)
    adapter, image, top_k = (fields.get(key, "5") for key in KEYS)
    if not isinstance(adapter, str) or not 0 < len(adapter) <= 200:
        raise refused(400, "adapter is no name.", repr(adapter)[:100], "name one that GET /adapters lists")
    if not isinstance(image, bytes):
        raise refused(400, "image is no file.", type(image).__name__, "send the bytes of an image")
    if isinstance(top_k, bool) or not str(top_k).isdecimal() or not 1 <= int(str(top_k)[:9]) <= MOST_CLASSES:
        raise refused(400, "top_k is no number of classes.", repr(top_k)[:100], f"send 1 to {MOST_CLASSES}")
    return adapter, image, int(top_k)


def _bounded(request: "Request", most: int) -> "Request":
    """Return a request whose body is read no further than ``most`` bytes."""
    read = 0

    def check(size: int) -> None:
        if size > most:
            seen, do = f"{size:,} bytes or more; {most:,} are allowed", "send a smaller image"
            raise refused(413, "The body is too large.", seen, do)

    async def receive() -> Any:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        check(read)
        return message

    length = request.headers.get("content-length", "0")
    check(int(length) if length.isdecimal() and len(length) < 20 else 0)
    return type(request)(request.scope, receive)


async def _form(request: "Request") -> Mapping[str, Any]:
    from starlette.formparsers import MultiPartException

    try:
        async with request.form(max_files=1, max_fields=len(KEYS), max_part_size=1000) as form:
            return {key: each if isinstance(each, str) else await each.read() for key, each in form.multi_items()}
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary")
        raise refused(400, "The form cannot be read.", reason, "curl -F adapter=NAME -F image=@FILE") from error


async def _json(request: "Request") -> Mapping[str, Any]:
    body = await request.body()
    do = 'send {"adapter": "NAME", "image": "BASE64", "top_k": 5}'
    if (marks := sum(map(body.count, (b"[", b"{", b",")))) > MOST_MARKS:
        raise refused(400, "The JSON holds too much.", f"{marks:,} brackets and commas", do)
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__}")
        if isinstance(fields.get("image"), str):
            fields["image"] = base64.b64decode(fields["image"], validate=True)
    except (ValueError, RecursionError) as error:
        raise refused(400, "The JSON cannot be read.", f"{type(error).__name__}: {error}"[:200], do) from error
    return fields


def decode(data: bytes, limits: Limits) -> Image.Image:
    """Return the image in a file, decoded.

    Raises:
        RequestError: it is too large, or no whole image in one of the formats.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}; {limits.pixels:,} are allowed")
        if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
            raise ValueError(f"a JPEG of {scans} scans")
        image.load()
        return image
    except Image.DecompressionBombError as error:  # PIL's own bound comes first
        raise refused(413, "The image has too many pixels.", str(error), "send a smaller image") from error
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error and more, by format
        reason = str(error) if isinstance(error, ValueError | OSError) and "BytesIO" not in str(error) else ""
        seen, do = f"{len(data):,} bytes; {type(error).__name__} {reason}", f"send a whole file: {', '.join(FORMATS)}"
        raise refused(400, "The image cannot be read.", seen.strip(), do) from error
