"""Train only the norm parameters of a network that is redrawn from one seed, as a PEFT method for timm.

Importing the package registers the method "BN_ONLY" in PEFT and the paper's networks in timm: at once if PEFT or timm
is loaded, or else when it is imported, by whomever. So the package itself loads neither torch, timm nor PEFT; a public
name loads what it needs when it is first used.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import zoo
    from .adapter.method import BNOnlyConfig
    from .deploy.exporting import export
    from .errors import BNAdapterError
    from .model.adaptation import adapt_to
    from .model.loading import get_bn_only_model, load_bn_only_model
    from .model.peft_model import BNOnlyPeftModel
    from .model.prediction import predict
    from .model.recalibration import recalibrate
    from .norms.find import shortcut_convs
    from .seed.rules import reinit_

__version__ = "0.1.0"

__all__ = [
    "BNAdapterError",
    "BNOnlyConfig",
    "BNOnlyPeftModel",
    "adapt_to",
    "export",
    "get_bn_only_model",
    "load_bn_only_model",
    "predict",
    "recalibrate",
    "reinit_",
    "shortcut_convs",
    "zoo",
]

_HOMES = {
    "BNAdapterError": "errors",
    "BNOnlyConfig": "adapter.method",
    "BNOnlyPeftModel": "model.peft_model",
    "adapt_to": "model.adaptation",
    "export": "deploy.exporting",
    "get_bn_only_model": "model.loading",
    "load_bn_only_model": "model.loading",
    "predict": "model.prediction",
    "recalibrate": "model.recalibration",
    "reinit_": "seed.rules",
    "shortcut_convs": "norms.find",
}
_PARTS = ("adapter", "deploy", "errors", "lean", "model", "norms", "seed", "settings", "sharing", "zoo")
# Importing our module registers in theirs.
_REGISTERS = {"timm": "zoo", "peft": "model.loading"}


def __getattr__(name: str) -> Any:
    """Import a public name, or a part of the package, when it is first used (PEP 562)."""
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


class _Registration(MetaPathFinder):
    """Register in timm and in PEFT right after their import.

    The finder stays where it is: another thread that walks `sys.meta_path` would skip one if this were taken out.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and (loader := spec.loader) is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == name:  # a loader may have more than one module
                    vars(loader).pop("exec_module", None)
                    _register_in(name)

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader alone
        return spec


def _register_in(name: str) -> None:
    try:
        import_module(f".{_REGISTERS[name]}", __name__)
    except RuntimeError as error:
        if type(error).__name__ != "_DeadlockError":
            raise
        # Another thread imports a module of ours, which waits for the import of theirs to end. So does this one.
        Thread(target=import_module, args=(f".{_REGISTERS[name]}", __name__)).start()


def _register() -> None:
    loaded = [name for name in _REGISTERS if name in sys.modules]
    if len(loaded) < len(_REGISTERS):
        sys.meta_path.insert(0, _Registration())
    for name in loaded:
        _register_in(name)


_register()
