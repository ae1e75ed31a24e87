"""The paper's residual networks for CIFAR, registered in timm.

By name, ``cifar_resnet110`` or ``cifar_wrn14_8``, or at any depth and width:
``timm.create_model("cifar_resnet", depth=26, width=2)``.

Source: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm", arXiv 2003.00152; the networks of open_lth.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .cifar_classifier import CifarClassifier, register

__all__ = ["CifarResNet"]  # timm appends every name it registers


class Block(nn.Module):
    """Add two 3x3 convolutions to the input: (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU()  # never in place: hooks on a norm layer have to see what it returned
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_chs == out_chs
            else nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))
        )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shape (N, out_chs, H / stride, W / stride)."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.downsample(x))


class CifarResNet(CifarClassifier):
    """A residual network of depth 6D + 2: D blocks in each of three segments of 16w, 32w and 64w filters.

    Segments 2 and 3 start with stride 2 and a convolutional shortcut; every other shortcut is the identity.
    Weights are drawn as PyTorch draws them; images of any size will do.

    Source: the paper, section 3; open_lth, ``models/cifar_resnet.py``.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        """Build the network; arguments that are not described here are those of `CifarClassifier.add_head`.

        ``depth`` counts the layers with weights, without shortcuts: 8, 14, 20, ...; ``width`` multiplies the filters.

        Raises:
            ConfigError: There is no network of this depth, width or pooling.
        """
        _check_shape(depth, width)
        super().__init__()
        blocks_per_segment = (depth - 2) // 6
        chs = 16 * width
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.act1 = nn.ReLU()
        blocks, self.feature_info = [], []
        for stride in (1, 2, 4):  # of the segment, against the image
            out_chs = 16 * width * stride
            for i in range(blocks_per_segment):
                blocks.append(Block(chs, out_chs, stride=2 if i == 0 and stride > 1 else 1))
                chs = out_chs
            self.feature_info.append({"num_chs": chs, "reduction": stride, "module": f"blocks.{len(blocks) - 1}"})
        self.blocks = nn.Sequential(*blocks)
        self.num_features = chs
        self.add_head(num_classes, in_chans, global_pool, drop_rate)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups parameters into layers."""
        return {"stem": r"^conv1|bn1", "blocks": r"^blocks\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of images (N, in_chans, H, W) before pooling, shape (N, 64 width, H / 4, W / 4)."""
        return self.blocks(self.act1(self.bn1(self.conv1(x))))


def _check_shape(depth: int, width: int) -> None:
    if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise ConfigError(
            "A CIFAR ResNet has a depth of 6 D + 2, with D = 1, 2, 3, ... blocks in each of its three segments.",
            seen=f"depth={depth!r}",
            do="choose one of 8, 14, 20, 26, ...",
        )
    if not isinstance(width, int) or width < 1:
        raise ConfigError(
            "The width of a CIFAR ResNet multiplies its 16, 32 and 64 filters and is a positive integer.",
            seen=f"width={width!r}",
            do="choose width=1, 2, 3, ...",
        )


default_cfgs: dict[str, Any] = {}  # where timm looks for them
CFG = {"first_conv": "conv1", "pool_size": (8, 8)}

register(CifarResNet, "cifar_resnet", CFG, segments=3)
for _depth in (14, 20, 32, 44, 56, 110, 218, 434, 866):
    register(CifarResNet, f"cifar_resnet{_depth}", CFG, segments=3, depth=_depth)
for _width in (1, 2, 4, 8, 16, 32):
    register(CifarResNet, f"cifar_wrn14_{_width}", CFG, segments=3, depth=14, width=_width)
