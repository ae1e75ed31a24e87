"""What a command prints: in any encoding, and to an end that may take no more."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EIO, ENOSPC, EPIPE
from io import TextIOWrapper

from ..errors import BNAdapterError, file_error

REFUSED = (EDQUOT, EIO, ENOSPC, EPIPE)  # what the system says, without a name, of a stdout that takes no more


@contextmanager
def printing(status: int) -> Iterator[None]:
    """Escape what the terminal's encoding lacks; if stdout takes no more, end with one line and this exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # now, since Python only warns about what fails at its end
    except OSError as error:
        if isinstance(error, BNAdapterError) or error.filename is not None or error.errno not in REFUSED:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has no place to go
        if error.errno != EPIPE:  # whoever read it, e.g. `head`, has enough
            print(f"error: what is printed cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def naming_files() -> Iterator[None]:
    """Turn the system's errors that name a file into FileError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BNAdapterError) or error.filename is None:
            raise
        raise file_error(error, error.filename, "read or written") from error
