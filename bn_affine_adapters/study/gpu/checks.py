"""Checks of the installation and of the arithmetic: each returns what it saw, or raises NetworkError."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapter.method import BNOnlyConfig
from ...errors import NetworkError
from ...lean import LEVELS
from ...lean.backends import gpu
from ...model.loading import get_bn_only_model
from ...training.scripts import commit
from ...training.stacked import Stacked
from ...training.sweep import STARTER
from .options import Options
from .steps import captured, compiled

PACKAGES = ("bn-affine-adapters", "torch", "timm", "peft", "accelerate", "datasets", "evaluate", "omegaconf", "triton")
CLASSES = 4
# Networks with their arguments, and the fingerprint of seed 0, which every machine has to draw.
FINGERPRINTS = {
    "cifar_resnet14": ({}, "8ea5aae06dc2bf377acea60bc7010f1d5e96f1cb25768bf1c7f66940d38ab509"),
    "test_efficientnet": ({}, "ad51b5a07b7a4ae4c4a440a337bf2eb9bd1b3e6f74a88945230be7a089eb8f0f"),
    "test_vit4": ({"img_size": 32}, "3c0e4ce93daca9d65a093da2d80364e12a3a1cf0e6b467dd35164b20f5a2c4c9"),
}
BOUNDS = {"exact": 1e-8, "rounded": 0.02, "smallest": 0.05}  # of the gradient's norm
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TESTS = ("tests/test_cuda.py", "tests/lean/test_lean_triton.py")
ROOT = Path(__file__).parents[3]


def items(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the checks in the package, by name."""
    where = options.device
    return {
        "installation": partial(installation, where),
        **{f"bits {name}": partial(bits, where, dtype) for name, dtype in DTYPES.items()},
        **{f"lean {level}": partial(gradients_of, where, level) for level in LEVELS},
        "graph": partial(graph, where, None),
        "graph lean exact": partial(graph, where, "exact"),
        "replicates": partial(replicates, where),
        "compile": partial(gradients_of, where, None, compile=True),
        "compile lean exact": partial(gradients_of, where, "exact", compile=True),
    }


