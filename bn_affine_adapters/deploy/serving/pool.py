"""Adapters of one network, loaded on demand within bounds, that classify the images of a batch together."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ...adapter.layer import adapter_layers
from ...adapter.method import BNOnlyConfig
from ...errors import AdapterError, AdapterNameError, BNAdapterError, ConfigError, TooLargeError, nearest_name
from ...model.images import completed, evaluation_transform, normaliser, open_image
from ...model.loading import load_bn_only_model
from ...model.prediction import Prediction, named
from ...settings import hub_id
from ...sharing.hub import fetch
from .requests import refused


class Asked(NamedTuple):
    """An image to classify: the name of its adapter, its normalised pixels (C, H, W), how many classes to return."""

    adapter: str
    pixels: Tensor
    top_k: int = 5


@dataclass(frozen=True)
class Held:
    """An adapter that is loaded.

    Attributes:
        key: its name in the model.
        config: its settings.
        bytes: of its tensors, and of its rows of stacked scales and shifts.
        pixels: from an image to normalised pixels.
    """

    key: str
    config: BNOnlyConfig
    bytes: int
    pixels: Callable[[Image.Image], Tensor]


def named_sources(adapters: Iterable[str]) -> dict[str, str]:
    """Return {name in requests: folder or Hub id}; a folder is called as its last part.

    Raises:
        AdapterNameError: two adapters have one name, or there is none.

    >>> named_sources(["./tasks/signs", "me/leaves"])
    {'signs': './tasks/signs', 'me/leaves': 'me/leaves'}
    """
    found: dict[str, str] = {}
    for adapter in adapters:
        name = hub_id(adapter) or Path(adapter).resolve().name
        if name in found:
            seen, do = f"{found[name]} and {adapter}", "rename one of the folders"
            raise AdapterNameError(f"Two adapters are called {name!r}.", seen=seen, do=do)
        found[name] = adapter
    if not found:
        raise AdapterNameError("There is no adapter to serve.", seen="an empty list", do="give a folder or a Hub id")
    return found


class AdapterPool:
    """One network and the adapters of it that are in use, at most so many and so many bytes.

    The first adapter builds the network and always stays. Others are loaded when they are asked for; if there are too
    many then, the least recently used leave. Threads may call every method.

    Attributes:
        counts: of loads, evictions, batches and images.
        held: the adapters that are loaded, the least recently used first.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        prefixes: Sequence[str] = (),
        *,
        max_adapters: int = 64,
        max_bytes: int = 512_000_000,
        device: str | torch.device = "cpu",
    ) -> None:
        """Build the network of the first adapter.

        Args:
            adapters: folders and Hub ids. They share their frozen weights: architecture, seed, base.
            prefixes: Hub ids that begin with one of these may be asked for too, e.g. "me/" or "me/plants-".
            max_adapters: that are loaded at the same time.
            max_bytes: of all adapters that are loaded.
            device: of the network.

        Raises:
            AdapterNameError: two adapters have one name, or there is none.
            ConfigError: a bound or prefix is not usable.
            BNAdapterError: the first adapter cannot be loaded, see `load_bn_only_model`.
        """
        if wrong := [prefix for prefix in prefixes if "/" not in prefix]:
            raise ConfigError("A prefix of Hub ids names their owner.", seen=repr(wrong[0]), do='"owner/", or longer')
        self.sources, self.prefixes = named_sources(adapters), tuple(prefixes)
        self.max_adapters, self.max_bytes = max_adapters, max_bytes
        self.counts: Counter[str] = Counter(loads=0, evictions=0, batches=0, images=0)
        self.held: dict[str, Held] = {}
        self._folders: dict[str, Path] = {}
        self._lock = threading.RLock()  # of the model and of `held`
        self.first = next(iter(self.sources))
        self.model = load_bn_only_model(self._folder(self.first), adapter_name="served_0", device=device).eval()
        self.device = next(self.model.parameters()).device
        self.held[self.first] = self._tried("served_0")
        if not self._fits():
            seen = f"max_adapters={max_adapters}, max_bytes={max_bytes:,}; it has {self.held[self.first].bytes:,} bytes"
            raise ConfigError("The first adapter, which stays, exceeds the bounds.", seen=seen, do="give larger ones")

    def check_name(self, name: str) -> None:
        """Raise RequestError unless requests may name this adapter: it is listed, or has an allowed prefix."""
        if name not in self.sources and not (name.startswith(self.prefixes) and hub_id(name)):
            what, seen = "There is no such adapter here.", f"{name[:100]!r}{nearest_name(name[:100], self.sources)}"
            raise refused(404, what, seen, "name one that GET /adapters lists")

    def load(self, name: str) -> Held:
        """Load an adapter, if it is not, and return it.

        Raises:
            RequestError: requests may not name this adapter.
            BNAdapterError: it cannot be fetched, loaded or served.
        """
        self.check_name(name)
        self._folder(name)  # without the lock: the Hub may take its time
        with self._lock:
            held = self._load(name)
            if not self._make_room({name}):
                raise self._too_large(name)
        return held

    def pixels(self, name: str, image: Image.Image) -> Tensor:
        """Prepare an image as an adapter's data configuration says. Raises: as `load`, and DataError."""
        held = self.held.get(name) or self.load(name)  # no lock, so that images are prepared while a batch runs
        return held.pixels(image)

    def predict(self, asked: Sequence[Asked]) -> list[list[Prediction] | Exception]:
        """Classify images of several adapters together: of each its best classes, or the error of its adapter alone."""
        found: dict[int, list[Prediction] | Exception] = {}
        with self._lock:
            while left := [n for n in range(len(asked)) if n not in found]:
                errors = self._load_together([asked[n].adapter for n in left])
                groups: dict[torch.Size, list[int]] = {}
                for n in left:
                    if asked[n].adapter in errors:
                        found[n] = errors[asked[n].adapter]
                    elif asked[n].adapter in self.held:
                        groups.setdefault(asked[n].pixels.shape, []).append(n)
                for some in groups.values():
                    found |= zip(some, self._classified([asked[n] for n in some]), strict=True)
        return [found[n] for n in range(len(asked))]

    def _load_together(self, names: Iterable[str]) -> dict[str, Exception]:
        """Load the adapters of a batch, or as many as fit together; return the errors of those that cannot be."""
        errors: dict[str, Exception] = {}
        together: set[str] = set()
        for name in dict.fromkeys(names):
            try:
                self._load(name)
            except Exception as error:  # whatever is wrong with one adapter, the images of the others get answers
                errors[name] = error
                continue
            if self._make_room({*together, name}):
                together.add(name)
            elif together - {self.first}:
                self._evict(name)  # the batch is run in parts
                break
            else:
                errors[name] = self._too_large(name)
        return errors

    def _classified(self, asked: Sequence[Asked]) -> list[list[Prediction] | Exception]:
        """Run images of one size in one batch."""
        self.counts.update(batches=1, images=len(asked))
        images = torch.stack([each.pixels for each in asked]).to(self.device)
        keys = [self.held[each.adapter].key for each in asked]
        try:
            logits = [each.float().cpu() for each in self.model(images, adapter_names=keys)]
        except Exception as error:  # each adapter ran when it was loaded: memory, or the device
            return [error] * len(asked)
        return [self._best(each, row) for each, row in zip(asked, logits, strict=True)]

    def _best(self, asked: Asked, logits: Tensor) -> list[Prediction] | Exception:
        if not logits.isfinite().all():
            what, do = f"The adapter {asked.adapter!r} gives no finite logits.", "ask another adapter, or another image"
            return AdapterError(what, seen=f"{len(logits)} classes", do=do)
        return named(logits[None], self.held[asked.adapter].config, asked.top_k)[0]

    # -- what is loaded; with the lock held

    def _folder(self, name: str) -> Path:
        """Return where an adapter's files are, fetched once: what is served does not change until a restart."""
        if name not in self._folders:
            self._folders[name] = fetch(self.sources.get(name, name))
        return self._folders[name]

    def _load(self, name: str) -> Held:
        """Return an adapter that is now the most recently used; load it if it is not."""
        if name in self.held:
            self.held[name] = self.held.pop(name)
            return self.held[name]
        self.counts["loads"] += 1
        key = f"served_{self.counts['loads']}"
        self.model.load_adapter(self._folder(name), key, torch_device=str(self.device))
        try:
            self.held[name] = self._tried(key)
        except Exception:
            self.model.delete_adapter(key)
            raise
        return self.held[name]

    def _tried(self, key: str) -> Held:
        """Run an adapter once, so that what cannot be mixed is refused before it shares a batch with others.

        Raises:
            ConfigError, AdapterError: the network does not take images of its size, or it cannot be mixed.
        """
        config = self.model.peft_config[key]
        data = completed(config.data_config)
        transform, normalise = evaluation_transform(data), normaliser(data["mean"], data["std"])
        image = torch.zeros(1, *data["input_size"], device=self.device)
        try:
            self.model(image, adapter_names=[key])
        except BNAdapterError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            what, do = "The adapter cannot be served: the network does not take its images.", "correct its data_config"
            raise ConfigError(what, seen=f"{data['input_size']}; {type(error).__name__}: {error}", do=do) from error

        def pixels(image: Image.Image) -> Tensor:
            return normalise(transform(open_image(image, data["input_size"][0]))[None])[0]

        return Held(key, config, self._bytes(key), pixels)

    def _bytes(self, key: str) -> int:
        layers = [layer for layer in adapter_layers(self.model) if key in layer.bn_only_layers]
        tensors = [tensor for layer in layers for tensor in layer.bn_only_layers[key].state_dict().values()]
        tensors += [layer.scale_shift.table[0] for layer in layers if layer.scale_shift is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _make_room(self, needed: set[str]) -> bool:
        """Let the least recently used leave until the bounds hold; return False if what is needed exceeds them."""
        for name in [name for name in self.held if name not in needed and name != self.first]:
            if self._fits():
                return True
            self._evict(name)
        return self._fits()

    def _fits(self) -> bool:
        return len(self.held) <= self.max_adapters and sum(held.bytes for held in self.held.values()) <= self.max_bytes

    def _evict(self, name: str) -> None:
        self.model.delete_adapter(self.held.pop(name).key)
        self.counts["evictions"] += 1

    def _too_large(self, name: str) -> TooLargeError:
        """Evict an adapter that does not fit beside the first one; return the error that says so."""
        seen = f"{self.held[name].bytes:,} bytes, beside {self.held[self.first].bytes:,} of the first adapter"
        self._evict(name)
        do = "start the server with larger bounds"
        return TooLargeError(f"The adapter {name!r} does not fit into the bounds of this server.", seen=seen, do=do)
