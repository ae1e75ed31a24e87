"""Adapting to images without labels changes an adapter's own norm layers, can be taken back, and is watched."""

import pytest
import timm
import torch
from tables import check_answers
from torch import nn

from bn_affine_adapters import BNOnlyConfig, adapt_to, export, get_bn_only_model, load_bn_only_model, recalibrate
from bn_affine_adapters.errors import AdapterError, CollapseError
from bn_affine_adapters.model.adaptation import FEWEST


def images(count=96, size=16, seed=1):
    """Images of different colours, so that the predictions of a new network differ too."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 2
    return colour + torch.randn(count, 3, size, size, generator=generator)


BATCHES = list(images().split(32))
MANY = list(images(128).split(32))
TOO_FAST = {"lr": 0.3, "entropy": 1.0, "epochs": 6}


def wrapped(name="test_resnet", **settings):
    arguments = {"img_size": 32} if name == "test_vit" else {}
    network = timm.create_model(name, num_classes=4, **arguments)
    return get_bn_only_model(network, BNOnlyConfig(seed=0, **settings)).eval()


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def moved(model, before):
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


@torch.no_grad()
def entropy(model, batches=BATCHES):
    model.eval()
    return torch.cat([torch.distributions.Categorical(logits=model(each)).entropy() for each in batches]).mean().item()


def test_statistics_are_those_that_recalibrate_gives_and_can_be_taken_back():
    model, same = wrapped(), wrapped()
    before = state(model)
    adaptation = adapt_to(model, BATCHES)
    recalibrate(same, BATCHES)
    assert not moved(model, state(same))
    assert {key.rpartition(".")[2] for key in moved(model, before)} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    adaptation.reset()
    assert not moved(model, before)


def test_tent_lowers_the_entropy_by_the_adapters_own_gamma_and_beta(tmp_path):
    model = wrapped(train_head=True)
    model.add_adapter("other", BNOnlyConfig(seed=0, train_head=True))
    before = state(model)
    recalibrate(model, BATCHES)
    statistics = entropy(model)
    labelled = [(batch, torch.zeros(len(batch))) for batch in BATCHES]
    adaptation = adapt_to(model, labelled, "tent", entropy=1, lr=0.003, epochs=3, collapse=1)
    assert entropy(model) < statistics - 0.02
    assert (adaptation.images, adaptation.confident) == (288, 288)
    changed = moved(model, before)
    assert changed
    assert all(".bn_only_layers.default." in key and ".fc." not in key for key in changed)
    gammas = [key for key in before if key.endswith("default.weight") and ".fc." not in key]
    assert set(gammas) <= changed
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = load_bn_only_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(BATCHES[0]), model.eval()(BATCHES[0]))
    adaptation_of_loaded = adapt_to(again, BATCHES, "tent", entropy=1)  # it was loaded without gradients
    assert adaptation_of_loaded.confident == 96
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_modes_and_flags_are_as_before():
    model = wrapped().train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    adapt_to(model, BATCHES, "tent", entropy=1)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_images_whose_entropy_is_low_count():
    model = wrapped()
    recalibrate(model, BATCHES)  # the statistics that Tent ends with
    before = state(model)
    with torch.no_grad():
        logits = [wrapped_by_batch(model)(batch) for batch in BATCHES[:1]]
    bound = float(torch.distributions.Categorical(logits=logits[0]).entropy().median()) / torch.tensor(4.0).log().item()
    adaptation = adapt_to(model, BATCHES[:1], "tent", entropy=bound)
    assert adaptation.confident in (15, 16)
    adaptation.reset()
    assert not moved(model, before)
    none = adapt_to(model, BATCHES, "tent", entropy=1e-6)
    assert none.confident == 0
    assert {key.rpartition(".")[2] for key in moved(model, before)} <= {"running_mean", "running_var"}  # rounded anew


def wrapped_by_batch(model):
    """A copy that normalises by the statistics of the batch."""
    copied = wrapped()
    copied.load_state_dict(model.state_dict())
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return copied


def test_beta_alone_where_the_adapter_trains_beta_alone():
    model = wrapped(train_gamma=False)
    before = state(model)
    adapt_to(model, BATCHES, "tent", entropy=1)
    ends = {key.rpartition(".")[2] for key in moved(model, before)}
    assert "bias" in ends
    assert "weight" not in ends


def test_layer_norm_has_gamma_and_beta_and_no_statistics(tmp_path):
    model = wrapped("test_vit")
    before = state(model)
    adaptation = adapt_to(model, [images(32, 32)], "tent", entropy=1, lr=0.01, epochs=3, collapse=1)
    assert moved(model, before)
    adaptation.reset()
    assert not moved(model, before)


def test_a_collapse_is_noticed_and_nothing_has_changed(refused):
    model = wrapped()
    before = state(model)
    with refused(CollapseError, "fell into one class", "of the last", "before", "method='statistics'") as caught:
        adapt_to(model, MANY, "tent", **TOO_FAST)
    assert not moved(model, before)
    assert caught.value.step is None
    adaptation = adapt_to(model, MANY, "tent", **TOO_FAST, collapse=1)
    assert adaptation.share == 1  # so it was right to stop
    assert adaptation.share_before < 0.5
    adaptation.reset()
    assert not moved(model, before)


def test_few_images_are_too_few_to_call_it_a_collapse():
    model, few = wrapped(), images(FEWEST - 32)
    done = adapt_to(model, [few], "tent", lr=0.3, entropy=1, epochs=1)
    assert done.images == FEWEST - 32


class Broken(list):
    """Batches of which the second pass fails."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        for batch in super().__iter__():
            if self.reads == 2:
                raise OSError("the disk has gone")
            yield batch


