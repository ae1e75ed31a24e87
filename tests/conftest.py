"""What several test files share: the data folder, a training step, a look at an error."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bn_affine_adapters import BNAdapterError

# The networks of the tests are so small that threads wait for each other for longer than they compute.
torch.set_num_threads(1)


def script(name):
    """Import recipes/NAME.py, which is no module of a package, as it stands."""
    path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bnaa_data():
    """The folder of real data and weights that the environment variable BNAA_DATA names."""
    folder = os.environ.get("BNAA_DATA")
    if not folder:
        pytest.skip("needs real data: BNAA_DATA, the path of a folder with gtsrb-32-mini and weights, is unset")
    assert Path(folder).is_dir(), f"BNAA_DATA={folder} is no folder"
    return Path(folder)


@pytest.fixture(scope="session")
def train_step():
    """Train for real. The optimizer gets every parameter: what is frozen has to hold against decay and momentum."""

    def train(model, size=32, channels=3, steps=2):
        torch.manual_seed(0)
        model.train()
        first = next(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for _ in range(steps):
            images = torch.randn(4, channels, size, size).to(first.device, first.dtype)
            logits = model(images)
            logits = logits if isinstance(logits, torch.Tensor) else sum(logits)  # a head of two answers with two
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=first.device)).backward()
            optimizer.step()
        return model.eval()

    return train


@pytest.fixture(scope="session")
def refused():
    """Expect exactly this error, with its three parts, and with these words in it."""

    @contextmanager
    def expect(kind, *words):
        with pytest.raises(BNAdapterError) as caught:
            yield caught
        error = caught.value
        assert type(error) is kind, repr(error)
        assert error.what.strip()
        assert error.seen.strip()
        assert error.do.strip()
        assert str(error) == f"{error.what}\n  seen:  {error.seen}\n  do:    {error.do}"
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"

    return expect
