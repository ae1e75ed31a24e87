"""Classify images with an adapter's own data configuration and label names."""

import os
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform

from ..adapter.method import BNOnlyConfig
from ..errors import ConfigError, DataError, printable
from .peft_model import BNOnlyPeftModel

MAX_SIDE = 4096  # pixels that a data configuration may ask for


class Prediction(NamedTuple):
    """A class and its softmax probability, 0 to 1."""

    label: str
    probability: float


@torch.inference_mode()
def predict(model: BNOnlyPeftModel, image: str | os.PathLike[str] | Image.Image, top_k: int = 5) -> list[Prediction]:
    """Return the most probable classes of one image by the active adapter, the best first.

    Args:
        model: on any device; its mode is kept.
        image: a file or a PIL image, of any size and mode.
        top_k: how many classes at most.

    Raises:
        ConfigError: the adapter has no usable data configuration, or ``top_k`` is not positive.
        DataError: the image cannot be read.

    >>> import timm
    >>> from PIL import Image
    >>> from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
    >>> config = BNOnlyConfig(seed=0, label_names=["cat", "dog"])
    >>> model = get_bn_only_model(timm.create_model("test_resnet", num_classes=2), config)
    >>> sorted(prediction.label for prediction in predict(model, Image.new("RGB", (64, 48)), top_k=2))
    ['cat', 'dog']
    """
    if top_k < 1:
        raise ConfigError(
            "top_k, the number of classes to return, has to be positive.", seen=f"top_k={top_k}", do="top_k=5"
        )
    config = model.peft_config[model.active_adapter]
    size, transform = _transform(config)
    logits = _logits(model, transform(_open(image, "L" if size[0] == 1 else "RGB")))
    best = logits.softmax(0).topk(min(top_k, len(logits)))
    names = config.label_names or []
    labels = [printable(names[i]) if i < len(names) else str(i) for i in best.indices.tolist()]
    return [Prediction(label, round(value, 6)) for label, value in zip(labels, best.values.tolist(), strict=True)]


def _logits(model: BNOnlyPeftModel, pixels: torch.Tensor) -> torch.Tensor:
    first = next(model.parameters())
    training = model.training
    try:
        return model.eval()(pixels[None].to(first.device, first.dtype))[0].float()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            "The network does not take images of the size in the adapter's data configuration.",
            seen=f"input_size={list(pixels.shape)}; {type(error).__name__}: {error}",
            do="BNOnlyConfig(data_config={'input_size': [...], ...}) as the network needs it",
        ) from error
    finally:
        model.train(training)


def _transform(config: BNOnlyConfig) -> tuple[list[int], Any]:
    data = config.data_config or {}
    wanted = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    try:
        if _usable(data):
            return data["input_size"], create_transform(
                **{key: data[key] for key in wanted if key in data}, is_training=False
            )
        why = f"input_size={data.get('input_size')!r}, crop_pct={data.get('crop_pct')!r}"
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise ConfigError(
        "The adapter does not say how its images are prepared.",
        seen=why[:300],
        do=f"BNOnlyConfig(data_config={{'input_size': [3, 224, 224], ...}}), sides up to {MAX_SIDE}",
    )


def _usable(data: dict[str, Any]) -> bool:
    size = data.get("input_size")
    return (
        isinstance(size, list)
        and len(size) == 3
        and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in size)
        and size[0] in (1, 3)  # what an image is opened as
        and 0.1 <= data.get("crop_pct", 1.0) <= 1.0
        and max(size) <= MAX_SIDE * data.get("crop_pct", 1.0)  # an image is enlarged to the side before it is cropped
        and all(_numbers(data.get(key, [1.0] * 3), size[0]) for key in ("mean", "std"))
        and all(data.get("std", [1.0]))
    )


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) for n in value)


def _open(image: str | os.PathLike[str] | Image.Image, mode: str) -> Image.Image:
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        return opened.convert("RGBA").convert(mode) if opened.mode == "P" else opened.convert(mode)
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise DataError(
            "The image cannot be read.", seen=str(error), do="give a file that PIL opens, or a PIL image"
        ) from error
