"""Train only the norm parameters of a network that is redrawn from one seed, as a PEFT method for timm.

Importing the package registers the method "BN_ONLY" in PEFT and the paper's networks in timm, and does nothing else.
"""

__version__ = "0.1.0"

from . import zoo
from .adapter.config import BNOnlyConfig
from .deploy.exporting import export
from .errors import BNAdapterError
from .model.loading import get_bn_only_model, load_bn_only_model, register
from .model.peft_model import BNOnlyPeftModel
from .model.prediction import predict
from .norms.find import shortcut_convs
from .seed.rules import reinit_

register()

__all__ = [
    "BNAdapterError",
    "BNOnlyConfig",
    "BNOnlyPeftModel",
    "export",
    "get_bn_only_model",
    "load_bn_only_model",
    "predict",
    "reinit_",
    "shortcut_convs",
    "zoo",
]