def test_an_error_of_the_images_leaves_the_adapter_as_it_was():
    model = wrapped()
    before = state(model)
    broken = Broken(BATCHES)
    with pytest.raises(OSError, match="the disk has gone"):
        adapt_to(model, broken, "tent", entropy=1)
    assert not moved(model, before)


def compact(tmp_path, **settings):
    return load_bn_only_model(export(wrapped(**settings), tmp_path / "small.safetensors", format="compact"))


def disabled():
    model = wrapped()
    model.base_model.disable_adapter_layers()
    return model


def test_what_cannot_be_adapted(tmp_path):
    data = {"data_config": {"input_size": [3, 16, 16]}}
    small = compact(tmp_path, **data)
    check_answers(
        "adaptation.md",
        "bad input",
        [
            ("a network without an adapter", lambda: adapt_to(timm.create_model("test_resnet"), BATCHES)),
            ("adapters that are disabled", lambda: adapt_to(disabled(), BATCHES)),
            ("a compact adapter", lambda: adapt_to(small, BATCHES)),
            ('a compact adapter, "tent"', lambda: adapt_to(small, BATCHES, "tent")),
            ("`recalibrate` of a compact adapter", lambda: recalibrate(small, BATCHES)),
            ('"statistics" without BatchNorm', lambda: adapt_to(wrapped("test_vit"), [images(4, 32)])),
            (
                '"tent" of an adapter that trains the head alone',
                lambda: adapt_to(wrapped(train_gamma=False, train_beta=False, train_head=True), BATCHES, "tent"),
            ),
            ("another method", lambda: adapt_to(wrapped(), BATCHES, "tend")),
            ("another option", lambda: adapt_to(wrapped(), BATCHES, "tent", rate=0.1)),
            ('an option of "tent" for "statistics"', lambda: adapt_to(wrapped(), BATCHES, lr=0.1)),
            ("`lr=0`", lambda: adapt_to(wrapped(), BATCHES, "tent", lr=0)),
            ('`entropy="low"`', lambda: adapt_to(wrapped(), BATCHES, "tent", entropy="low")),
            ("`collapse=nan`", lambda: adapt_to(wrapped(), BATCHES, "tent", collapse=float("nan"))),
            ("`epochs=0`", lambda: adapt_to(wrapped(), BATCHES, "tent", epochs=0)),
            ("no images", lambda: adapt_to(wrapped(), [])),
            ('no images, "tent"', lambda: adapt_to(wrapped(), [], "tent")),
            ("images that can be read once", lambda: adapt_to(wrapped(), iter(BATCHES), "tent")),
            ("batches of one image, with BatchNorm", lambda: adapt_to(wrapped(), images(2).split(1), "tent")),
            (
                "predictions that fall into one class",
                lambda: adapt_to(wrapped(), MANY, "tent", **TOO_FAST),
            ),
        ],
    )


def test_a_compact_adapter_is_not_recalibrated_since_its_statistics_are_folded(tmp_path, refused):
    small = compact(tmp_path, data_config={"input_size": [3, 16, 16]})
    before = state(small)
    with refused(AdapterError, "compact adapter is for inference"):
        recalibrate(small, BATCHES)
    assert not moved(small, before)
