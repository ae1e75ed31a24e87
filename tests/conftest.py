"""What several test files share: a Hub on loopback, the data folder, a training step, a look at an error."""

import atexit
import copy
import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub.server import Hub

# Before huggingface_hub is imported, which reads its environment then: no test, and no process that a test starts,
# sees a Hub other than ours, a token, or a cache that was there before.
HUB = Hub().start()
HOME = Path(tempfile.mkdtemp(prefix="bnaa-hub-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": str(HOME),
    "HF_XET_CACHE": str(HOME / "xet"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which declares its own functions then

import huggingface_hub
import timm
from huggingface_hub.utils import _xet
from torch.nn import functional as F

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.lean.backends import cpp as cpp_kernels

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


def values_by_name(axis, values):
    """Return the values of an axis by names that are the same in every process: pytest-xdist compares them."""
    plain = (str, int, float, type(None))
    names = [
        str(value)[:60] if isinstance(value, plain) else getattr(value, "__name__", f"{axis}{index}")
        for index, value in enumerate(values)
    ]
    assert len(set(names)) == len(names), f"two values of {axis} have one name: {names}"
    return dict(zip(names, values, strict=True))


def each_once(indirect=(), **axes):
    """Parametrise with several axes, each a list of values or a dictionary of them by their names.

    Each value of each axis runs at least once; all other combinations are `slow`.
    """
    named = [axis if isinstance(axis, dict) else values_by_name(key, list(axis)) for key, axis in axes.items()]
    fast = {tuple(n % len(axis) for axis in named) for n in range(max(map(len, named)))}
    rows = []
    for index in itertools.product(*(range(len(axis)) for axis in named)):
        names, values = zip(*(list(axis.items())[i] for axis, i in zip(named, index, strict=True)), strict=True)
        marks = [] if index in fast else [pytest.mark.slow]
        rows.append(pytest.param(*values, id="-".join(map(str, names)), marks=marks))
    return pytest.mark.parametrize(list(axes), rows, indirect=list(indirect))


@pytest.fixture
def clean_compiler():
    """The compiler without what other tests compiled: a function that has too many graphs is no longer compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def each_run_begins_as_in_a_process_of_its_own():
    """Undo what a training run sets in this process: threads, and Accelerate's state."""
    from accelerate.state import AcceleratorState

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


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


Adapter = namedtuple("Adapter", "model folder logits")


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def versions(tmp_path_factory, train_step):
    """Two adapters of one network, the second trained further: a model, its saved folder, its logits each."""
    model, found = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=7)), []
    for name in ("first", "second"):
        train_step(model)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found.append(Adapter(copy.deepcopy(model), folder, model(images()).detach()))
    assert not torch.equal(found[0].logits, found[1].logits)
    return found


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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub on loopback as it was at the start, and a client without a token, a cache or patience."""
    HUB.reset()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(tmp_path / "hub-cache"))
    # Between its tries the client sleeps, for up to 8 s: a clock of its own, so that all others keep theirs.
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    # The Xet client remembers which chunks the Hub has: a new session with a memory of its own.
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    _xet.abort_xet_session()
    _xet.XET_CONNECTION_INFO_CACHE.clear()
    yield HUB
    HUB.reset()


@pytest.fixture
def out_of_reach(hub):
    """Stop the Hub: connections are refused until the test ends."""

    def stop():
        hub.stop()
        huggingface_hub.close_session()

    yield stop
    if hub.server is None:
        hub.start()
        huggingface_hub.close_session()


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, hub, monkeypatch):
    """How the client moves large files: it asks huggingface_hub.constants each time."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder and the folder of temporary files, both empty: what a push leaves behind is seen there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB: a real disk that is soon full."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs a file system of its own: there is no command mount")
    if done.returncode:
        pytest.skip(f"needs a file system of its own: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def without_privileges():
    """Let the permissions of files hold for this thread, as for any user, though root runs the tests.

    The two capabilities by which root passes them over are taken out of the effective set, and put back.
    """
    if not hasattr(os, "geteuid") or os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this thread
    if libc.capget(header, sets):
        pytest.skip("needs a user other than root, or Linux's capabilities")
    before = sets[0]  # effective
    sets[0] = before & ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@pytest.fixture
def unprivileged():
    """Run a test as a user whom the permissions of files stop."""
    with without_privileges():
        yield


@pytest.fixture(scope="session")
def alice():
    """The token of a user who may write to alice/, acme/ and timm/."""
    return HUB.token("alice")


@pytest.fixture(scope="session")
def bob():
    """The token of a user who may write to bob/."""
    return HUB.token("bob")


@pytest.fixture
def cpp():
    """The operators of lean training in C++."""
    if not cpp_kernels.load():
        pytest.skip("needs the kernels in C++, which are not there: the log says why")
    return torch.ops.bnaa


@pytest.fixture(params=["C++", "PyTorch"])
def backend(request, monkeypatch):
    """Where the arithmetic of lean training runs."""
    if request.param == "C++":
        request.getfixturevalue("cpp")
    monkeypatch.setattr(cpp_kernels, "loaded", request.param == "C++")
    return request.param
