"""Lean training as a feature: adapters, files, conditions, precision, the compiler, several processes, the recipe."""

import copy
import json
import logging
import os
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, shortcut_convs
from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.lean import LEVELS, saved_bytes
from bn_affine_adapters.lean.backends import cpp
from bn_affine_adapters.norms.statistics import sync_norms_
from bn_affine_adapters.training.recipe import run_key
from bn_affine_adapters.training.stacked import Stacked

SIZE = 32
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def small_vit():
    return VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


NETWORKS = {
    "resnet": lambda: timm.create_model("cifar_resnet", depth=8, num_classes=5),
    "convnext": lambda: ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=5),
    "vit": small_vit,
}


def adapted(name="resnet", dtype=torch.float64, **settings):
    """A small network in training mode, in float64 unless said: there lean and plain are the same to 1e-10."""
    torch.manual_seed(0)
    args = {"depth": 8, "num_classes": 5} if name == "resnet" else {}
    config = BNOnlyConfig(seed=0, data_config={"input_size": [3, SIZE, SIZE]}, model_args=args, **settings)
    return get_bn_only_model(NETWORKS[name](), config).to(dtype).train()


def batch(count=6, dtype=torch.float64, seed=0):
    images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images.to(dtype), torch.arange(count) % 5


def is_lean(model):
    return any("forward" in module.__dict__ for module in model.modules())


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected, at_least=1, **tolerance):
    assert found.keys() == expected.keys()
    assert len(found) >= at_least
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def kept_bytes(model):
    return saved_bytes(model, lambda: copy.deepcopy(model)(batch()[0]))[1]


