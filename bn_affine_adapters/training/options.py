"""The keys of the scripts that say which data, and which adapter; without torch, so that help is printed at once."""

from dataclasses import dataclass, field

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
    image_size: int = 32
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))
    flip: bool = False
    crop_padding: int = 0  # in memory: zero padding before a random crop
    crop_scale: list[float] = field(default_factory=lambda: [0.1, 1.0])  # streaming: RandomResizedCrop
    crop_ratio: list[float] = field(default_factory=lambda: [0.8, 1.25])
    test_crop: float = 0.875  # streaming: centre crop over resized side
    batch_size: int = 128  # images an optimiser step, over all processes and accumulation steps
    accumulation: int = 1
    channels_last: bool = True


@dataclass
class AdapterOptions(DataOptions):
    """The keys of a script that loads an adapter: the adapter, its base if it has one, and the data."""

    adapter: str = "runs/digits/adapter"
    pretrained: bool = False
    pretrained_file: str | None = None
