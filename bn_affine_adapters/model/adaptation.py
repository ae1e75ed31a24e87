"""Follow images of another domain, without labels: an adapter's statistics, or its gamma and beta too (Tent)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter.layer import adapter_layers
from ..errors import AdapterError, CollapseError, ConfigError, DataError, check_choice, check_keys
from ..norms.copies import uncompiled
from ..norms.find import STATISTICS, affine, is_norm, is_response_norm, logits_of
from .peft_model import BNOnlyPeftModel
from .recalibration import by_batch, changing, images_of, recalibrate

WINDOW, FEWEST = 512, 64  # images: over which a collapse is looked for, and from how many on


@dataclass
class Adaptation:
    """What `adapt_to` saw. ``share`` is that of the most frequent class among the last predictions, 0 to 1."""

    images: int = 0  # seen by Tent, those of each epoch
    confident: int = 0  # of these, those that counted
    share_before: float = 0.0  # of the network as it was
    share: float = 0.0  # of the adapted one, on the same images
    _before: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Give the adapter the parameters and statistics back that it had before."""
        for module, name, tensor in self._before:
            getattr(module, name).copy_(tensor)


@dataclass(frozen=True)
class Tent:
    """The options of Tent, which minimises the entropy of the predictions by gamma and beta, with Adam.

    Attributes:
        lr: the learning rate.
        epochs: how often the images are seen.
        entropy: images count whose entropy is below this share of the largest possible, log(classes).
        collapse: training stops where the share of the most frequent class has gone so far from what it was before (0)
            towards all images (1); the last 512 images are looked at, from 64 on. With 1 it never stops.
    """

    lr: float = 1e-3
    epochs: int = 1
    entropy: float = 0.4
    collapse: float = 0.4

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("lr", "entropy", "collapse"):
            if not (isinstance(value := getattr(self, name), int | float) and 0 < value <= 1):
                raise ConfigError(f"{name} has to be above 0 and at most 1.", seen=repr(value)[:80], do="leave it out")
        if type(self.epochs) is not int or self.epochs < 1:
            raise ConfigError("epochs has to be a positive integer.", seen=repr(self.epochs)[:80], do="epochs=1")


def adapt_to(
    model: BNOnlyPeftModel, loader: Iterable[Any], method: Literal["statistics", "tent"] = "statistics", **options: Any
) -> Adaptation:
    """Adapt the active adapter to images without labels, in place; it is then saved like any other.

    Args:
        model: with an adapter; its base, its head and other adapters do not change.
        loader: as of `recalibrate`, whose labels are ignored. "tent" reads it two times and more.
        method: "statistics" replaces the running statistics of BatchNorm by those of the images, as `recalibrate`.
            "tent" first trains gamma and beta, while BatchNorm normalises by the statistics of the batch.
        options: of `Tent`: lr, epochs, entropy, collapse.

    Returns:
        What was seen; its method ``reset`` gives the adapter its former values back.

    Raises:
        CollapseError: the predictions fell into one class. The adapter is as it was, as after all errors.
        ConfigError: an option is not usable, or the adapter has nothing of the kind that the method changes.
        AdapterError: there is no adapter, it is disabled, or it is compact.
        DataError: there are no images, or they can be read only once.

    Source: Wang et al., Tent, ICLR 2021. The bound on the entropy: Niu et al., EATA, ICML 2022.
    """
    check_choice("method", method, ("statistics", "tent"))
    check_keys(options, {each.name for each in fields(Tent)} if method == "tent" else (), f"method={method!r}")
    tent, network = Tent(**options), uncompiled(model)
    done = Adaptation(_before=[(m, n, getattr(m, n).detach().clone()) for m in _norms(network) for n in _tensors(m)])
    trained = _tent(network, loader, tent, done) if method == "tent" else []
    try:
        with torch.no_grad():
            for parameter, original in trained:
                original.copy_(parameter)
        if method == "statistics" or changing(network):
            recalibrate(model, loader)
    except BaseException:
        done.reset()
        raise
    return done