CONDITIONS = {
    "bn": {},
    "bn+head": {"train_head": True},
    "gamma alone": {"train_beta": False},
    "beta alone": {"train_gamma": False},
    "head alone": {"train_gamma": False, "train_beta": False, "train_head": True},
    "frozen statistics": {"running_statistics": "frozen"},
    "two weights": {"control": "two_weights", "train_gamma": False, "train_beta": False},
    "input affine": {"control": "input_affine"},
    "mask": {"control": "signed_mask"},
    "shortcuts": {"extra_trainable_modules": shortcut_convs},
    "some norms": {"norm_layers": ["blocks.0.bn2", "blocks.2.bn1"]},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_trains_as_plain(condition):
    settings = dict(CONDITIONS[condition])
    if "extra_trainable_modules" in settings:
        settings["extra_trainable_modules"] = shortcut_convs(NETWORKS["resnet"]())
    plain, lean = adapted(**settings), adapted(**settings, lean="exact")
    assert kept_bytes(lean) < kept_bytes(plain) or condition == "head alone"  # which keeps the features and no more
    assert_same(gradients(lean, *batch()), gradients(plain, *batch()), rtol=1e-7, atol=1e-10)
    assert_same(buffers(lean), buffers(plain))


def test_norm_layers_outside_the_adapter_never_move():
    model = adapted(norm_layers=["blocks.0.bn2"], lean="exact")
    before = buffers(model)
    gradients(model, *batch())
    moved = {name for name, buffer in buffers(model).items() if not torch.equal(buffer, before[name])}
    prefix = "base_model.model.blocks.0.bn2.bn_only_layers.default"
    assert moved == {f"{prefix}.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("level", LEVELS)
def test_names_and_files_do_not_change(level, tmp_path):
    plain, lean = adapted(), adapted(lean=level)
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in lean.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in lean.named_modules()] == [name for name, _ in plain.named_modules()]
    plain.save_pretrained(tmp_path / "plain")
    lean.save_pretrained(tmp_path / "lean")
    for name in ADAPTER:
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert "lean" not in json.loads((tmp_path / "lean" / ADAPTER[0]).read_text())


def test_a_trained_adapter_is_saved_and_trains_on_lean_or_not(tmp_path):
    model = adapted(dtype=torch.float32, lean="exact")
    gradients(model, *batch(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    loaded = load_bn_only_model(tmp_path, is_trainable=True, lean="rounded")
    assert loaded.base_model.lean.level == "rounded"
    assert is_lean(loaded)
    assert not is_lean(load_bn_only_model(tmp_path))
    images, labels = batch(dtype=torch.float32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert len(gradients(loaded.train(), images, labels)) == 18
    loaded.save_pretrained(tmp_path / "again")
    before, after = (json.loads((folder / ADAPTER[0]).read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert before.pop("tensors_digest") != after.pop("tensors_digest")  # the running statistics moved
    assert after == before


def test_turned_off_it_is_the_plain_network():
    model, plain = adapted(lean="smallest"), adapted()
    assert model.base_model.lean.level == "smallest"
    assert model.set_lean(None) is None
    assert model.base_model.lean is None
    assert not is_lean(model)
    images, labels = batch()
    assert torch.equal(model(images), plain(images))
    assert_same(gradients(model, images, labels), gradients(plain, images, labels), 18, rtol=0, atol=0)


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_nothing_of_it_is_left_on_the_network_that_comes_out(end):
    model, plain = adapted(lean="exact"), adapted()
    networks = [getattr(m, end)() for m in (model, plain)]
    assert not is_lean(networks[0])
    assert list(networks[0].state_dict()) == list(networks[1].state_dict())
    images, _ = batch()
    assert torch.equal(*(network.train()(images) for network in networks))


def test_a_copy_is_lean_and_on_its_own():
    model = adapted(lean="exact")
    copied = copy.deepcopy(model)
    before = buffers(model)
    gradients(copied, *batch())
    assert is_lean(copied)
    assert_same(buffers(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    copied.set_lean(None)
    assert is_lean(model)
    assert not is_lean(copied)


def test_a_pickled_network_comes_back_plain_and_can_be_lean_again():
    model, plain = adapted(lean="exact"), adapted()
    copied = pickle.loads(pickle.dumps(model))
    images, _ = batch()
    assert torch.equal(copied(images), plain(images))
    copied.set_lean("exact")
    _, kept = saved_bytes(copied, lambda: copied(images))
    assert kept < 0.6 * saved_bytes(plain, lambda: plain(images))[1]
    copied.set_lean(None)
    assert not is_lean(copied)


def test_every_adapter_of_a_network_trains_as_plain():
    models = []
    for lean in (None, "exact"):
        model = adapted(lean=lean)
        model.add_adapter("other", BNOnlyConfig(seed=0, norm_init="ones", train_head=True))
        model.add_adapter("third", BNOnlyConfig(seed=0, extra_trainable_modules=["blocks.1.downsample.0"]))
        models.append(model.double().train())
    plain, lean = models
    assert is_lean(lean)
    for name, trained in (("default", 18), ("other", 20), ("third", 19), ("default", 18)):
        for model in models:
            model.set_adapter(name)
        expected = gradients(plain, *batch())
        assert len(expected) == trained
        assert_same(gradients(lean, *batch()), expected, rtol=1e-7, atol=1e-10)
        assert_same(buffers(lean), buffers(plain))
    with lean.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(lean(batch()[0]), plain(batch()[0]))
        assert not lean(batch()[0]).requires_grad
    assert len(gradients(lean, *batch())) == 18


def test_accumulated_gradients_are_the_plain_networks():
    plain, lean = adapted(), adapted(lean="exact")
    for model in (plain, lean):
        for seed in range(3):
            images, labels = batch(seed=seed)
            (F.cross_entropy(model(images), labels) / 3).backward()
    pairs = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (lean, plain)]
    assert_same(*pairs, 18, rtol=1e-7, atol=1e-10)
    assert_same(buffers(lean), buffers(plain))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_in_every_layout_and_under_autocast_the_gradients_keep_their_direction(level, layout):
    # Against float32; plain freezing under autocast, the first of the levels here, has the same bound.
    images, labels = batch(dtype=torch.float32, count=16)
    exact = torch.cat([g.flatten() for g in gradients(adapted(dtype=torch.float32), images, labels).values()])
    model = adapted(dtype=torch.float32).to(memory_format=layout)
    model.set_lean(level)
    images = images.contiguous(memory_format=layout)
    full = torch.cat([g.flatten() for g in gradients(model, images, labels).values()])
    assert F.cosine_similarity(full, exact, dim=0) > 0.9995
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        half = torch.cat([g.flatten() for g in gradients(model, images, labels).values()])
    assert F.cosine_similarity(half, exact, dim=0) > 0.97


# In C++ at the level that has most of the operators, and with PyTorch's own kernels; then other levels and families.
COMPILED = [("resnet", "smallest", "C++"), ("resnet", "exact", "PyTorch"), ("vit", "smallest", "PyTorch")]
COMPILED_TOO = [("resnet", "exact", "C++"), ("resnet", "rounded", "C++"), ("convnext", "smallest", "PyTorch")]
COMPILED += [pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED_TOO]


@pytest.mark.parametrize(("name", "level", "kernels"), COMPILED)
def test_it_compiles_as_one_graph_with_the_same_result(name, level, kernels, request, monkeypatch, clean_compiler):
    if kernels == "C++":
        request.getfixturevalue("cpp")
    monkeypatch.setattr(cpp, "loaded", kernels == "C++")
    dtype = torch.float32
    model = adapted(name, dtype, lean=level)
    twin = copy.deepcopy(model)
    images, labels = batch(4, dtype)
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), images, labels)
    expected = gradients(twin, images, labels)
    assert len(found) == len(expected) >= 10
    together, apart = (torch.cat([g.flatten() for g in each.values()]) for each in (found, expected))
    assert (together - apart).norm() < 0.02 * apart.norm()
    assert_same(buffers(model), buffers(twin), 0, rtol=1e-4, atol=1e-5)


def test_compiled_with_pytorchs_own_kernels_it_keeps_less_too(monkeypatch, clean_compiler):
    monkeypatch.setattr(cpp, "loaded", False)
    images, _ = batch(4, torch.float32)
    kept = {}
    for level in (None, "exact"):
        model = adapted(dtype=torch.float32, lean=level)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        _, kept[level] = saved_bytes(model, lambda compiled=compiled: compiled(images))
    assert 0 < kept["exact"] < 0.6 * kept[None]


def test_a_hook_is_called_under_the_compiler_too(clean_compiler):
    model, calls = adapted(dtype=torch.float32, lean="exact"), []
    model.get_base_model().blocks[0].register_forward_hook(lambda *_: calls.append(1))
    torch.compile(model, backend="aot_eager")(batch(2, torch.float32)[0])
    assert calls == [1]


def test_replicates_side_by_side_run_plain():
    images = torch.stack([batch(4, seed=seed)[0] for seed in range(2)])
    found = [Stacked([adapted(lean=lean), adapted(lean=lean, norm_init="ones")])(images) for lean in (None, "exact")]
    assert torch.equal(*found)


SPLIT = (5, 3)  # images of each process


def two_steps(part, lean, synchronised):
    """Train one part of two batches; return the losses, gradients and running statistics, and the bytes kept."""
    model = adapted(lean=lean)
    model = sync_norms_(model).train() if synchronised else model
    found = {}
    for step in range(2):
        images, labels = batch(sum(SPLIT), seed=step)
        logits, kept = saved_bytes(model, lambda images=images: model(images[part]))
        loss = F.cross_entropy(logits, labels[part], reduction="sum") / sum(SPLIT)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"statistics {name}": buffer for name, buffer in model.named_buffers()}, kept


KINDS = [(lean, synchronised) for lean in (None, "exact") for synchronised in (True, False)]


def work(rank, port, folder):
    """Be one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=2)
    part = slice(0, SPLIT[0]) if rank == 0 else slice(SPLIT[0], None)
    found = {kind: two_steps(part, *kind) for kind in KINDS}
    torch.save({"pid": os.getpid(), "found": found}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return what each of two real processes computed."""
    cpp.load()  # once, instead of in both
    folder = tmp_path_factory.mktemp("processes")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    # Forked: they need not import all of it again.
    torch.multiprocessing.start_processes(work, args=(store.port, str(folder)), nprocs=2, start_method="fork")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert len({each["pid"] for each in found} | {os.getpid()}) == 3
    return [each["found"] for each in found]


def test_two_processes_with_synchronised_norms_compute_what_one_does_on_the_whole_batch(processes):
    first, second = (each["exact", True][0] for each in processes)
    whole = {
        key: first[key] if key.startswith("statistics") else first[key] + second[key]
        for key in first
    }  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("statistics"))
    assert_same(whole, two_steps(slice(None), None, synchronised=False)[0], 2 + 18 + 54, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("synchronised", [True, False])
def test_each_process_computes_what_it_does_without_lean(processes, synchronised):
    for each in processes:
        (lean, kept), (plain, all_kept) = each["exact", synchronised], each[None, synchronised]
        assert_same(lean, plain, 2 + 18 + 54, rtol=1e-7, atol=1e-10)
        assert kept < 0.7 * all_kept
    first, second = (each["exact", False][0] for each in processes)
    with pytest.raises(AssertionError, match="running_mean"):
        assert_same(*({k: v for k, v in each.items() if "running" in k} for each in (first, second)))


@pytest.fixture
def train():
    threads = torch.get_num_threads()
    yield import_module("bn_affine_adapters.training.train")
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


TINY = ("image_size=8", "batch_size=128", "epochs=1", "threads=1", "lr=0.01")


def test_the_recipe_trains_lean_with_the_losses_of_plain_and_records_it(train, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        lean = train.train(train.read_recipe([*TINY, "lean=exact", f"output_dir={tmp_path / 'lean'}"]))[0].result
    assert "lean exact: 15 norm layers, 15 convolutions" in caplog.text
    assert json.loads((tmp_path / "lean" / "result.json").read_text())["recipe"] == lean["recipe"]
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = train.train(train.read_recipe([*TINY, f"output_dir={tmp_path / 'plain'}"]))[0].result
    assert len(lean["first_losses"]) == 12
    assert lean["first_losses"] == pytest.approx(plain["first_losses"], rel=1e-3)
    assert lean["epochs"][-1]["top1"] == pytest.approx(plain["epochs"][-1]["top1"], abs=1)
    assert (lean["recipe"]["lean"], plain["recipe"]["lean"]) == ("exact", None)
    assert run_key(lean["recipe"]) != run_key(plain["recipe"])
    moved = {**lean["recipe"], "lean": None, "output_dir": plain["recipe"].get("output_dir")}
    assert run_key(moved) == run_key({**plain["recipe"], "output_dir": moved["output_dir"]})


@pytest.mark.parametrize("extra", ["condition=all", "replicates=2"])
def test_the_recipe_refuses_lean_where_it_spares_nothing(train, extra, refused):
    with refused(ConfigError, "lean=exact", extra):
        train.read_recipe([*TINY, "lean=exact", extra])
