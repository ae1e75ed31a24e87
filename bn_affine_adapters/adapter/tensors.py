"""An adapter's tensors: their names in the network, and whether they fit it."""

from collections.abc import Collection, Mapping

import torch

from ..errors import AdapterTensorError

PREFIX = "base_model.model."  # what PEFT puts before a name


def bare(key: str) -> str:
    """Return a tensor's name in the network, without PEFT's prefix."""
    return key.removeprefix(PREFIX)


def check_tensors(
    given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], optional: Collection[str] = ()
) -> None:
    """Compare names, shapes, kinds and finiteness of an adapter's tensors with what the network expects.

    Args:
        given: the file's, by name in the network.
        expected: the network's.
        optional: those of ``expected`` that may be missing, since they follow from the seed.

    Raises:
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    problems = [f"missing {name}" for name in expected if name not in given and name not in optional]
    problems += [f"extra {name[:200]}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        ours, theirs = expected[name], given[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, the network needs {tuple(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name} has dtype {theirs.dtype}, the network needs {ours.dtype}")
        elif not theirs.is_meta and not bool(theirs.to(ours.dtype).isfinite().all()):
            problems.append(f"{name} has values that are not finite in {ours.dtype}")
        elif (
            not theirs.is_meta and name.endswith((".running_var", ".num_batches_tracked")) and bool((theirs < 0).any())
        ):
            problems.append(f"{name} has negative values")
    if problems:
        raise AdapterTensorError(
            "The adapter's tensors do not fit the network.",
            seen=f"{len(problems)} problems; {'; '.join(sorted(problems)[:3])}",
            do="load it on the architecture it was made for, or download it again",
        )
