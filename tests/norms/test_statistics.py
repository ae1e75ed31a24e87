"""Two processes with synchronised norm layers compute what one process computes on the whole batch."""

import copy
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import each_once
from timm.layers import BatchNormAct2d
from torch import nn

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.norms.statistics import sync_norms_

SPLIT = (5, 3)  # images of each process
STEPS = 2


class Small(nn.Module):
    """A network with both kinds of norm layer, whose whole batch fits any machine."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.bnact = BatchNormAct2d(4)

    def forward(self, x):
        return self.bnact(self.conv2(torch.relu(self.bn(self.conv(x)))))


# name: the layer or network, and the shape of one image
LAYERS = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (3, 6, 5)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(3), (3, 6, 5)),
    "BatchNormAct2d without activation": (lambda: BatchNormAct2d(3, apply_act=False), (3, 6, 5)),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 6, 5)),
    "BatchNorm2d without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 6, 5)),
    "BatchNorm2d with cumulative statistics": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 6, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (3, 7)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (3, 4, 3, 2)),
    "a network": (Small, (3, 8, 8)),
}


def prepare(kind):
    """Return a layer with drawn parameters and the batches and output weights of every step, the same everywhere."""
    create, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(len(kind))
    layer = create()
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    # Far from zero, so that a variance as the difference of two large numbers would show.
    batches = [20 + 3 * torch.randn(sum(SPLIT), *shape, generator=generator) for _ in range(STEPS)]
    size = copy.deepcopy(layer)(batches[0]).shape
    return layer, batches, [torch.randn(size, generator=generator) for _ in range(STEPS)]


def compute(kind, part, synchronised):
    """Train one part of every batch; return outputs, input gradients, parameter gradients and running statistics."""
    layer, batches, weights = prepare(kind)
    layer = (sync_norms_(layer) if synchronised else layer).train()
    found = {}
    for step in range(STEPS):
        x = batches[step][part].clone().requires_grad_(True)
        out = layer(x)
        (out * weights[step][part]).sum().backward()
        found |= {f"output {step}": out.detach(), f"input gradient {step}": x.grad}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    found |= {f"statistics {name}": buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    if list(layer.buffers()):  # without statistics, a part has its own in evaluation too, as in torch's SyncBatchNorm
        found["evaluation"] = layer(batches[0][part]).detach()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    return found


def work(rank, port, folder):
    """Be one of two processes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    part = slice(0, SPLIT[0]) if rank == 0 else slice(SPLIT[0], None)
    found = {kind: compute(kind, part, synchronised=True) for kind in LAYERS}
    alone = compute("BatchNorm2d", part, synchronised=False)
    torch.save({"pid": os.getpid(), "found": found, "alone": alone}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return what each of two real processes computed."""
    folder = tmp_path_factory.mktemp("processes")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    # Where there is no GPU a process may be forked, and need not import anything again.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(work, args=(store.port, str(folder)), nprocs=2, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(parts):
    """Join two processes' results into those of one: batches are concatenated, parameters' gradients summed."""
    whole = {}
    for key in parts[0]:
        if key.startswith(("output", "input", "evaluation")):
            whole[key] = torch.cat([part[key] for part in parts])
        elif key.startswith("gradient"):
            whole[key] = parts[0][key] + parts[1][key]
        else:
            assert torch.equal(parts[0][key], parts[1][key]), f"{key} differs between processes"
            whole[key] = parts[0][key]
    return whole


def worst(found, expected):
    """Return the largest difference, relative to each tensor's largest value where that is over 1."""
    assert found.keys() == expected.keys()
    return {
        key: ((found[key] - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1)).item()
        for key in expected
    }


def test_there_were_two_processes_beside_this_one(processes):
    pids = {process["pid"] for process in processes} | {os.getpid()}
    assert len(pids) == 3
    assert all(set(process["found"]) == set(LAYERS) for process in processes)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_processes_compute_what_one_does_on_the_whole_batch(kind, processes):
    found = joined([process["found"][kind] for process in processes])
    differences = worst(found, compute(kind, slice(None), synchronised=False))
    assert {key: value for key, value in differences.items() if not value < 1e-5} == {}
    parameters = len(list(LAYERS[kind][0]().parameters()))
    statistics = len(list(LAYERS[kind][0]().buffers()))
    assert len(differences) == 2 * STEPS + parameters + statistics + bool(statistics)


def test_without_synchronisation_the_parts_differ_from_the_whole(processes):
    alone = [process["alone"] for process in processes]
    with pytest.raises(AssertionError, match="differs between processes"):
        joined(alone)
    outputs = [{key: value for key, value in part.items() if key.startswith("output")} for part in alone]
    expected = compute("BatchNorm2d", slice(None), synchronised=False)
    differences = worst(joined(outputs), {key: expected[key] for key in outputs[0]})
    assert min(differences.values()) > 1e-3


NETWORKS = {
    "cifar_resnet14": lambda: timm.create_model("cifar_resnet14"),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet"),
    "test_vit": lambda: timm.create_model("test_vit"),
    "adapter": lambda: get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0)),
    "frozen statistics": lambda: get_bn_only_model(
        timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0, running_statistics="frozen")
    ),
}
BATCH_NORMS = {"cifar_resnet14": 15, "test_efficientnet": 13, "test_vit": 0, "adapter": 30, "frozen statistics": 30}


DEVICES = ["cpu", "cuda"]  # no GPU is needed: where it will run is all that is asked


@each_once(create=NETWORKS, training=[True, False], device=DEVICES)
def test_state_dict_parameters_and_modes_stay_what_they_are(create, training, device):
    model = create().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    modes = {key: module.training for key, module in model.named_modules()}
    assert sync_norms_(model, device) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == parameters
    assert {key: module.training for key, module in model.named_modules()} == modes


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_is_converted(name):
    model = NETWORKS[name]()
    kinds = {key: type(m) for key, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    sync_norms_(model)
    changed = {key: m for key, m in model.named_modules() if key in kinds and type(m) is not kinds[key]}
    assert changed.keys() == kinds.keys()
    assert len(kinds) == BATCH_NORMS[name]
    assert all(isinstance(module, kinds[key]) for key, module in changed.items())
    assert all(type(module).__name__ == kinds[key].__name__ for key, module in changed.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_where_it_will_run_on_a_gpu_the_layers_are_torchs(name):
    model = sync_norms_(NETWORKS[name](), "cuda")
    kinds = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(module, nn.SyncBatchNorm) for module in kinds)
    assert len(kinds) == BATCH_NORMS[name]


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    assert type(sync_norms_(nn.Sequential(Mine(3)))[0]) is Mine


@pytest.mark.parametrize("name", NETWORKS)
def test_in_evaluation_mode_the_logits_are_the_same_bits(name):
    model = NETWORKS[name]().eval()
    size = 32 if "cifar" in name or name in ("adapter", "frozen statistics") else 160
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(sync_norms_(model)(images), before)
    assert not model.training


def test_a_norm_layer_in_evaluation_mode_stays_there():
    model = timm.create_model("cifar_resnet14").train()
    model.bn1.eval()
    sync_norms_(model)
    assert model.training
    assert not model.bn1.training


def test_a_synchronised_network_can_be_synchronised_again_and_copied():
    model = sync_norms_(sync_norms_(timm.create_model("test_efficientnet"))).eval()
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("device", DEVICES)
def test_the_bare_layer_is_returned_converted(device):
    layer = sync_norms_(nn.BatchNorm2d(3), device)
    assert type(layer) is not nn.BatchNorm2d
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