def _norms(network: Any) -> list[nn.Module]:
    """Return the norm layers of the active adapter.

    Raises:
        AdapterError: there is no adapter that runs.
    """
    layers = list(adapter_layers(network)) if isinstance(network, BNOnlyPeftModel) else []
    running = [layer.active_module() for layer in layers if layer.active_module() is not layer.base_layer]
    if not running:
        seen = f"a {type(network).__name__} with {len(layers)} layers that have adapters, all of which are off"
        raise AdapterError("No adapter runs that could be adapted.", seen=seen, do="model.set_adapter(name)")
    return [m for each in running for m in each.modules() if is_norm(m) or is_response_norm(m)]


def _tensors(norm: nn.Module) -> list[str]:
    return [name for name in (*affine(norm), *STATISTICS) if name and getattr(norm, name, None) is not None]


def _tent(network: Any, loader: Iterable[Any], tent: Tent, done: Adaptation) -> list[tuple[nn.Parameter, Any]]:
    """Train gamma and beta of a copy; return them, each with the parameter that it was taken from."""
    if iter(loader) is loader:
        seen, do = f"a {type(loader).__name__}", "a list or a DataLoader"
        raise DataError("Tent reads the images several times.", seen=seen, do=do)
    before, now = by_batch(network), by_batch(network)
    trained = _own_parameters(now)
    optimizer = torch.optim.Adam([parameter for parameter, _ in trained], tent.lr)
    window = torch.zeros(2, 0, dtype=torch.long)  # the classes of the last images, before and now
    for batch in (batch for _ in range(tent.epochs) for batch in loader):
        images = images_of(batch, network)
        if len(images) < 2 and changing(network):
            seen, do = f"shape {tuple(images.shape)}", "batches of 64 images and more"
            raise DataError("Batches of one image have no batch statistics.", seen=seen, do=do)
        done.confident += _step(now, images, optimizer, tent.entropy)
        done.images += len(images)
        with torch.no_grad():
            classes = [logits_of(each(images)).argmax(1).cpu() for each in (before, now)]
        window = torch.cat([window, torch.stack(classes)], 1)[:, -WINDOW:]
        done.share_before, done.share = (float(row.bincount().max()) / len(row) for row in window)
        _check_spread(done, window.shape[1], tent.collapse)
    if not done.images:
        raise DataError("There are no images to adapt to.", seen="an empty loader", do="give batches")
    return trained


def _check_spread(done: Adaptation, count: int, collapse: float) -> None:
    if count >= FEWEST and done.share > done.share_before + collapse * (1 - done.share_before):
        raise CollapseError(
            "The predictions fell into one class; the adapter is as it was.",
            seen=f"{done.share:.0%} of the last {count} images, {done.share_before:.0%} before, at {done.images:,}",
            do="a smaller lr or entropy, larger and mixed batches, or method='statistics'",
        )


def _own_parameters(copy: BNOnlyPeftModel) -> list[tuple[nn.Parameter, Any]]:
    """Give the norm layers of a copy gamma and beta of their own, where the adapter trains them."""
    config, trained = copy.peft_config[copy.active_adapter], []
    for norm in _norms(copy):
        for name, trains in zip(affine(norm), (config.train_gamma, config.train_beta), strict=True):
            if name and trains:
                original = norm._parameters[name]
                norm._parameters[name] = own = nn.Parameter(original.detach().clone())  # type: ignore[union-attr]
                trained.append((own, original))
    if not trained:
        seen, do = "no norm layer whose gamma or beta it trains", 'an adapter of norm layers, or method="statistics"'
        raise ConfigError("The adapter has no gamma and beta for Tent.", seen=seen, do=do)
    return trained


@torch.enable_grad()
def _step(network: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, most: float) -> int:
    """Take a step towards less entropy of the images that are confident; return how many they are."""
    logits = logits_of(network(images)).float()
    if logits.shape[1] < 2:
        raise ConfigError("One class has no entropy.", seen=f"shape {tuple(logits.shape)}", do="two classes or more")
    logarithms = logits.log_softmax(1)
    entropies = -(logarithms.exp() * logarithms).sum(1)
    counted = entropies < most * log(logits.shape[1])
    if counted.any():
        optimizer.zero_grad()
        entropies[counted].mean().backward()
        optimizer.step()
    return int(counted.sum())
