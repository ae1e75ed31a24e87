"""A head alone trains on its inputs, computed once: what comes out is what training on the images gives."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from bn_affine_adapters.lean.backends import cpp
from bn_affine_adapters.training import features, loop
from bn_affine_adapters.training.features import FEW, LARGEST, head_only

ROOT = Path(__file__).parents[2]
# The digits at their own size, on a network whose statistics are those of the seed.
TINY = ("image_size=8", "batch_size=128", "epochs=2", "threads=1", "lr=0.05", "condition=head")
FROZEN = "running_statistics=frozen"
IMAGES = 1797  # of digits, both splits together
CONVNEXT = ("model=test_convnext", "image_size=32", "epochs=1", "lr=0.005")
DISTILLED = "model_args={img_size: 16, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"


@pytest.fixture(scope="module")
def train():
    return import_module("bn_affine_adapters.training.train")


@pytest.fixture(autouse=True)
def each_run_begins_as_in_a_process_of_its_own(monkeypatch):
    # Without the C++ kernels: nothing in front of the head is differentiated.
    monkeypatch.setattr(cpp, "load", lambda: False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(train, output, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    return train.train(train.read_recipe([*TINY, f"output_dir={output}", *arguments]))[0].result


def tensors(result):
    return load_file(Path(result["adapter"], "adapter_model.safetensors"))


def check_alike(ours, theirs, tolerance):
    """Compare two runs' losses and adapters, in float32, relative to the largest value."""
    assert ours["first_losses"] == pytest.approx(theirs["first_losses"], rel=tolerance)
    losses, others = ([epoch["loss"] for epoch in result["epochs"]] for result in (ours, theirs))
    assert losses == pytest.approx(others, rel=max(tolerance, 1e-4))  # four digits are recorded
    trained, expected = tensors(ours), tensors(theirs)
    assert trained.keys() == expected.keys()
    assert len(trained) >= 2
    for name, tensor in expected.items():
        scale = tensor.double().abs().max().item()
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=tolerance * scale, msg=name)


