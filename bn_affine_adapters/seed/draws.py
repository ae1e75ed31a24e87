"""bnaffine-init-v1: from (seed, parameter name) to the same bits on every machine.

Integers from SHAKE-128, one table look-up, one IEEE binary32 multiply; nothing else touches a value, so that
no library version, instruction set or thread count can change it.
"""

import hashlib
import math
from functools import cache
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, check_choice

SCHEME = "bnaffine-init-v1"
CHUNK = 1 << 20  # values a SHAKE stream holds
BLOCK = 1 << 16  # values looked up at a time: bounds the temporary index array
NORMAL_TABLE_SHA256 = "37f9656a37dad9ab61645405bad207e2fe7a0dabf033c8d4f77f4782ec998a19"
SINE_TABLE_SHA256 = "9ec936eb0999b2973bc0be26afc897ba833daa7a567ae5fbfbefb10858135d7d"

# The names of what `rules` draws from: weights of convolutions and linear layers, gamma and beta.
WEIGHT_INITS = ("kaiming_normal", "kaiming_uniform", "binary", "orthogonal")
LAYER_SCALES = ("constructor", "one", "train")
NORM_INITS = ("uniform", "ones", "symmetric", "ones_beta_one", "keep")

Distribution = Literal["normal", "uniform", "sign", "unit"]


def check_seed(seed: Any) -> int:
    """Return a seed as a plain integer; raise ConfigError unless it is an integer, numpy's included, in [0, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ConfigError(
            "The seed is not usable.",
            seen=f"seed={seed!r}",
            do="give an integer with 0 <= seed < 2**64, or None to keep the weights given",
        )
    return int(seed)


def codes(seed: int, name: str, chunk: int, count: int) -> NDArray[np.uint16]:
    """Return the first ``count`` (at most 2^20) uint16 codes of one chunk of the stream of (seed, name)."""
    key = f"{SCHEME}\n{seed}\n{chunk}\n{name}".encode()
    return np.frombuffer(hashlib.shake_128(key).digest(2 * count), dtype="<u2")


@cache
def quantiles() -> NDArray[np.int32]:
    """Return Q: the 32,768 positive quantiles of the normal distribution, times 2^20, rounded."""
    inverse = NormalDist().inv_cdf
    table = np.array([round(2**20 * inverse((32768 + j + 0.5) / 65536)) for j in range(32768)], dtype="<i4")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != NORMAL_TABLE_SHA256:
        raise RuntimeError(f"this machine's normal quantiles hash to {digest}, not {NORMAL_TABLE_SHA256}")
    return table


@cache
def table(distribution: Distribution) -> NDArray[np.float32]:
    """Return z(c) for every code c, float32 (65536,). Each value is exact in binary32."""
    c = np.arange(65536)
    match distribution:
        case "normal":
            positive = quantiles() / 2**20
            z = np.concatenate([-positive[::-1], positive])
        case "uniform":
            z = (2 * c - 65535) / 2**16
        case "sign":
            z = np.where(c >= 32768, 1.0, -1.0)
        case "unit":
            z = (2 * c + 1) / 2**17
    return z.astype(np.float32)


def fill(out: NDArray[np.float32], seed: int, name: str, distribution: Distribution, scale: float = 1.0) -> None:
    """Fill a flat float32 array, in place, with the values of (seed, name).

    Args:
        out: shape (n,), the parameter's values in row-major order.
        seed: 0 <= seed < 2^64.
        name: the parameter's canonical name.
        distribution: which table turns codes into numbers.
        scale: rounded to binary32, then multiplied.

    Raises:
        ConfigError: there is no such distribution.
    """
    check_choice("distribution", distribution, get_args(Distribution))
    values = table(distribution) * np.float32(scale)
    for chunk, start in enumerate(range(0, out.size, CHUNK)):
        stream = codes(seed, name, chunk, min(CHUNK, out.size - start))
        for block in range(0, stream.size, BLOCK):
            part = stream[block : block + BLOCK]
            # mode="clip" lets numpy write into `out` without a buffer; no code is out of range.
            np.take(values, part, out=out[start + block : start + block + part.size], mode="clip")


@cache
def sines() -> NDArray[np.int32]:
    """Return the sines of 65,536 angles (c + 1/2) / 65,536 of a turn, times 2^20, rounded."""
    table = np.array([round(2**20 * math.sin(math.tau * (c + 0.5) / 65536)) for c in range(65536)], dtype="<i4")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != SINE_TABLE_SHA256:
        raise RuntimeError(f"this machine's sines hash to {digest}, not {SINE_TABLE_SHA256}")
    return table


def rotations(out: NDArray[np.float32], seed: int, name: str, temperature: float) -> None:
    """Fill the frequencies of mixed rotary position embeddings, in place: each head is turned by an angle of its own.

    Args:
        out: shape (2, depth, heads, 2 L); [0] is (m cos a, -m sin a), [1] is (m sin a, m cos a), a drawn for each head.
        seed: 0 <= seed < 2^64.
        name: the parameter's canonical name.
        temperature: m is temperature^(-i / L), i = 0 .. L-1, rounded to a multiple of 2^-20.
    """
    _, depth, heads, double = out.shape
    code = codes(seed, name, 0, depth * heads).astype(np.int64).reshape(depth, heads, 1)
    sine, cosine = (sines()[(code + quarter) % 65536] / np.float32(2**20) for quarter in (0, 16384))
    steps = [round(2**20 * temperature ** (-2 * i / double)) for i in range(double // 2)]
    magnitude = np.array(steps, dtype=np.float32) / np.float32(2**20)
    for row, halves in zip(out, ((cosine, -sine), (sine, cosine)), strict=True):
        row[...] = np.concatenate([magnitude * half.astype(np.float32) for half in halves], axis=-1)


def draw(
    shape: tuple[int, ...], seed: int, name: str, distribution: Distribution, scale: float = 1.0
) -> NDArray[np.float32]:
    """Return a new float32 array of ``shape`` with the values of (seed, name).

    >>> draw((2,), 0, "bn1.weight", "unit").tolist()
    [0.01410675048828125, 0.9562606811523438]
    """
    out = np.empty(int(np.prod(shape, dtype=np.int64)), dtype=np.float32)
    fill(out, seed, name, distribution, scale)
    return out.reshape(shape)
