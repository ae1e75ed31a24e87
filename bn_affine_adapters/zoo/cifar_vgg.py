"""The VGG networks for CIFAR, registered in timm.

By name, ``cifar_vgg16``, or ``timm.create_model("cifar_vgg", depth=13)``.

Source: open_lth, ``models/cifar_vgg.py``, by the authors of arXiv 2003.00152.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .cifar_classifier import CifarClassifier, register

__all__ = ["CifarVGG"]  # timm appends every name it registers

FILTERS = (64, 128, 256, 512, 512)
LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ConvBnAct(nn.Module):
    """Convolve 3x3, normalise, rectify: (N, in_chs, H, W) to (N, out_chs, H, W)."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, padding=1)
        self.bn = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU()  # never in place: hooks on a norm layer have to see what it returned

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, shape (N, out_chs, H, W)."""
        return self.act(self.bn(self.conv(x)))


class CifarVGG(CifarClassifier):
    """A VGG network of five segments of 64, 128, 256, 512 and 512 filters, with a max-pool between each two.

    Convolutions have a bias; one linear layer follows the global average pool, which is the 2x2 pool of open_lth
    on 32x32 images and takes any image of at least 16x16. Weights are drawn as PyTorch draws them.

    Source: open_lth, ``models/cifar_vgg.py``, names of parameters included.
    """

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        """Build the network of ``depth`` 11, 13, 16 or 19; other arguments are those of `CifarClassifier.add_head`.

        Raises:
            ConfigError: There is no network of this depth or pooling.
        """
        if depth not in LAYERS:
            raise ConfigError(
                "There is no CIFAR VGG of this depth.",
                seen=f"depth={depth!r}",
                do=f"choose one of {', '.join(map(str, LAYERS))}",
            )
        super().__init__()
        layers: list[nn.Module] = []
        self.feature_info = []
        chs = in_chans
        for segment, (out_chs, count) in enumerate(zip(FILTERS, LAYERS[depth], strict=True)):
            if segment > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers.append(ConvBnAct(chs, out_chs))
                chs = out_chs
            self.feature_info.append({"num_chs": chs, "reduction": 2**segment, "module": f"layers.{len(layers) - 1}"})
        self.layers = nn.Sequential(*layers)
        self.num_features = chs
        self.add_head(num_classes, in_chans, global_pool, drop_rate)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters into layers."""
        return {"stem": r"^layers\.0\.", "blocks": r"^layers\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of images (N, in_chans, H, W) before pooling, shape (N, 512, H / 16, W / 16)."""
        return self.layers(x)


default_cfgs: dict[str, Any] = {}  # where timm looks for them
CFG = {"first_conv": "layers.0.conv", "pool_size": (2, 2), "min_input_size": (3, 16, 16)}

register(CifarVGG, "cifar_vgg", CFG, segments=5)
for _depth in LAYERS:
    register(CifarVGG, f"cifar_vgg{_depth}", CFG, segments=5, depth=_depth)
