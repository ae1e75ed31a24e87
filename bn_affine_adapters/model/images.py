"""Images: from a file, a PIL image, an array or a tensor to the pixels that a network gets.

Training, evaluation and `predict` prepare images with these functions and no others, so that a network is always asked
about the images that it was trained on. Pixels are whole numbers, 0 to 255, until `normaliser` maps them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from ..errors import ConfigError, DataError
from ..settings import CROP_MODES, INTERPOLATIONS, as_channels

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

MAX_SIDE, MAX_PIXELS = 4096, 2048**2  # pixels that a data configuration may ask for, of a side and in all
MOST = 1e6  # of mean and std; a std is not below 1 / MOST, so that float32 holds every normalised pixel
# Modes that PIL converts to RGB or L without a warning, and without an error, by way of another mode alone.
_FIRST = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "LAB": "RGB"}


def open_image(picture: Picture, channels: int) -> Image.Image:
    """Return a picture upright, in PIL mode RGB or L, as `as_mode` makes it.

    Args:
        picture: a file; a PIL image of any size; an array (H, W) or (H, W, C), uint8, or uint16 if it is grey; or a
            tensor (C, H, W), uint8, or floating point from 0 to 1, which is rounded to 8 bits.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: it cannot be read; the message names the file.
    """
    name = f" {picture}" if isinstance(picture, str | os.PathLike) else ""
    try:
        if isinstance(picture, str | os.PathLike):
            with Image.open(picture) as image:
                return as_mode(image, channels)
        if isinstance(picture, Tensor):
            picture = _array(picture)
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)
        return as_mode(picture, channels)
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error and more, by format
        raise DataError(
            f"The image{name} cannot be read.",
            seen=f"{type(error).__name__}: {error}",
            do="give a file that PIL opens, a PIL image, an array (H, W, C) of uint8, or a tensor (C, H, W) of 0 to 1",
        ) from error


def is_one(picture: Any) -> bool:
    """Tell whether this is one picture, and not a list or a column of them."""
    kinds = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
    return isinstance(picture, kinds) or not isinstance(picture, Iterable)


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return an image upright, as its EXIF orientation says, in PIL mode RGB (3 channels) or L (1).

    Grey is replicated; colours become their ITU-R 601 luma. Palettes are looked up. Alpha is dropped, as timm and
    torchvision do: what lies below a transparent pixel is seen. 16 bits, mode I;16, become the nearest of 8 bits.

    Raises:
        ValueError: PIL cannot convert the image, or its mode, I or F, does not tell which value is white.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip it
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose values have no fixed range: scale them to 8 or 16 bits")
    if image.mode in _FIRST:
        image = image.convert(_FIRST[image.mode])
    return image.convert("RGB" if channels == 3 else "L")


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor (C, H, W) as an array (H, W, C) of uint8."""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, not (C, H, W)")
    if tensor.is_floating_point():
        low, high = tensor.min().item(), tensor.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"a tensor of values {low:g} to {high:g}, not 0 to 1, as before mean and std")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"a tensor of {tensor.dtype}")
    return tensor.detach().permute(1, 2, 0).cpu().numpy()


def image_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yield files as they are given, and of each folder, also of those inside it, the images in the order of names."""
    Image.init()
    kinds = Image.registered_extensions()
    for path in paths:
        if Path(path).is_dir():
            yield from (str(p) for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in kinds and p.is_file())
        else:
            yield str(path)


def completed(data_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a data configuration says of evaluation, with timm's defaults for what it leaves out.

    Raises:
        ConfigError: it has no usable input_size, or another value is not usable.
    """
    data = dict(data_config or {})
    try:
        size = data["input_size"]
        given = {key: data.get(key) for key in ("interpolation", "crop_pct", "crop_mode")}
        usual = {"interpolation": "bilinear", "crop_pct": DEFAULT_CROP_PCT, "crop_mode": "center"}
        found = {
            "input_size": size,
            "mean": data.get("mean", as_channels(IMAGENET_DEFAULT_MEAN, size[0])),
            "std": data.get("std", as_channels(IMAGENET_DEFAULT_STD, size[0])),
            **{key: usual[key] if value is None else value for key, value in given.items()},
        }
        if _usable(**found):
            return found
        why = ", ".join(f"{key}={value!r}" for key, value in found.items())
    except (TypeError, ValueError, KeyError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
    raise ConfigError(
        "The data configuration does not say how images are prepared.",
        seen=why[:300],
        do=f"data_config={{'input_size': [3, 224, 224], ...}}: 1 or 3 channels, sides up to {MAX_SIDE}, {MAX_PIXELS:,} "
        f"pixels, a mean and a std (not near 0) per channel, crop_mode of {', '.join(CROP_MODES)}, interpolation of "
        f"{', '.join(INTERPOLATIONS)}",
    )


def _usable(input_size: Any, mean: Any, std: Any, interpolation: Any, crop_pct: Any, crop_mode: Any) -> bool:
    return (
        isinstance(input_size, list)
        and len(input_size) == 3
        and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in input_size)
        and input_size[0] in (1, 3)  # what an image is opened as
        and 0.1 <= crop_pct <= 2.0  # above 1 timm pads, as for VOLO
        and input_size[1] * input_size[2] <= MAX_PIXELS
        and max(input_size) <= MAX_SIDE * crop_pct  # an image is enlarged to the side before it is cropped
        and all(_numbers(values, input_size[0]) for values in (mean, std))
        and all(abs(value) <= MOST for value in (*mean, *std))
        and all(abs(value) * MOST >= 1 for value in std)
        and crop_mode in CROP_MODES  # timm takes any other for "center"
        and interpolation in INTERPOLATIONS
    )


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) for n in value)


def evaluation_transform(data_config: Mapping[str, Any] | None) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation pipeline: from an image in mode RGB or L to uint8 pixels (C, H, W), not normalised.

    Raises:
        ConfigError: the data configuration is not usable.
    """
    return create_transform(**completed(data_config), is_training=False, normalize=False)


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Return the map from uint8 pixels (n, C, H, W) on a device to float32 ones; mean and std are of values in 0..1."""
    pair = torch.tensor([mean, std], dtype=torch.float32, device=device).mul_(255).view(2, -1, 1, 1)
    # Not one multiply-add: fused, it may round by an element's place in the tensor, and ranks would differ.
    return lambda pixels: pixels.float().sub_(pair[0]).div_(pair[1])