def files(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the tests that need a GPU, by file; none without a checkout."""
    # The short form leaves out what compiles long or only measures; a rehearsal runs three tests.
    chosen = "fit_no_program or read_as_it_was_written or cpus_bits" if options.toy else "not compile and not captured"
    return {file: partial(run_tests, file, chosen) for file in TESTS if (ROOT / file).is_file()}


def installation(device: str) -> dict[str, Any]:
    """Return versions and the device; fail if a package is missing or the device does not compute."""
    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    if missing := [name for name, number in found.items() if number is None and name != "triton"]:  # lean runs without
        do = "pip install 'bn-affine-adapters[train]'; without a network, from wheels"
        raise NetworkError("Packages are not installed.", seen=", ".join(missing), do=do)
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        found |= {"cuda": torch.version.cuda, "triton_kernels": gpu.load()}
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    if not (product == 64).all():
        raise NetworkError("The device computes a wrong product.", seen=f"{product[0, 0]}, not 64", do="try another")
    return {**found, "commit": commit()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def network(name: str, device: str, dtype: torch.dtype, lean: str | None = None, seed: int = 0) -> nn.Module:
    """Return a network on a device, drawn from a seed there, that trains gamma and beta."""
    arguments = FINGERPRINTS[name][0]
    base = timm.create_model(name, num_classes=CLASSES, **arguments).to(device, dtype)
    size = {"input_size": [3, 32, 32]}
    config = BNOnlyConfig(seed=seed, lean=lean, data_config=size)  # type: ignore[arg-type]  # one of LEVELS
    return get_bn_only_model(base, config).train()


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Return eight images in float64 with their labels, the same on every device."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(device), torch.arange(8, device=device) % CLASSES


def bits(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare every tensor that is drawn on the device with the CPU's, and the fingerprint with the known one."""
    tensors = 0
    for name, (_, known) in FINGERPRINTS.items():
        ours = network(name, device, dtype)
        compare_bits(name, ours.state_dict(), network(name, "cpu", dtype).state_dict())
        tensors += len(ours.state_dict())
        found = network(name, device, torch.float32).peft_config["default"].backbone_fingerprint  # type: ignore[union-attr,index]
        if found != known:
            do = "do not trust adapters on this machine; report this line"
            raise NetworkError(f"Seed 0 draws another {name} here.", seen=f"{found}, not {known}", do=do)
    return {"networks": len(FINGERPRINTS), "tensors": tensors}


def compare_bits(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise NetworkError unless two states have the same tensors, bit for bit."""
    other = [key for key in wanted if key not in found or not torch.equal(found[key].cpu(), wanted[key])]
    if other or found.keys() != wanted.keys():
        seen = f"{len(other)} of {len(wanted)} tensors differ; the first is {next(iter(other), None)}"
        raise NetworkError(f"{name} has other bits here than on the CPU.", seen=seen, do="report this line")


def gradients(model: nn.Module, run: Callable[..., Tensor], device: str) -> Tensor:
    """Return all gradients of one step as one vector."""
    images, labels = batch(device)
    F.cross_entropy(run(images), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def gradients_of(device: str, lean: str | None, compile: bool = False) -> dict[str, Any]:
    """Compare gradients in float64, lean or compiled, with those of autograd."""
    found = {}
    for name in ("cifar_resnet14", "test_vit4"):
        plain, model = (network(name, device, torch.float64, level) for level in (None, lean))
        run = compiled(model, device, fullgraph=True) if compile else model
        ours, wanted = gradients(model, run, device), gradients(plain, plain, device)
        found[name] = agree(name, ours, wanted, BOUNDS[lean or "exact"])
    return {"distance": found, "bound": BOUNDS[lean or "exact"]}


def agree(name: str, found: Tensor, wanted: Tensor, bound: float) -> float:
    """Return how far two vectors are apart, as a share of the wanted one's norm; fail beyond a bound."""
    distance = ((found - wanted).norm() / wanted.norm()).item()
    if not distance <= bound:
        seen = f"{distance:.2g} of the norm; at most {bound:g}"
        raise NetworkError(f"{name} computes something else here.", seen=seen, do="report this line")
    return distance


def graph(device: str, lean: str | None) -> dict[str, Any]:
    """Compare five steps of SGD, the last two replayed from a CUDA graph of the whole step, with plain eager ones."""
    wanted = trained(network("cifar_resnet14", device, torch.float64), device, replayed=False)
    found = trained(network("cifar_resnet14", device, torch.float64, lean), device, replayed=True)
    return {"distance": agree("cifar_resnet14", found, wanted, 1e-8), "bound": 1e-8}


def trained(model: nn.Module, device: str, replayed: bool) -> Tensor:
    """Return what trains after five steps, as one vector."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = batch(device)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    run = captured(step, device) if replayed else step
    for _ in range(2 if replayed else 5):  # three are done when the step is captured
        run()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def replicates(device: str) -> dict[str, Any]:
    """Compare the gradients of three stacked replicates with those that each has alone."""
    networks = [network("cifar_resnet14", device, torch.float64, seed=seed) for seed in range(3)]
    images, labels = batch(device)
    stacked = Stacked(networks)
    sum(F.cross_entropy(logits, labels) for logits in stacked(images.expand(3, *images.shape))).backward()  # type: ignore[union-attr]
    together = torch.cat([p.grad.flatten(1) for p in stacked.parameters() if p.grad is not None], dim=1)
    alone = torch.stack([gradients(each, each, device) for each in networks])
    return {"distance": agree("cifar_resnet14", together, alone, 1e-8), "bound": 1e-8}


def run_tests(file: str, chosen: str) -> dict[str, Any]:
    """Run a file of tests; return how many passed, failed and were skipped."""
    command = [sys.executable, "-c", STARTER, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", file, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    if done.returncode not in (0, 5):  # 5: none was chosen
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        seen = f"exit status {done.returncode}, {counts}: {', '.join(names)}"
        raise NetworkError("Tests failed.", seen=seen, do=f"pytest {file}")
    return counts
