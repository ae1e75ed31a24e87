"""The C++ kernels of a CPU, compiled when they are first asked for and kept in torch's cache."""

import hashlib
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

from .operators import Operators

SOURCE = Path(__file__).with_name("kernels.cpp")
# Contraction off: what is rounded once and what twice is written in the source.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

log = logging.getLogger(__name__)
loaded: bool | None = None  # None: not asked for yet
ACTIVATIONS: frozenset[str] = frozenset()  # that the kernels compute: what they say when they are loaded
_library: Library | None = None  # as long as it is there, the operators are


class CppOperators(Operators):
    """All outputs have their channels last; a mask's bytes are for the rows that the kernels read as one."""

    def channels_last(self, t: Tensor, mask: Tensor | None) -> bool:
        """Return True."""
        return True

    def mask_shape(self, z: Tensor) -> tuple[int, ...]:
        """Return (rows / 8, numbers in a row), as `Shape` in kernels.cpp makes them."""
        rows, width = z.numel() // z.shape[1], z.shape[1]
        while width < 128 and rows % 2 == 0:
            rows, width = rows // 2, width * 2
        return (rows + 7) // 8, width


def has(z: Tensor) -> bool:
    """Tell whether there are kernels for a tensor."""
    return bool(loaded) and z.device.type == "cpu" and z.dtype in DTYPES


def load() -> bool:
    """Compile and load the kernels, once; return whether they are there. The log says why not.

    It takes about a minute once, and moments from then on: the library lies in TORCH_EXTENSIONS_DIR, by default in the
    user's cache. ``BN_AFFINE_ADAPTERS_NATIVE=0`` leaves it out.
    """
    global loaded
    if loaded is None:
        loaded = _load()
    return loaded


def left_out() -> bool:
    """Tell whether the user wants PyTorch's operators alone."""
    unwanted = os.environ.get("BN_AFFINE_ADAPTERS_NATIVE") == "0"
    if unwanted:
        log.info("BN_AFFINE_ADAPTERS_NATIVE=0: lean training runs in PyTorch's own kernels")
    return unwanted


def _load() -> bool:
    if left_out():
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
        _register()
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


def _register() -> None:
    """Tell PyTorch what the operators take and return, and ask them which activations they know."""
    global ACTIVATIONS, _library
    if _library is None:
        ours = CppOperators()
        _library = Library("bnaa", "FRAGMENT")
        ours.register(_library, ours.stats, ours.forward, ours.sums, ours.input_gradient, ours.restore)
    ACTIVATIONS = frozenset(torch.ops.bnaa.activations())
