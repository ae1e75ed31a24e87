"""An adapter's tensors: their digest, and whether they fit the network."""

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch

from ..errors import AdapterTensorError
from ..seed.digest import tensors_digest


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return `tensors_digest` of an adapter's tensors, by name in the network."""
    return tensors_digest((name, *_entry(tensor)) for name, tensor in tensors.items())


def _entry(tensor: torch.Tensor) -> tuple[str, Sequence[int], str]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return str(tensor.dtype).removeprefix("torch."), tensor.shape, hashlib.sha256(data).hexdigest()


def check_tensors(
    given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], optional: Collection[str] = ()
) -> None:
    """Compare names, shapes, kinds and finiteness of an adapter's tensors with what the network expects.

    Args:
        given: the file's tensors, by name in the network; on the meta device no values are compared.
        expected: the network's tensors.
        optional: names of ``expected`` that may be missing, because their values follow from the seed.

    Raises:
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    problems = [f"missing {name}" for name in expected if name not in given and name not in optional]
    problems += [f"extra {name[:200]}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        if problem := _problem(name, given[name], expected[name]):
            problems.append(f"{name} has {problem}")
    if problems:
        raise AdapterTensorError(
            "The adapter's tensors do not fit the network.",
            seen=f"{len(problems)} problems; {'; '.join(sorted(problems)[:3])}",
            do="load it on the architecture it was made for, or download it again",
        )


def _problem(name: str, given: torch.Tensor, expected: torch.Tensor) -> str | None:
    if given.shape != expected.shape:
        return f"shape {tuple(given.shape)}, the network needs {tuple(expected.shape)}"
    bits = torch.uint8 in (given.dtype, expected.dtype) and given.dtype != expected.dtype  # a mask's, or not
    if bits or given.is_floating_point() != expected.is_floating_point():
        return f"dtype {given.dtype}, the network needs {expected.dtype}"
    return None if given.is_meta else value_problem(name, given.to(expected.dtype))


def value_problem(name: str, tensor: torch.Tensor) -> str | None:
    """Return what is wrong with a tensor's values, or None: no adapter holds such a tensor, and none loads it."""
    if not bool(tensor.isfinite().all()):
        return f"values that are not finite in {tensor.dtype}"
    if name.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any()):
        return "negative values"
    return None
