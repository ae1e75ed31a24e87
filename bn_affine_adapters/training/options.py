"""The keys of the scripts that say which data, and which adapter; without torch, so that help is printed at once."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, check_choice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's, of ImageNet


@dataclass
class DataOptions:
    """Which data, how they are decoded, augmented and batched."""

    # The data: "digits", a Hub id or a folder
    dataset: str = "digits"
    dataset_config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    held_out: int = 0  # images taken out of the training split and tested on instead of the test split
    image_column: str | None = None
    label_column: str | None = None
    data_seed: int = 0
    streaming: bool = False  # decode in workers with timm's transforms, instead of once into memory
    workers: int = 4  # of the loader, where streaming
    image_size: Any = 32  # of the square, or [height, width]
    interpolation: str = "bilinear"
    mean: list[float] = field(default_factory=lambda: list(MEAN))  # one value: grey images
    std: list[float] = field(default_factory=lambda: list(STD))
    flip: bool = False
    crop_padding: int = 0  # in memory: zero padding before a random crop
    crop_scale: list[float] = field(default_factory=lambda: [0.1, 1.0])  # streaming: RandomResizedCrop
    crop_ratio: list[float] = field(default_factory=lambda: [0.8, 1.25])
    # center, border or squash, as timm says it; by default center where streaming, else squash of the whole image
    crop_mode: str | None = None
    test_crop: float = 0.875  # streaming, or with crop_mode: crop over resized side
    on_bad_image: str = "stop"  # or "skip": leave out images that cannot be decoded, of both splits
    batch_size: int = 128  # images an optimiser step, over all processes and accumulation steps
    accumulation: int = 1
    channels_last: bool = True

    def __post_init__(self) -> None:
        """Refuse an image size of another kind, and unknown words."""
        check_choice("on_bad_image", self.on_bad_image, ("stop", "skip"))
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise ConfigError(
                "image_size is no size.", seen=f"image_size={self.image_size!r}", do="image_size=32, or [height, width]"
            )

    @property
    def data_config(self) -> dict[str, Any]:
        """How images are prepared for evaluation, as timm says it."""
        height, width = self.image_size if isinstance(self.image_size, list) else (self.image_size, self.image_size)
        whole = self.crop_mode is None and not self.streaming
        return {
            "input_size": [len(self.mean), height, width],
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": 1.0 if whole else self.test_crop,
            "crop_mode": self.crop_mode or ("squash" if whole else "center"),
        }


@dataclass
class AdapterOptions(DataOptions):
    """The keys of a script that loads an adapter: the adapter, its base if it has one, and the data."""

    adapter: str = "runs/digits/adapter"
    pretrained: bool = False
    pretrained_file: str | None = None
