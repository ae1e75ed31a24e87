"""The C++ kernels of a CPU, compiled when they are first asked for and kept in torch's cache, and a GPU's in Triton."""

import hashlib
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
# Contraction off: what is rounded once and what twice is written in the source.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# What forward keeps for backward: the input itself, its normalised value in bfloat16 or in 8 bits, or nothing.
INPUT, BFLOAT16, BYTE, NOTHING = range(4)

log = logging.getLogger(__name__)
loaded: bool | None = None  # None: not asked for yet
triton_loaded: bool | None = None
TRITON_DEVICE = "cuda"  # PyTorch's name for AMD's too


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load() -> bool:
    """Compile and load the kernels, once; return whether they are there. The log says why not.

    It takes about a minute once, and moments from then on: the library lies in TORCH_EXTENSIONS_DIR, by default in the
    user's cache. ``BN_AFFINE_ADAPTERS_NATIVE=0`` leaves it out.
    """
    global loaded
    if loaded is None:
        loaded = _load()
    return loaded


def load_triton() -> bool:
    """Load the kernels of a GPU, once, and try one; return whether they work. The log says why not.

    Triton compiles each when it first runs, for which it needs a C compiler itself.
    """
    global triton_loaded
    if triton_loaded is None:
        triton_loaded = not _left_out() and _load_triton()
    return triton_loaded


def _load_triton() -> bool:
    try:
        from . import triton_columns, triton_ops, triton_rows  # noqa: F401  # whose operators are registered with it

        if torch.cuda.is_available():
            triton_ops.stats(True, torch.zeros(2, 1, device="cuda"), False)
    except Exception as error:  # no Triton, no compiler, a GPU it does not know: whatever it is, there is another way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("lean training runs in PyTorch's own kernels, which torch.compile makes fast: Triton: %s", reason)
        return False
    return True


def _left_out() -> bool:
    left_out = os.environ.get("BN_AFFINE_ADAPTERS_NATIVE") == "0"
    if left_out:
        log.info("BN_AFFINE_ADAPTERS_NATIVE=0: lean training runs in PyTorch's own kernels")
    return left_out


def _load() -> bool:
    if _left_out():
        return False
    # The processor is in the name: a home folder may be shared by machines of several kinds.
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, torch.__version__, _processor())).encode())
    name = f"bn_affine_adapters_{key.hexdigest()[:16]}"
    library = _cache() / f"{name}.so"
    try:
        if library.exists():
            torch.ops.load_library(library)
        else:
            _build(name, library)
        _describe()
    except Exception as error:  # no compiler, no ninja, no room, an unknown flag: whatever it is, there is another way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "lean training runs in PyTorch's own kernels, which are slower: the C++ ones could not be built (%s). "
            "They need a C++ compiler and ninja: pip install ninja",
            reason,
        )
        return False
    return True


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def _build(name: str, library: Path) -> None:
    """Compile in a folder of this process alone and put the result in its place whole.

    PyTorch's own cache waits without end for the lock of a process that was killed while it compiled.
    """
    # Its import warns where there is no GPU, which is no news here.
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    level, path = torch_log.level, os.environ.get("PATH", "")
    torch_log.setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    torch_log.setLevel(level)
    library.parent.mkdir(parents=True, exist_ok=True)
    log.info("lean training: compiling C++ kernels, once")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        # Where pip put ninja, in a virtual environment that is not activated.
        os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
        try:
            cpp_extension.load(name, [str(SOURCE)], extra_cflags=FLAGS, build_directory=scratch, is_python_module=False)
        finally:
            os.environ["PATH"] = path
        os.replace(Path(scratch, library.name), library)


def _processor() -> str:
    """Return what the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _describe() -> None:
    """Tell torch.compile what shapes the operators return."""

    @torch.library.register_fake("bnaa::stats")
    def stats(z: Tensor, range: bool) -> Tensor:
        return z.new_empty((4 if range else 2, z.shape[1]), dtype=wide(z.dtype))

    @torch.library.register_fake("bnaa::forward")
    def forward(
        z: Tensor,
        residual: Tensor | None,
        slope: Tensor,
        level: Tensor,
        zero: Tensor,
        step: Tensor,
        act: int,
        keep: int,
        with_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _innermost(z)
        dtype = torch.uint8 if keep == BYTE else torch.bfloat16
        kept = torch.empty_like(y, dtype=dtype) if keep in (BFLOAT16, BYTE) else z.new_empty(0, dtype=dtype)
        rows, width = z.numel() // z.shape[1], z.shape[1]
        while width < 128 and rows % 2 == 0:
            rows, width = rows // 2, width * 2
        return y, kept, z.new_empty(((rows + 7) // 8 if with_mask else 0, width), dtype=torch.uint8)

    @torch.library.register_fake("bnaa::sums")
    def sums(
        dy: Tensor,
        kept: Tensor,
        mask: Any,
        slope: Tensor,
        level: Tensor,
        zero: Tensor,
        act: int,
        want_du: bool,
        more: Any = None,
    ) -> tuple[Tensor, Tensor]:
        return slope.new_empty((2, dy.shape[1])), _innermost(dy) if want_du else dy.new_empty(0)

    @torch.library.register_fake("bnaa::input_gradient")
    def input_gradient(dy: Tensor, *rest: Any) -> Tensor:
        return _innermost(dy)

    @torch.library.register_fake("bnaa::row_forward")
    def row_forward(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, keep: int) -> tuple[Tensor, ...]:
        y = torch.empty_like(z, memory_format=torch.contiguous_format)
        kept = torch.empty_like(y, dtype=torch.uint8 if keep == BYTE else torch.bfloat16)
        return y, kept, gamma.new_empty(*z.shape[:-1], 2 if keep == BYTE else 0), gamma.new_empty(*z.shape[:-1], 1)

    @torch.library.register_fake("bnaa::row_backward")
    def row_backward(dy: Tensor, kept: Tensor, scale: Tensor, inverse: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
        return dz, torch.empty_like(gamma), torch.empty_like(gamma)

    @torch.library.register_fake("bnaa::restore")
    def restore(kept: Tensor, slope: Tensor, level: Tensor, act: int) -> Tensor:
        return _innermost(kept).to(slope.dtype)


def _innermost(z: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.channels_last if z.dim() == 4 else torch.contiguous_format)
