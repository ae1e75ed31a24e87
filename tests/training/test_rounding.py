"""Training through the rounding of a compact file: what is saved lies on the grid, and loses nothing as such a file."""

import pytest
import timm
import torch
from torch import nn

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.fold import copies, fold_, parameters
from bn_affine_adapters.errors import AdapterError, AdapterFileError, ConfigError
from bn_affine_adapters.training.rounding import Rounding
from bn_affine_adapters.training.train import read_recipe, train

pytestmark = pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")
SHORT = ["digits", "model=test_resnet", "image_size=16", "tracker=null", "threads=1", "batch_size=256", "epochs=1"]


def run(folder, *changes):
    (found,) = train(read_recipe([*SHORT, f"output_dir={folder}", *changes]))
    return found


def folded(model):
    """Return an adapter's values, its statistics folded; the model is used up."""
    held = copies(model.get_base_model(), "default", model.peft_config["default"])
    fold_(held)
    return parameters(held)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run(folder)
    return folder / "adapter"


@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_what_trained_through_the_rounding_loses_nothing_as_a_compact_file(bits, adapter, tmp_path, capsys):
    found = run(tmp_path / "run", f"quantise_bits={bits}", f"adapter={adapter}", "running_statistics=frozen", "lr=0.05")
    model = load_bn_only_model(found.result["adapter"])
    values = folded(load_bn_only_model(found.result["adapter"]))
    # Values that differ by rounding in float32 alone count as one.
    scaled = [tensor / tensor.abs().max().clamp_min(1e-9) for tensor in values.values()]
    assert max(len(tensor.round(decimals=5).unique()) for tensor in scaled) <= 2**bits
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    capsys.readouterr()
    loaded = load_bn_only_model(export(model, tmp_path / "x.safetensors", "compact", bits=bits, images=x))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())
    start = folded(load_bn_only_model(adapter))
    assert max((values[key] - start[key]).abs().max().item() for key in values) > 1e-3, "it did not train"


def test_what_trains_is_not_what_runs(train_step):
    model = train_step(get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rounding = Rounding(model, 4)
    rounding.round_()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(key.endswith((".weight", ".bias")) and ".default." in key for key in changed)
    rounding.round_()  # several parts of a batch
    rounding.restore_()
    rounding.restore_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_value_that_is_not_finite_is_left_for_the_loop_to_notice(train_step):
    model = train_step(get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig(seed=0)))
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad)
    norm.weight.data[0] = float("nan")
    other = norm.bias.detach().clone()
    Rounding(model, 4).round_()
    assert norm.weight[0].isnan()
    assert torch.equal(norm.bias, other)


def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not(tmp_path):
    """A checkpoint holds the values that train, and not the rounded ones."""
    whole = run(tmp_path / "whole", "quantise_bits=4", "lr=0.05")
    for resume in ("false", "true"):  # 6 steps; the second run goes on after the fourth
        half = run(tmp_path / "half", "quantise_bits=4", "lr=0.05", "checkpoint_every_steps=4", f"resume={resume}")
    ours, theirs = (load_bn_only_model(found.result["adapter"]).state_dict() for found in (whole, half))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_run_starts_from_an_adapter(adapter, tmp_path):
    found = run(tmp_path / "run", f"adapter={adapter}", "lr=0", "weight_decay=0", "running_statistics=frozen")
    before, after = (load_bn_only_model(each).state_dict() for each in (adapter, found.result["adapter"]))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert found.result["recipe"]["adapter"] == "adapter", "a path of this machine is not recorded"


BAD = {
    "bits": (["quantise_bits=5"], ConfigError, "choose from None, 4, 6, 8, 16"),
    "whole": (["quantise_bits=4", "condition=all"], ConfigError, "One adapter trains through the rounding"),
    "several": (["quantise_bits=4", "replicates=2"], ConfigError, "One adapter trains through the rounding"),
    "start of all": (["adapter={adapter}", "condition=all"], ConfigError, "starts from no adapter"),
    "missing": (["adapter=nowhere"], AdapterFileError, "nowhere"),
    "another seed": (["adapter={adapter}", "seed=9"], AdapterError, "share its frozen weights"),
    "another condition": (["adapter={adapter}", "condition=bn+head"], ConfigError, "trains other layers"),
    "does not fold": (["quantise_bits=4", "model=evonorm"], AdapterError, "fold into gamma and beta"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_train_so_is_refused(case, adapter, tmp_path, refused):
    changes, kind, word = BAD[case]
    if case == "does not fold":
        with refused(kind, word):
            norm = timm.layers.EvoNorm2dB0(8)
            Rounding(get_bn_only_model(nn.Sequential(nn.Conv2d(3, 8, 3), norm), BNOnlyConfig(seed=0)), 4)
        return
    with refused(kind, word):
        run(tmp_path / "run", *(change.format(adapter=adapter) for change in changes))
