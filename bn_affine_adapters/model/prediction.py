"""Classify images with an adapter's own data configuration and label names."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import nn

from ..adapter.method import BNOnlyConfig
from ..errors import ConfigError, DataError, printable
from ..norms.copies import evaluation_copy, uncompiled
from ..norms.find import logits_of
from .images import Picture, completed, evaluation_transform, is_one, normaliser, open_image
from .peft_model import BNOnlyPeftModel

MOST, PIXELS = 64, 2**22  # images, and pixels of their channels, that the network gets at once

AnyPicture = TypeVar("AnyPicture", bound=Picture)


class Prediction(NamedTuple):
    """A class and its softmax probability, 0 to 1."""

    label: str
    probability: float


@overload
def predict(model: BNOnlyPeftModel, image: Picture, top_k: int = 5) -> list[Prediction]: ...
@overload
def predict(model: BNOnlyPeftModel, image: list[Any] | tuple[Any, ...], top_k: int = 5) -> list[list[Prediction]]: ...
def predict(model: BNOnlyPeftModel, image: Any, top_k: int = 5) -> Any:
    """Return the most probable classes of one image, or of each of several, by the active adapter, the best first.

    Args:
        model: on any device and in any mode. Other threads may use it: its modes and running statistics do not
            change. Of a compiled model, what was compiled runs.
        image: a file; a PIL image of any size and mode; an array (H, W, C) of uint8; or a tensor (C, H, W) of floats
            from 0 to 1, before mean and std, or of uint8. Several: a list or column of them, an array (N, H, W, C), or
            a tensor (N, C, H, W). All are prepared as the adapter's data configuration says.
        top_k: how many classes at most.

    Returns:
        The classes of one image, or a list of these for several.

    Raises:
        ConfigError: the adapter has no usable data configuration, there is no adapter, or ``top_k`` is not positive.
        DataError: an image cannot be read.

    >>> import timm
    >>> from PIL import Image
    >>> from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
    >>> config = BNOnlyConfig(seed=0, label_names=["cat", "dog"])
    >>> model = get_bn_only_model(timm.create_model("test_resnet", num_classes=2), config)
    >>> sorted(prediction.label for prediction in predict(model, Image.new("RGB", (64, 48)), top_k=2))
    ['cat', 'dog']
    >>> len(predict(model, torch.rand(3, 3, 64, 48)))
    3
    """
    several = image.ndim == 4 if isinstance(image, np.ndarray | torch.Tensor) else not is_one(image)
    found = []
    for _, classes in predict_each(model, image if several else [image], top_k):
        if isinstance(classes, DataError):
            raise classes
        found.append(classes)
    return found if several else found[0]


@torch.inference_mode()
def predict_each(
    model: BNOnlyPeftModel, images: Iterable[AnyPicture], top_k: int = 5
) -> Iterator[tuple[AnyPicture, list[Prediction] | DataError]]:
    """Yield each image with its classes, as `predict` returns them, or with the error if it cannot be read.

    Raises:
        ConfigError: the adapter has no usable data configuration, or ``top_k`` is not positive.
    """
    _check_model(model)
    if top_k < 1:
        raise ConfigError(
            "top_k, the number of classes to return, has to be positive.", seen=f"top_k={top_k}", do="top_k=5"
        )
    config = model.peft_config[model.active_adapter]
    data = completed(config.data_config)
    channels, height, width = data["input_size"]
    transform, normalise = evaluation_transform(data), normaliser(data["mean"], data["std"])
    together = min(MOST, max(1, PIXELS // (channels * height * width)))
    for some in _groups(images, together):
        read = [_pixels(image, channels, transform) for image in some]
        pixels = [each for each in read if isinstance(each, torch.Tensor)]
        classes = iter(named(_logits(model, normalise(torch.stack(pixels))), config, top_k) if pixels else [])
        for image, each in zip(some, read, strict=True):
            yield image, each if isinstance(each, DataError) else next(classes)


def _pixels(image: Picture, channels: int, transform: Callable[[Any], torch.Tensor]) -> torch.Tensor | DataError:
    try:
        return transform(open_image(image, channels))
    except DataError as error:
        return error


def _groups(images: Iterable[AnyPicture], count: int) -> Iterator[list[AnyPicture]]:
    some: list[AnyPicture] = []
    for image in images:
        some.append(image)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some


def named(logits: torch.Tensor, config: BNOnlyConfig, top_k: int) -> list[list[Prediction]]:
    """Return the best classes of each row of logits, by the names of a configuration."""
    best = logits.softmax(1).topk(min(top_k, logits.shape[1]))
    names = config.label_names or []
    return [
        [
            Prediction(printable(names[i]) if i < len(names) else str(i), round(value, 6))
            for i, value in zip(row, values, strict=True)
        ]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _logits(model: BNOnlyPeftModel, pixels: torch.Tensor) -> torch.Tensor:
    network = evaluation_copy(model)  # other threads may train with the model, or predict too
    first = next(network.parameters())
    try:
        return logits_of(network(pixels.to(first.device, first.dtype))).float()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            "The network does not take images of the size in the adapter's data configuration.",
            seen=f"input_size={list(pixels.shape[1:])}; {type(error).__name__}: {error}",
            do="BNOnlyConfig(data_config={'input_size': [...], ...}) as the network needs it",
        ) from error


def _check_model(model: Any) -> None:
    plain = uncompiled(model) if isinstance(model, nn.Module) else model
    if not isinstance(plain, BNOnlyPeftModel) or not plain.peft_config:
        raise ConfigError(
            "predict takes a network with an adapter, whose configuration says how images are prepared.",
            seen=f"a {type(model).__name__}",
            do="give what load_bn_only_model or get_bn_only_model returned; of a network in "
            "DistributedDataParallel, give model.module",
        )