WAYS = {
    "batch norm": (FROZEN,),
    "layer norm": CONVNEXT,
    "accumulation and a schedule": (
        *(FROZEN, "accumulation=3", "weight_decay=0.01", "schedule=cosine"),
        *("warmup_epochs=1", "data_seed=7", "held_out=100"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_adapter_are_those_of_training_on_images(way, train, tmp_path, capsys):
    ours = run(train, tmp_path / "ours", *WAYS[way], "lean=exact")
    assert "head only: on features computed once for each image, " in capsys.readouterr().err
    theirs = run(train, tmp_path / "theirs", *WAYS[way])
    assert "head only" not in capsys.readouterr().err
    assert ours["trained"] == theirs["trained"] > 0
    check_alike(ours, theirs, 1e-5)
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.6)  # two of 359 images


def test_another_order_of_images_would_be_noticed(train, tmp_path):
    ours, other = (run(train, tmp_path / str(i), FROZEN, "lean=exact", "epochs=1", f"data_seed={i}") for i in range(2))
    with pytest.raises(AssertionError):
        check_alike(ours, other, 1e-5)


def test_under_autocast_both_ways_are_alike_to_its_rounding(train, tmp_path, capsys):
    ours = run(train, tmp_path / "ours", FROZEN, "lean=exact", "precision=bf16")
    assert "on features" in capsys.readouterr().err
    check_alike(ours, run(train, tmp_path / "theirs", FROZEN, "precision=bf16"), 2e-2)


def test_the_network_sees_each_image_once_however_many_epochs_there_are(train, tmp_path, monkeypatch):
    seen = []

    def count(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            seen.append(len(inputs[0]))

    def from_here_on(*arguments):
        seen.clear()  # what building and tracing the network took
        return head_only(*arguments)

    monkeypatch.setattr(loop, "head_only", from_here_on)
    handle = register_module_forward_pre_hook(count)
    try:
        run(train, tmp_path / "ours", FROZEN, "lean=exact", "epochs=3")
        once, alone = sum(seen), seen.count(1)
        seen.clear()
        run(train, tmp_path / "theirs", FROZEN, "epochs=3")
    finally:
        handle.remove()
    # The few on which the ways were compared: in one batch, each alone, and one to see how large its features are.
    assert alone == FEW + 1
    assert once == IMAGES + 2 * FEW + 1
    assert sum(seen) == 3 * IMAGES


def test_a_resumed_run_ends_with_the_adapter_of_one_never_stopped(train, tmp_path, monkeypatch):
    options = (FROZEN, "lean=exact", "epochs=3", "checkpoint_every=1", "resume=true")
    whole = run(train, tmp_path / "whole", *options)
    train_epoch, epochs = loop.train_epoch, []

    def interrupted(*arguments):
        epochs.append(arguments[-1])
        if epochs == [0, 1]:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(train, tmp_path / "cut", *options)
    resumed = run(train, tmp_path / "cut", *options)
    assert epochs == [0, 1, 1, 2]
    assert resumed["epochs"] == whole["epochs"]
    ours, theirs = tensors(resumed), tensors(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert len(theirs) >= 2


def test_two_processes_compute_a_share_each_and_train_alike(train, tmp_path):
    options = (*TINY, FROZEN, "lean=exact", f"output_dir={tmp_path / 'two'}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "BN_AFFINE_ADAPTERS_NATIVE": "0"}
    command = [*launcher, "recipes/train.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("head only: on features") == 1
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["hardware"]["processes"] == 2
    check_alike(two, run(train, tmp_path / "one", FROZEN, "lean=exact"), 1e-4)


def test_an_epoch_on_features_is_a_fraction_of_one_on_images(train, tmp_path):
    seconds = []
    for name, lean in (("ours", ["lean=exact"]), ("theirs", [])):
        result = run(train, tmp_path / name, FROZEN, "image_size=16", "epochs=4", *lean)
        seconds.append(result["seconds"])
    print(f"4 epochs on features, computing them included: {seconds[0] / seconds[1]:.3f} of 4 on images")
    assert seconds[0] < seconds[1]


# Where it does not come to the same.


def built(train, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = train.read_recipe([*TINY, *arguments])
    (replicate,) = loop.build(recipe, Accelerator(mixed_precision=recipe.precision))
    return replicate.network, replicate.feed


def refused(network, feed):
    """Return the reason for which a network is trained on its images."""
    model, images, line = head_only(network, feed)
    assert model is network
    assert images is feed
    return line.removeprefix("head only: on the images of every epoch, since ")


REFUSED = {
    "streamed": ((FROZEN, "streaming=true", "workers=0"), "they are streamed: streaming=true"),
    "flipped": ((FROZEN, "flip=true"), "they are augmented: flip=true, crop_padding=0"),
    "cropped": ((FROZEN, "crop_padding=2"), "they are augmented: flip=false, crop_padding=2"),
    "batch statistics": ((), "bn1 takes the statistics of a batch, and none with running_statistics=frozen"),
    "dropout": ((FROZEN, "model_args={drop_rate: 0.1}"), "draws: Dropout with p=0.1"),
    "stochastic depth": ((*CONVNEXT, "model_args={drop_path_rate: 0.2}"), "draws: DropPath with drop_prob=0."),
    "two heads": (("model=deit_tiny_distilled_patch16_224", "image_size=16", DISTILLED), "the network has 2 heads"),
    "not the output": (
        ("model=dla46_c", "image_size=32", FROZEN),
        "what the network returns is not just what its head makes of one tensor",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_run_that_would_come_to_something_else_stays_on_images_and_says_why(kind, train):
    arguments, why = REFUSED[kind]
    assert why in refused(*built(train, *arguments))


def test_a_run_that_stays_on_images_trains(train, tmp_path, capsys):
    ours = run(train, tmp_path / "ours", "lean=exact", "epochs=1")
    assert "on the images of every epoch, since bn1 takes the statistics" in capsys.readouterr().err
    check_alike(ours, run(train, tmp_path / "theirs", "epochs=1"), 1e-4)


CHANGED = {
    "a draw of a function": (lambda m, x: F.dropout(x, 0.01, m.training), "draws random numbers"),
    "another function in training": (lambda m, x: x * (1.1 if m.training else 1), "of their norm between training and"),
    "a function of the batch": (lambda m, x: x - 0.5 * x.mean(0), "of their norm between training and"),
    "not a number": (lambda m, x: x * float("nan"), "features differ by nan"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_no_flag_tells_is_seen_in_what_is_computed(change, train):
    network, feed = built(train, FROZEN)
    function, why = CHANGED[change]
    feed.load()  # decoding draws
    state = torch.get_rng_state()
    network.get_base_model().bn1.register_forward_hook(lambda module, _, output: function(module, output))
    assert why in refused(network, feed)
    assert torch.equal(torch.get_rng_state(), state)  # the run draws what it would have drawn


def test_features_that_are_too_large_are_not_kept(train, monkeypatch):
    network, feed = built(train, FROZEN)
    needed = IMAGES * 64 * 4
    free = int(needed / LARGEST)
    monkeypatch.setattr(features, "free_bytes", lambda device: free - 1)
    assert refused(network, feed) == f"features would take {needed:,} bytes, over 25% of the {free - 1:,} that are free"
    monkeypatch.setattr(features, "free_bytes", lambda device: free)
    assert head_only(network, feed)[2].endswith(f"{needed:,} bytes")


def test_no_more_is_free_than_a_machine_has(monkeypatch):
    one = features.free_bytes(torch.device("cpu"))
    assert 0 < one < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert features.free_bytes(torch.device("cpu")) < one / 100


def test_processes_go_the_same_way(train, monkeypatch):
    network, feed = built(train, FROZEN)
    monkeypatch.setattr(feed.accelerator, "gather", lambda tensor: torch.tensor([int(tensor), 1]))
    assert refused(network, feed) == "another process cannot"


@pytest.mark.parametrize("condition", ["bn", "bn+head", "shortcut+head"])
def test_nothing_is_said_where_more_than_a_head_trains(condition, train):
    assert refused(*built(train, FROZEN, f"condition={condition}")) == ""


def test_what_trains_decides_and_not_its_name(train):
    network, feed = built(train, FROZEN, "condition=bn+head")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".fc." in f"{name}.")
    model, computed, line = head_only(network, feed)
    assert line.startswith("head only: on features")
    ours, theirs = ([(p.shape, p.data_ptr()) for p in m.parameters() if p.requires_grad] for m in (model, network))
    assert ours == theirs
    assert len(ours) == 2
    assert computed.nbytes == IMAGES * 64 * 4


def test_features_come_in_the_order_of_the_images(train):
    network, feed = built(train, FROZEN, "accumulation=2")
    model, computed, _ = head_only(network, feed)
    network.eval()
    pairs = [*zip(feed.epoch(1), computed.epoch(1), strict=True)]
    pairs += zip(feed.evaluation(), computed.evaluation(), strict=True)
    for images, rows in pairs:
        assert torch.equal(images.labels, rows.labels)
        assert images.global_count == rows.global_count
        with torch.no_grad():
            torch.testing.assert_close(model(rows.images), network(images.images), rtol=1e-4, atol=1e-4)
    assert len(pairs) == 24 + 1
