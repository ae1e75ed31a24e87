"""Loading and building draw no number from the process, whose threads go on as if they were alone."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import peft
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, predict
from bn_affine_adapters.adapter.rebuild import create, create_pretrained
from bn_affine_adapters.seed.generator import OwnGenerator
from bn_affine_adapters.seed.rules import constants_only

PHOTO = Image.effect_noise((64, 64), 90)


def state():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


DRAWS = {
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(3),
    "randint": lambda: torch.randint(1000, (3,)),
    "randint from a least number": lambda: torch.randint(5, 1000, (3,)),
    "randperm": lambda: torch.randperm(100),
    "rand_like": lambda: torch.rand_like(torch.ones(3)),
    "randn_like": lambda: torch.randn_like(torch.ones(3)),
    "randint_like": lambda: torch.randint_like(torch.ones(3), 1000),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "bernoulli": lambda: torch.bernoulli(torch.full((50,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(100), 5),
    "in place": lambda: torch.empty(3).uniform_(),
    "dropout": lambda: F.dropout(torch.ones(50)),
    "a layer": lambda: nn.Linear(3, 4).weight.detach(),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(3)),
    "attention with dropout": lambda: F.scaled_dot_product_attention(*torch.ones(3, 1, 20, 4), dropout_p=0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_random_operator_draws_the_same_numbers_in_each_block_and_none_of_the_process(draw):
    before = state()
    blocks = []
    for _ in range(2):
        with OwnGenerator() as generator:
            assert not generator.drawn
            blocks.append((draw(), draw()))
            assert generator.drawn
    assert state() == before
    assert torch.equal(blocks[0][0], blocks[1][0])
    assert torch.equal(blocks[0][1], blocks[1][1])
    assert not torch.equal(*blocks[0])
    with constants_only():
        draw()
    assert state() == before
    draw()
    assert state() != before


def test_what_draws_nothing_or_has_a_generator_is_left_alone():
    mine = torch.Generator().manual_seed(3)
    with OwnGenerator() as generator:
        found = torch.rand(3, generator=mine)
        F.scaled_dot_product_attention(*torch.ones(3, 1, 4, 4))
        F.dropout(torch.ones(3), training=False)
        torch.empty(3, device="meta").normal_()
        assert not generator.drawn
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("a", "b"), [(-2, 2), (-0.1, 0.1), (3, 4)])
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_an_initialiser_that_draws_until_values_are_within_bounds_ends_in_old_memory(a, b):
    old = torch.full((64, 64), 9.0)
    with constants_only():
        nn.init.trunc_normal_(old, a=a, b=b)
    assert old[0, 0].isnan()


def wrapped(name="test_resnet", **settings):
    return get_bn_only_model(timm.create_model(name, num_classes=3), BNOnlyConfig(seed=0, train_head=True, **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters of test_resnet: `seeded` is redrawn from a seed, `given` belongs to the weights of base.safetensors."""
    folder = tmp_path_factory.mktemp("adapters")
    wrapped().save_pretrained(folder / "seeded")
    base = timm.create_model("test_resnet")
    save_file(base.state_dict(), folder / "base.safetensors")
    other = timm.create_model("test_resnet", num_classes=5)
    other.load_state_dict({**base.state_dict(), **other.get_classifier().state_dict(prefix="fc.")})
    get_bn_only_model(other, BNOnlyConfig(train_head=True)).save_pretrained(folder / "given")
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return create_pretrained("test_resnet", {}, folder / "base.safetensors")


CALLS = {
    "create": lambda folder, base, _: create("test_vit", {}),
    "create pretrained": lambda folder, base, _: create_pretrained("test_resnet", {}, folder / "base.safetensors"),
    "load": lambda folder, base, _: load_bn_only_model(folder / "seeded"),
    "load to train lean": lambda folder, base, _: load_bn_only_model(
        folder / "seeded", is_trainable=True, lean="exact"
    ),
    "load a head of other classes": lambda folder, base, _: load_bn_only_model(folder / "given", model=base),
    "load a second adapter": lambda folder, base, model: model.load_adapter(folder / "seeded", "second"),
    "peft": lambda folder, base, _: peft.PeftModel.from_pretrained(timm_base(), folder / "seeded"),
    "wrap": lambda folder, base, _: get_bn_only_model(timm_base(), BNOnlyConfig(seed=1)),
    "wrap with a control": lambda folder, base, _: get_bn_only_model(
        timm_base(), BNOnlyConfig(seed=1, control="two_weights")
    ),
    "add an adapter of other classes": lambda folder, base, model: model.add_adapter(
        "other", BNOnlyConfig(seed=0, train_head=True, model_args={"num_classes": 7})
    ),
    "set_lean": lambda folder, base, model: model.set_lean("smallest"),
    "predict": lambda folder, base, model: predict(model.train(), PHOTO),
    "export": lambda folder, base, model: export(model, folder / "exported"),
    "save": lambda folder, base, model: model.save_pretrained(folder / "saved"),
}


def timm_base():
    with OwnGenerator():
        return timm.create_model("test_resnet", num_classes=3)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_call_reads_or_sets_a_generator_of_the_process(call, folder, base):
    model = wrapped()
    before = state()
    call(folder, base, model)
    assert state() == before


def test_trying_lean_training_draws_nothing_though_the_network_does():
    args = {"proj_drop_rate": 0.5, "drop_path_rate": 0.5}  # timm records them from 1.0.31 on
    model = get_bn_only_model(
        timm.create_model("test_vit", num_classes=3, **args), BNOnlyConfig(seed=0, model_args=args)
    )
    before = state()
    report = model.set_lean("exact")
    assert state() == before
    assert report.places > 5


def test_threads_that_load_predict_wrap_and_build_do_not_disturb_each_other(folder):
    """32 at once: each gets what it gets alone, and a thread that draws gets the numbers it draws alone."""
    shared = load_bn_only_model(folder / "seeded", is_trainable=True).train()
    other = load_bn_only_model(folder / "seeded")
    alone = {
        "predict": predict(shared, PHOTO),
        "load": load_bn_only_model(folder / "seeded").state_dict(),
        "wrap": wrapped().state_dict(),
    }
    modes, values = [m.training for m in shared.modules()], {k: v.clone() for k, v in shared.state_dict().items()}

    def same(ours, theirs):
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())

    def predicting():
        assert predict(shared, PHOTO) == alone["predict"]
        assert [m.training for m in shared.modules()] == modes

    def toggling():
        for mode in (True, False):
            other.train(mode)
            assert predict(other, PHOTO) == alone["predict"]

    def loading():
        same(load_bn_only_model(folder / "seeded").state_dict(), alone["load"])

    def wrapping():
        same(get_bn_only_model(timm_base(), BNOnlyConfig(seed=0, train_head=True)).state_dict(), alone["wrap"])

    def building():
        with OwnGenerator():
            layer, table = nn.Linear(64, 64), nn.init.trunc_normal_(torch.empty(64, 64))
            nn.init.orthogonal_(layer.weight)
        assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(64), atol=1e-5)
        assert 0.5 < table.std() < 1.5
        assert layer.bias.unique().numel() > 32

    def draw(count):
        torch.manual_seed(5)
        found = []
        for _ in range(count):
            found.append(torch.rand(1).item())
            time.sleep(0)  # lets other threads run
        return found

    expected = draw(1500)
    with ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(work) for work in 7 * [predicting, toggling, loading, wrapping, building]][:31]
        found = pool.submit(draw, 1500).result()
        for job in jobs:
            job.result()
    assert found == expected
    same(shared.state_dict(), values)
    assert not torch.empty(3).normal_().isnan().any()
