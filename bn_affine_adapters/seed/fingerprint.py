"""sha256 over the frozen tensors, and a comparison that names the first layer that differs.

Format `bnaffine-fp-v1`: a header line, then a line a tensor, names sorted by their UTF-8 bytes:
name, "float32", shape, sha256 of the little-endian float32 values, separated by tabs.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

SAMPLE = 4096  # values a tensor contributes to the sampled form, at most
DIGEST = 8  # hex digits kept of each tensor's own hash, to name the layer that differs


class Fingerprint(NamedTuple):
    """The fingerprints of one set of tensors, and the first digits of each tensor's own."""

    full: str
    sampled: str
    tensors: str


def float32(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Return a tensor's values as a contiguous little-endian float32 array on the CPU."""
    return np.asarray(tensor.detach().to("cpu", torch.float32).contiguous().numpy(), dtype="<f4")


def _lines(tensors: Mapping[str, NDArray[np.float32]], sample: int | None) -> tuple[str, list[str]]:
    total = hashlib.sha256(f"bnaffine-fp-v1 sample={sample}\n".encode())
    digests = []
    for name in sorted(tensors, key=str.encode):
        values = tensors[name]
        flat = values.reshape(-1)
        step = 1 if sample is None else max(1, -(-flat.size // sample))
        digest = hashlib.sha256(np.ascontiguousarray(flat[::step]).data).hexdigest()
        digests.append(digest)
        total.update(f"{name}\tfloat32\t{','.join(map(str, values.shape))}\t{digest}\n".encode())
    return total.hexdigest(), digests


def layout(shapes: Mapping[str, tuple[int, ...]], scheme: str) -> str:
    """Return the sha256 over names and shapes under a scheme: tells a renamed layer from other weights."""
    lines = [f"{name}\t{','.join(map(str, shapes[name]))}\n" for name in sorted(shapes, key=str.encode)]
    return hashlib.sha256(f"bnaffine-layout-v1 {scheme}\n{''.join(lines)}".encode()).hexdigest()


def fingerprint(tensors: Mapping[str, NDArray[np.float32]]) -> Fingerprint:
    """Return the full and sampled fingerprints of float32 arrays by canonical name."""
    full, digests = _lines(tensors, None)
    return Fingerprint(full, sampled(tensors), "".join(digest[:DIGEST] for digest in digests))


def sampled(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Return the sampled fingerprint alone: every ceil(size / 4096)-th value of each tensor."""
    return _lines(tensors, SAMPLE)[0]


def first_difference(names: list[str], ours: str, theirs: str, digits: int = DIGEST) -> str:
    """Return the first tensor (or module), in the order of ``names``, whose stored digits differ.

    Args:
        names: in the order of the network's definition.
        ours: digits of this network's tensors, in the sorted order of their names.
        theirs: digits that were stored, likewise.
        digits: how many each has.
    """
    place = {name: i * digits for i, name in enumerate(sorted(names, key=str.encode))}
    for name in names:
        at = slice(place[name], place[name] + digits)
        if ours[at] != theirs[at]:
            return name
    return "none by its own digits: only the total differs"
