"""recipes/analyse.py: what it says of an adapter and of a plain network, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from accelerate.state import AcceleratorState

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import AdapterFileError, ConfigError, RebuildError, UnknownKeyError
from bn_affine_adapters.study import analyse
from bn_affine_adapters.study.networks import distribution, norm_values
from bn_affine_adapters.training import validate

GOLDEN = Path(__file__).parents[1] / "golden" / "adapter-v1"


@pytest.fixture(autouse=True)
def each_run_begins_as_in_a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The golden adapter, real digits, as a plain timm network."""
    return export(load_bn_only_model(GOLDEN), tmp_path_factory.mktemp("plain") / "a network")


def run(adapter, *more):
    result = analyse.run(analyse.read_options([f"adapter='{adapter}'", *more]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return result


CLAMP = "clamp=[0,0.01,0.5,100]"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """What the recipe tells of the golden adapter, and the line it wrote."""
    file = tmp_path_factory.mktemp("golden") / "new" / "line.json"
    return run(GOLDEN, CLAMP, f"output={file}"), file.read_text()


def test_the_line_of_an_adapter_holds_what_the_functions_return(golden):
    result, line = golden
    assert json.loads(line) == result
    assert len(line) < 10_000
    assert line.count("\n") == 1
    assert list(result) == ["top1", "top5", "images", "analysis"]
    assert result["images"] == 359
    found = result["analysis"]
    assert list(found) == ["top1", "gamma", "beta", "clamped", "dead"]
    assert found["top1"] == result["top1"]
    values = norm_values(load_bn_only_model(GOLDEN))
    for kind in ("gamma", "beta"):
        expected = distribution(values[kind], digits=4)
        expected.pop("layers")
        assert found[kind] == expected
    assert list(found["clamped"]) == ["0", "0.01", "0.5", "100"]
    for key, entry in found["clamped"].items():
        assert entry["set"] == sum(int((np.abs(v) < float(key)).sum()) for v in values["gamma"].values())
    assert list(found["dead"]) == ["thresholds", "share", "0.99", "channels"]
    assert found["dead"]["share"][99] == found["dead"]["0.99"] > 0
    assert found["dead"]["share"] == sorted(found["dead"]["share"], reverse=True)
    assert len(found["dead"]["share"]) == len(found["dead"]["thresholds"]) == 101
    assert found["dead"]["channels"] == 464


def test_each_layer_is_redrawn_alone(plain):
    found = run(plain, "clamp=[]", "redraw=0")["analysis"]
    layers = [name for name, module in load_bn_only_model(GOLDEN).get_base_model().named_modules() if "conv" in name]
    assert {"conv1", "fc"} < set(found["redrawn"])
    # The golden adapter was drawn from this seed, and its head is frozen: the same bits come back.
    assert set(found["redrawn"].values()) == {found["top1"]}
    other = run(plain, "clamp=[]", "redraw=1")["analysis"]["redrawn"]
    assert len(other) == len(found["redrawn"]) >= len(layers) > 10
    assert max(other.values()) < found["top1"]


def test_it_measures_what_validate_measures_and_clamping_changes_it(golden):
    result, _ = golden
    again = validate.run(validate.read_options([f"adapter={GOLDEN}"]))
    assert (result["top1"], result["top5"], result["images"]) == (again["top1"], again["top5"], again["images"])
    top1 = {key: entry["top1"] for key, entry in result["analysis"]["clamped"].items()}
    assert top1["0"] == result["top1"] > 90
    assert top1["100"] < 20 < top1["0.5"] < top1["0"]


def test_the_line_is_the_same_for_an_exported_plain_network(plain, golden):
    assert run(plain, CLAMP) == golden[0]


def test_a_network_without_relus_has_no_dead_channels_but_all_else(tmp_path, capsys):
    config = BNOnlyConfig(seed=0, data_config={"input_size": [3, 32, 32]})
    get_bn_only_model(timm.create_model("test_efficientnet", num_classes=10), config).save_pretrained(tmp_path)
    result = run(tmp_path, "layers=true", "clamp=[]")
    assert result["analysis"]["dead"] is None
    assert len(result["analysis"]["gamma"]["layers"]) == 13
    printed = capsys.readouterr()
    assert "0 such modules" in printed.err
    assert json.loads(printed.out.splitlines()[-1]) == result


def test_two_processes_are_refused(monkeypatch, refused):
    monkeypatch.setattr("accelerate.Accelerator", lambda: SimpleNamespace(num_processes=2))
    with refused(ConfigError, "2 processes"):
        analyse.run(analyse.Options())


def test_it_refuses_what_it_cannot_use(plain, tmp_path, refused):
    with refused(UnknownKeyError, "adapter"):
        analyse.read_options(["adaptor=x"])
    with refused(AdapterFileError, "the folder holds nothing"):
        analyse.read_options([f"adapter={tmp_path}"])
    with refused(ConfigError, "bn-adapters analyse cannot be read", "bn-adapters analyse --help"):
        analyse.read_options([f"adapter={GOLDEN}", "batch_size=2.5"])
    options = analyse.read_options([f"adapter='{plain}'"])
    (broken := tmp_path / "broken").mkdir()
    for file in plain.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no tensors")
    options.adapter = str(broken)
    with refused(RebuildError, "timm does not load"):
        analyse.run(options)


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        analyse.read_options(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {field}=" in printed for field in vars(analyse.Options()))
    assert "clamp=[0.01, 0.05]" in printed
