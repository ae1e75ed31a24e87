"""What the CIFAR networks share: pooling, head, the methods of a timm model, and the registration in timm."""

import sys
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError

CIFAR_CFG = {  # timm's default configuration of a network for CIFAR-10; a family adds its layers and sizes
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "classifier": "fc",
    "paper_ids": "arXiv:2003.00152",
    "origin_url": "https://github.com/facebookresearch/open_lth",
}


class GlobalAvgPool(nn.Module):
    """Average each channel over all its pixels: (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the averages, shape (N, C)."""
        # Not mean() or timm's pooling, which add up in another order: the logits equal those of open_lth bit for bit.
        return F.avg_pool2d(x, x.shape[-2:]).flatten(1)


class CifarClassifier(nn.Module):
    """Classify the features of a convolutional network, as a timm model does.

    A subclass sets its layers and ``num_features``, calls `add_head` last, and defines `forward_features`,
    which maps images (N, in_chans, H, W) to features (N, num_features, h, w).
    """

    num_features: int

    def add_head(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float) -> None:
        """Add pooling, dropout and head.

        Args:
            num_classes: Outputs of the head; 0 for no head.
            in_chans: Channels of the images.
            global_pool: "avg", or "" for none (with ``num_classes=0``); anything else raises ConfigError.
            drop_rate: Dropout before the head.
        """
        self.in_chans = in_chans
        self.head_hidden_size = self.num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """Return the head: a linear layer with bias, or the identity when there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, on the network's device and of its type.

        Args:
            num_classes: Outputs of the new head; 0 removes it.
            global_pool: "avg"; "" for none, which needs ``num_classes=0``; None keeps what is there.

        Raises:
            ConfigError: ``global_pool`` is something else.
        """
        if global_pool is not None:
            if global_pool != "avg" and (global_pool or num_classes > 0):
                raise ConfigError(
                    f"{type(self).__name__} cannot pool its features in this way.",
                    seen=f"global_pool={global_pool!r}, num_classes={num_classes!r}",
                    do='pass global_pool="avg", or global_pool="" together with num_classes=0',
                )
            self.global_pool = GlobalAvgPool() if global_pool else nn.Identity()
        self.num_classes = num_classes
        like = next(self.parameters())
        self.fc = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of images before pooling, shape (N, num_features, h, w)."""
        raise NotImplementedError  # what the two families differ in

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features, shape (N, num_classes); before the head if ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images, shape (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def register(network: type[CifarClassifier], name: str, cfg: dict[str, Any], segments: int, **shape: int) -> None:
    """Register networks of one shape under a name in timm, which has ``segments`` feature maps and adds to CIFAR_CFG.

    The function that creates them becomes an attribute of the network's module, where timm also has ``default_cfgs``.
    """
    module = sys.modules[network.__module__]

    def create(pretrained: bool = False, **kwargs: Any) -> CifarClassifier:
        features = {"out_indices": tuple(range(segments)), "feature_cls": "hook"}
        return build_model_with_cfg(network, name, pretrained, feature_cfg=features, **shape, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = network.__module__
    create.__doc__ = f"Create a `{network.__name__}`, which has the arguments, with {shape or 'any shape'}."
    vars(module)["default_cfgs"].update(generate_default_cfgs({name: {**CIFAR_CFG, **cfg}}))
    setattr(module, name, register_model(create))
