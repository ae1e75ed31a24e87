"""A compact file as a picture: one QR code of its bytes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputFolderError
from ..sharing.compact import BITS, DIGEST, DIGESTS, as_file, payload_bytes
from ..sharing.folder import write_file

MAX_BYTES = 2_953  # in the largest code, version 40, with the least error correction
KINDS = (".png", ".svg")


def check_qr(content: bytes, settings: Mapping[str, Any], sizes: Sequence[int], bits: int, picture: Path) -> None:
    """Raise ConfigError unless a compact file fits into a QR code and the picture can be written.

    Args:
        content: the file.
        settings: that it stores.
        sizes: of its tensors, to say which number of bits would fit.
        bits: that it has.
        picture: where the code is to be written.
    """
    try:
        import segno  # noqa: F401
    except ModuleNotFoundError as error:
        do = "pip install 'bn-affine-adapters[qr]'"
        raise ConfigError("A QR code needs a package that is not installed.", seen=str(error), do=do) from error
    if picture.suffix not in KINDS:
        do = f"a name that ends with {' or '.join(KINDS)}"
        raise ConfigError("A QR code is written as a picture.", seen=f"qr={str(picture)!r}", do=do)
    if picture.exists():
        raise OutputFolderError(f"{picture} exists.", seen=str(picture), do="choose another name")
    if (over := len(content) - MAX_BYTES) > 0:
        lengths = {b: len(as_file(settings, bytes(DIGEST * len(DIGESTS) + payload_bytes(sizes, b)), b)) for b in BITS}
        fit = [str(b) for b in BITS if lengths[b] <= MAX_BYTES]
        raise ConfigError(
            "The compact adapter does not fit into one QR code.",
            seen=f"{len(content):,} bytes with bits={bits}, {over:,} too many",
            do=f"bits={' or '.join(fit)} would fit" if fit else "share the file: no number of bits would fit",
        )


def write_qr(content: bytes, picture: Path) -> None:
    """Write the bytes of a file as a QR code, after `check_qr`."""
    import segno

    found = io.BytesIO()
    segno.make_qr(content, error="l", mode="byte").save(found, kind=picture.suffix[1:], scale=4)
    write_file(picture, found.getvalue())
