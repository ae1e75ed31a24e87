"""On a GPU: the CPU's bits, training through Accelerate in float32 and bfloat16, and back from the file."""

import math
from importlib import import_module

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import script
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.lean.backends import gpu
from bn_affine_adapters.training.stacked import Stacked

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")

NETWORKS = {"cifar_resnet14": {}, "test_efficientnet": {}, "test_efficientnet_gn": {}, "test_vit4": {"img_size": 32}}


def wrapped(name, dtype=torch.float32, **settings):
    model = timm.create_model(name, num_classes=4, **NETWORKS[name]).to(DEVICE, dtype)
    return get_bn_only_model(model, BNOnlyConfig(seed=0, **settings))


def images(count=8):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def on_cpu(model):
    return {key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _repeatable():
    """Accelerate forgets the last test's precision, and cuDNN takes the same algorithm each time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(precision, model):
    """Three steps through Accelerate; return the prepared model, the accelerator and the losses."""
    accelerator = Accelerator(mixed_precision=precision, cpu=DEVICE.type == "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1))
    labels = torch.arange(8, device=DEVICE) % 4
    model.train()
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images()), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, accelerator, losses


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_redrawn_on_the_gpu_has_the_cpus_bits(name):
    there = wrapped(name)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {DEVICE.type}
    here = get_bn_only_model(timm.create_model(name, num_classes=4, **NETWORKS[name]), BNOnlyConfig(seed=0))
    found, wanted = on_cpu(there), on_cpu(here)
    assert found.keys() == wanted.keys()
    different = [key for key, tensor in wanted.items() if not torch.equal(tensor, found[key])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ"
    assert there.peft_config["default"].to_dict() == here.peft_config["default"].to_dict()


def test_a_network_cast_to_bfloat16_on_the_gpu_has_the_fingerprint_of_its_seed():
    models = [wrapped("cifar_resnet14", dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert len({model.peft_config["default"].backbone_fingerprint for model in models}) == 1
    assert models[1](images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["no", "bf16"], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_through_accelerate_moves_the_adapter_alone_and_reloads(name, precision, tmp_path):
    model = wrapped(name, train_head=True)
    before = on_cpu(model)
    prepared, accelerator, losses = train(precision, model)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert accelerator.device.type == DEVICE.type

    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    after = on_cpu(plain)
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert moved == {key for key in after if ".bn_only_layers.default." in key}
    assert {tensor.dtype for tensor in after.values()} <= {torch.float32, torch.int64}

    state = accelerator.get_state_dict(prepared)
    plain.save_pretrained(tmp_path, state_dict=state, is_main_process=accelerator.is_main_process)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(moved)
    assert all(
        torch.equal(t, after[k.replace(".bn_only_layers.", ".bn_only_layers.default.")]) for k, t in saved.items()
    )

    again = load_bn_only_model(tmp_path, device=DEVICE)
    assert {tensor.device.type for tensor in again.state_dict().values()} == {DEVICE.type}
    assert torch.equal(again(images()), plain(images()))
    here = load_bn_only_model(tmp_path)(images().cpu())
    assert (plain(images()).cpu() - here).abs().max() <= 0.05 * here.abs().max()  # convolutions in TF32


def test_an_adapter_is_loaded_beside_another_on_the_gpu(tmp_path):
    model, _, _ = train("no", wrapped("cifar_resnet14", train_head=True))
    model.eval().save_pretrained(tmp_path)
    other = wrapped("cifar_resnet14")
    other.load_adapter(tmp_path, "two")
    other.set_adapter("two")
    assert {tensor.device.type for tensor in other.state_dict().values()} == {DEVICE.type}
    assert torch.equal(other.eval()(images()), model(images()))


def losses_of(model, run, replicates):
    """Three steps in float64 on each replicate's own images; return the losses, (steps, replicates)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=1e-4)
    labels = torch.arange(8, device=DEVICE) % 4
    found = []
    for step in range(3):
        batches = torch.stack([images().double() + step + replicate for replicate in replicates])
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in run(batches)])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        found.append(losses.detach().clone())
    return torch.stack(found)


def test_a_captured_stacked_step_computes_what_each_replicate_does_alone():
    def network(seed):
        model = timm.create_model("cifar_resnet14", num_classes=4).to(DEVICE, torch.float64)
        return get_bn_only_model(model, BNOnlyConfig(seed=seed)).train()

    alone = [network(seed) for seed in range(3)]
    expected = [losses_of(each, lambda x, each=each: [each(x[0])], [seed]) for seed, each in enumerate(alone)]
    stacked = Stacked([network(seed) for seed in range(3)])
    captured = torch.compile(stacked, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    losses = losses_of(stacked, captured, range(3))
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(losses, torch.cat(expected, dim=1), rtol=1e-8, atol=0)
    stacked.write_back()
    for single, replicate in zip(alone, stacked.networks, strict=True):
        torch.testing.assert_close(replicate.state_dict(), single.state_dict(), rtol=1e-8, atol=1e-8)


def test_five_captured_replicates_side_by_side_have_twice_the_throughput_of_captured_single_runs():
    counters.clear()
    result = script("benchmarks/replicates").compare(captured=True)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert result["stacked_over_single"]["captured"] >= 2, result


@pytest.mark.parametrize("replicates", [1, 3])
def test_a_captured_run_of_the_recipe_has_the_losses_of_an_eager_one(replicates, tmp_path):
    train = import_module("bn_affine_adapters.training.train")
    # A small learning rate, where rounding does not grow; three epochs, so that the last, smaller batch is met again.
    words = ["image_size=16", "batch_size=128", "epochs=3", "lr=0.001", f"replicates={replicates}"]
    found = {}
    for mode in ("null", "reduce-overhead"):
        counters.clear()
        recipe = train.read_recipe([*words, f"compile={mode}", f"output_dir={tmp_path / mode}"])
        found[mode] = train.train(recipe)[0].result["first_losses"]
        AcceleratorState._reset_state(reset_partial_state=True)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(found["null"]) == 20
    assert found["reduce-overhead"] == pytest.approx(found["null"], rel=1e-3)


def gradients(model, run):
    model.zero_grad()
    F.cross_entropy(run(images()), torch.arange(8, device=DEVICE) % 4).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(("level", "bound"), [("exact", 1e-8), ("rounded", 0.02), ("smallest", 0.05)])
def test_lean_training_has_the_gradients_of_plain_freezing(level, bound, captured):
    expected = wrapped("cifar_resnet14", torch.float64).train()
    model = wrapped("cifar_resnet14", torch.float64, lean=level).train()
    assert gpu.loaded
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if captured else model
    wanted = gradients(expected, lambda x: expected(x.double()))
    found = gradients(model, lambda x: run(x.double()))
    assert (found - wanted).norm() < bound * wanted.norm()


def test_lean_training_takes_less_memory():
    def kept(level):
        model = wrapped("cifar_resnet14", lean=level).train()
        before = torch.cuda.memory_allocated()
        loss = model(images(256)).square().sum()
        found = torch.cuda.memory_allocated() - before
        loss.backward()
        return found

    plain = kept(None)
    found = {level: kept(level) / plain for level in ("exact", "rounded", "smallest")}
    assert found["exact"] < 0.6
    assert found["rounded"] < 0.35
    assert found["smallest"] < 0.15
