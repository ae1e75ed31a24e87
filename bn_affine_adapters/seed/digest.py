"""The digest of an adapter's tensors, which binds them to their configuration."""

import hashlib
from collections.abc import Iterable, Sequence


def tensors_digest(entries: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """Return the sha256 over tensors: (name in the network, type as torch names it, shape, sha256 of the bytes) each.

    Format `bnaffine-tensors-v1`: a header line, then a line a tensor, names sorted by their UTF-8 bytes: name, type
    ("float32"), shape, sha256 of the bytes in the file, separated by tabs.
    """
    total = hashlib.sha256(b"bnaffine-tensors-v1\n")
    for name, kind, shape, digest in sorted(entries, key=lambda entry: entry[0].encode()):
        total.update(f"{name}\t{kind}\t{','.join(map(str, shape))}\t{digest}\n".encode())
    return total.hexdigest()
