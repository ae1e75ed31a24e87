"""The command line: what it prints, its exit codes, and that every command's example is understood."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.cli import main
from bn_affine_adapters.settings import CONFIG_NAME, bare
from bn_affine_adapters.sharing.contents import read_tensors
from bn_affine_adapters.training.recipe import CONFIGS, config_files, find_config
from bn_affine_adapters.training.sweeps import read_sweep

COMMANDS = {
    "inspect", "verify", "predict", "push", "card", "export", "diff", "configs", "train", "validate", "analyse",
    "architectures", "prune", "compare",
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run():
    """Run a command line; return its exit code, output and errors."""

    def invoke(*words):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter of a seeded test_resnet, three classes with names."""
    config = BNOnlyConfig(seed=0, label_names=["cat", "dog", "owl"])
    folder = tmp_path_factory.mktemp("cli") / "adapter"
    get_bn_only_model(timm.create_model("test_resnet", num_classes=3), config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def change(folder, name_part="running_mean"):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name_part in name)
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["tensors_digest"] = digest_of({bare(key): tensor for key, tensor in tensors.items()})
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return name


def test_inspect_shows_settings_parts_gamma_and_files(run, folder):
    code, table, _ = run("inspect", folder)
    assert code == 0
    for word in (
        "architecture",
        "test_resnet",
        "kaiming_normal",
        "gamma",
        "running statistics",
        "negative, %",
        WEIGHTS,
    ):
        assert word in table, word


def test_inspect_says_where_a_gamma_is_that_is_not_in_the_file(run, tmp_path):
    config = BNOnlyConfig(seed=0, train_gamma=False)
    get_bn_only_model(timm.create_model("test_resnet"), config).save_pretrained(tmp_path)
    assert "gamma: none in the file; one that does not train is as the seed draws it" in run("inspect", tmp_path)[1]


def test_inspect_in_json_has_the_true_numbers(run, folder):
    code, text, _ = run("inspect", folder, "--json")
    found, tensors = json.loads(text), load_file(folder / WEIGHTS)
    assert code == 0
    assert (found["seed"], found["architecture"], found["trains"]) == (0, "test_resnet", ["gamma", "beta"])
    gamma = torch.cat([tensor for name, tensor in tensors.items() if name.endswith("weight")])
    assert found["contents"]["gamma"]["values"] == gamma.numel() > 100
    assert sum(part["values"] for part in found["contents"].values()) == sum(t.numel() for t in tensors.values())
    assert sum(part["bytes"] for part in found["contents"].values()) == sum(t.nbytes for t in tensors.values())
    assert found["gamma"]["mean"] == pytest.approx(gamma.mean().item(), abs=1e-5)
    assert found["gamma"]["negative, %"] == 0
    assert found["gamma"]["|gamma| < 0.01, %"] == pytest.approx(100 * (gamma < 0.01).float().mean().item(), abs=0.01)
    assert found["files"][WEIGHTS] == (folder / WEIGHTS).stat().st_size


@pytest.mark.parametrize("options", [[], ["--sampled"]])
def test_verify_says_how_much_was_compared(run, folder, options):
    code, text, _ = run("verify", folder, "--json", *options)
    found = json.loads(text)
    assert code == 0
    assert found["verified"] == ("sampled" if options else "full")
    plain = timm.create_model("test_resnet", num_classes=3)
    trained = json.loads(run("inspect", folder, "--json")[1])["contents"]
    norm = trained["gamma"]["values"] + trained["beta"]["values"]
    assert found["values"] == sum(p.numel() for p in plain.parameters()) - norm
    assert "fingerprint" in run("verify", folder)[1]


def test_verify_exits_with_1_on_another_network_and_names_the_layer(run, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "seed": 1}))
    code, out, err = run("verify", folder)
    assert (code, out) == (1, "")
    assert "FingerprintError" in err
    assert "the first layer that differs is conv1.0.weight" in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_cannot_be_done_exits_with_2_and_says_what_to_do(run, command, tmp_path):
    code, out, err = run(command, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "AdapterFileError" in err
    assert "do:" in err


def test_a_network_over_the_limit_exits_with_2(run, folder):
    code, _, err = run("verify", folder, "--max-parameters", 1000)
    assert code == 2
    assert "TooLargeError" in err


def test_predict_prints_the_names_and_probabilities_of_each_image(run, folder, tmp_path):
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 30), 80).save(tmp_path / name)
    code, text, _ = run("predict", folder, tmp_path / "a.png", tmp_path / "b.png", "--json", "--top-k", 2)
    found = json.loads(text)
    assert code == 0
    assert [Path(name).name for name in found] == ["a.png", "b.png"]
    for classes in found.values():
        assert len(classes) == 2
        assert {best["label"] for best in classes} < {"cat", "dog", "owl"}
        assert classes[0]["probability"] >= classes[1]["probability"] > 0
    code, table, _ = run("predict", folder, tmp_path / "a.png")
    assert code == 0
    assert {"cat", "dog", "owl"} < set(table.split())


def test_a_broken_image_exits_with_2(run, folder, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    code, _, err = run("predict", folder, tmp_path / "a.png")
    assert code == 2
    assert "DataError" in err


def test_predict_names_a_broken_image_and_goes_on(run, folder, tmp_path):
    for name in ("good.jpg", "good2.jpg"):
        Image.effect_noise((40, 30), 80).save(tmp_path / name)
    (tmp_path / "corrupt.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:400])
    names = [tmp_path / name for name in ("good.jpg", "corrupt.jpg", "nowhere.jpg", "good2.jpg")]
    code, out, err = run("predict", folder, *names)
    assert code == 2
    assert [str(name) for name in names if str(name) in out.splitlines()] == [str(names[0]), str(names[3])]
    assert f"The image {names[1]} cannot be read." in err
    assert f"The image {names[2]} cannot be read." in err
    code, out, _ = run("predict", folder, *names, "--json")
    assert (code, list(json.loads(out))) == (2, [str(names[0]), str(names[3])])


def test_predict_classifies_a_folder_into_a_csv_file(run, folder, tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "more/c, d.png"):
        Image.effect_noise((40, 30), 80).save(tmp_path / "photos" / name)
    code, out, _ = run("predict", folder, tmp_path / "photos", "--top-k", 2, "--out", tmp_path / "found.csv")
    assert (code, out) == (0, "")
    rows = list(csv.DictReader((tmp_path / "found.csv").open(newline="")))
    files = [str(tmp_path / "photos" / name) for name in ("a.jpg", "b.png", "more/c, d.png")]
    assert [(row["image"], row["rank"]) for row in rows] == [(file, rank) for file in files for rank in "12"]
    expected = json.loads(run("predict", folder, tmp_path / "photos", "--top-k", 2, "--json")[1])
    found = [{"label": row["label"], "probability": float(row["probability"])} for row in rows]
    assert found == [best for file in files for best in expected[file]]
    code, _, err = run("predict", folder, tmp_path / "photos", "--out", tmp_path / "photos" / "b.png" / "found.csv")
    assert code == 2
    assert "cannot be written" in err


def test_an_adapter_on_given_weights_takes_its_base_from_a_file(run, tmp_path):
    base = timm.create_model("test_resnet", num_classes=3)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    get_bn_only_model(base, BNOnlyConfig()).save_pretrained(tmp_path / "adapter")
    code, _, err = run("verify", tmp_path / "adapter")
    assert code == 2
    assert "BaseRequiredError" in err
    assert run("verify", tmp_path / "adapter", "--base", tmp_path / "base.safetensors")[0] == 0
    other = timm.create_model("test_resnet", num_classes=3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    assert run("verify", tmp_path / "adapter", "--base", tmp_path / "other.safetensors")[0] == 1


def test_diff_of_equal_adapters_is_empty_and_exits_with_0(run, folder, saved):
    code, text, _ = run("diff", folder, saved, "--json")
    assert code == 0
    assert json.loads(text) == {"settings": {}, "layers": {}}
    code, text, _ = run("diff", folder, saved)
    assert (code, text) == (0, f"identical; {len(load_file(folder / WEIGHTS))} tensors in the first\n")


def test_diff_names_the_layer_that_changed_and_by_how_much(run, folder, saved):
    layer, _, tensor = change(folder).removeprefix("base_model.model.").partition(".bn_only_layers.")
    code, text, _ = run("diff", saved, folder, "--json")
    assert code == 1
    assert json.loads(text) == {"settings": {}, "layers": {layer: {tensor: 0.5}}}
    code, table, _ = run("diff", saved, folder)
    assert code == 1
    assert "0.5" in table
    assert layer in table


def test_diff_shows_settings_and_layers_of_one_side_only(run, folder, tmp_path):
    other = get_bn_only_model(timm.create_model("test_efficientnet", num_classes=3), BNOnlyConfig(seed=4))
    other.save_pretrained(tmp_path / "other")
    code, text, _ = run("diff", folder, tmp_path / "other", "--json")
    found = json.loads(text)
    assert code == 1
    assert found["settings"]["seed"] == [0, 4]
    words = {word for layer in found["layers"].values() for word in layer.values() if isinstance(word, str)}
    assert {"only in the first", "only in the second"} <= words


def test_export_and_card_write_their_files(run, folder, tmp_path):
    code, out, _ = run("export", folder, tmp_path / "plain")
    assert (code, out.strip()) == (0, str(tmp_path / "plain"))
    code, out, _ = run("card", folder, "me/x", "--output", tmp_path / "card", "--license", "mit")
    assert (code, out.strip()) == (0, str(tmp_path / "card" / "README.md"))
    assert "license: mit" in (tmp_path / "card" / "README.md").read_text()
    assert run("export", folder, tmp_path / "card")[0] == 2


def test_every_command_has_help_with_an_example_that_is_understood(run):
    assert set(main.commands) == COMMANDS | {"sweep", "tune", "gpu-check", "serve"}
    for name in COMMANDS:
        command = main.commands[name]
        code, text, _ = run(name, "--help")
        assert code == 0
        line = text.partition("Example:")[2].strip().partition("\n")[0].partition("&&")[0]
        words = shlex.split(line)
        assert words[:2] == ["bn-adapters", name]
        # Existing paths are checked by click itself, so those of the example are replaced by ones that exist.
        swapped = [str(Path(__file__).parent) if word.startswith("runs/") else word for word in words[2:]]
        swapped = [__file__ if word.endswith(".png") else word for word in swapped]
        with command.make_context(name, swapped) as context:
            assert context.params or context.args or context.protected_args


@pytest.mark.parametrize(
    "words",
    [
        "sweep [OPTIONS] NAME|FILE.yaml",
        "tune [OPTIONS] NAME|FILE.yaml",
        "gpu-check [OPTIONS]",
        "serve [OPTIONS] ADAPTERS...",
    ],
)
def test_a_script_that_is_a_command_has_its_own_help(run, words):
    code, text, _ = run(words.partition(" ")[0], "--help")
    assert code == 0
    assert f"Usage: bn-adapters {words}" in text


def test_configs_lists_every_file_with_its_first_line(run):
    code, text, _ = run("configs")
    assert code == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == list(config_files())
    assert {"digits", "sweeps/paper", "tune/digits"} <= set(config_files())
    assert len(lines) == len(list(CONFIGS.rglob("*.yaml"))) >= 16
    assert all(len(line.split()) > 5 and line.endswith(".") for line in lines), "each line is a whole sentence"
    assert "handwritten digits" in next(line for line in lines if line.startswith("digits "))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("sweep nosuch", "The sweep nosuch cannot be read"),
        ("tune nosuch", "The tuning nosuch cannot be read"),
        ("train nosuch", "The recipe cannot be read"),
        ("train sweeps/digits", "bn-adapters sweep sweeps/digits"),
        ("train digits model=nosuch", "has no architecture 'nosuch'"),
        ("train digits model=resnet18 model_args.foo=1", "unexpected keyword argument 'foo'"),
        ("train digits tracker=nosuch", "tracker='nosuch'"),
        ("validate foo=1", "bn-adapters validate has no key 'foo'"),
        ("configs show digit", "digits"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_three_parts_and_exit_code_2(words, shown, run, here):
    code, _, errors = run(*words.split())
    assert code == 2
    assert shown in errors
    assert "  seen:  " in errors
    assert "  do:    " in errors
    assert not list(here.rglob("adapter_model.safetensors"))


PYTHON = re.compile(r"\b(model|timm|BNOnlyConfig|\w+_bn_only_model)\b[.(]|model=(base|\W)|=None\b|\(\.\.\.")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with an adapter on weights that nobody else has."""
    folder = tmp_path_factory.mktemp("given") / "adapter"
    get_bn_only_model(timm.create_model("test_resnet", num_classes=10), BNOnlyConfig()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("verify {given}", "--base=FILE.safetensors"),
        ("validate {given} image_size=32 held_out=8", "pretrained_file=FILE.safetensors"),
        ("verify {saved} --max-parameters 1000", "--max-parameters=N"),
        ("inspect {saved}/nothing", "bn-adapters train wrote, e.g. runs/digits/adapter"),
        ("inspect {saved}/nothing", "a tag is --revision="),
        ("train digits model=nf_resnet26", "model=resnet50"),
        ("train digits model=nosuch", "those of python -c 'import timm; print(*timm.list_models())'"),
    ],
)
def test_the_advice_in_the_command_line_is_one(words, advice, run, saved, given, here):
    code, _, errors = run(*words.format(saved=saved, given=given).split())
    assert code == 2
    do = errors.partition("  do:    ")[2]
    assert advice in do
    assert not PYTHON.search(do.replace("'import timm; print(*timm.list_models())'", "")), do


def test_a_value_that_cannot_be_read_is_named_with_its_key(run, here):
    code, _, errors = run("train", "digits", "lr=high")
    assert code == 2
    assert "  seen:  lr='high'" in errors


def test_the_same_command_a_second_time_says_how_to_go_on(run, here):
    Path("runs/digits/adapter").mkdir(parents=True)
    code, _, errors = run("train", "digits")
    assert code == 2
    assert "bn-adapters validate runs/digits/adapter measures what was trained" in errors
    assert "to train again, add overwrite=true" in errors
    Path("runs/digits/adapter").rename("runs/digits/checkpoint.pt")
    assert "add resume=true to go on from a checkpoint" in run("train", "digits")[2]


def test_a_listed_name_is_found_by_its_own_command(here):
    assert read_sweep("sweeps/digits").networks == read_sweep("digits").networks
    assert find_config("tune/digits", "tune") == find_config("digits", "tune") == CONFIGS / "tune" / "digits.yaml"


def test_configs_shows_and_copies_and_overwrites_nothing(run, here):
    text = (CONFIGS / "sweeps" / "digits.yaml").read_text()
    assert run("configs", "show", "sweeps/digits") == (0, text, "")
    assert run("configs", "copy", "sweeps/digits") == (0, "digits.yaml\n", "")
    assert run("configs", "copy", "cifar10", "mine.yaml") == (0, "mine.yaml\n", "")
    assert (here / "digits.yaml").read_text() == text
    (here / "mine.yaml").write_text("epochs: 2\n")
    code, out, err = run("configs", "copy", "cifar10", "mine.yaml")
    assert (code, out) == (2, "")
    assert "OutputFolderError: mine.yaml exists." in err
    assert (here / "mine.yaml").read_text() == "epochs: 2\n"
    code, _, err = run("configs", "show", "digit")
    assert code == 2
    assert "tune/digits" in err


def test_train_and_validate_hand_their_arguments_to_the_scripts(run, here, monkeypatch):
    handed = []
    for name in ("train", "validate"):
        script = import_module(f"bn_affine_adapters.training.{name}")
        monkeypatch.setattr(script, "command", lambda words, name=name: handed.append((name, words)))
    assert run("train", "mine.yaml", "epochs=2", "--json", "--config", "x", "-h")[0] == 0
    assert run("validate", "runs/a b", "held_out=3")[0] == 0
    expected = ["mine.yaml", "epochs=2", "--json", "--config", "x", "-h"]
    assert handed == [("train", expected), ("validate", ["runs/a b", "held_out=3"])]


def test_train_without_its_extra_says_what_to_install(run, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)  # as if it was not installed
    code, out, err = run("train", "epochs=1")
    assert (code, out) == (2, "")
    assert "ConfigError: This needs a package that is not installed." in err
    assert "pip install 'bn-affine-adapters[train]'" in err


def test_train_with_a_wrong_recipe_exits_with_2(run, here):
    code, out, err = run("train", "epochs=0")
    assert (code, out) == (2, "")
    assert "epochs is out of range" in err
    assert not list(here.iterdir())


LIGHT = """
import json, sys, time
from bn_affine_adapters.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words, prog_name="bn-adapters", standalone_mode=False)
    except SystemExit as end:
        assert not end.code, words
slow = {"torch", "timm", "peft", "transformers", "accelerate", "datasets", "optuna", "matplotlib"} & sys.modules.keys()
print(json.dumps([sorted(slow), time.process_time()]))
"""


def light(*lines):
    """Run command lines in a fresh process; return what is slow of what they imported, and seconds of processor."""
    command = [sys.executable, "-c", LIGHT, json.dumps([[str(word) for word in words] for words in lines])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_is_printed_at_once():
    slow, seconds = light(["--help"])
    assert slow == []
    assert seconds < 1.5, "0.2 s are usual"


def test_what_needs_no_network_imports_nothing_slow(folder):
    helps = [[name, "--help"] for name in main.commands]
    shown = [["inspect", folder], ["inspect", folder, "--json"], ["configs"], ["configs", "show", "digits"]]
    slow, seconds = light(*helps, *shown)
    assert len(helps) >= 14
    assert slow == []
    assert seconds < 4, "0.6 s are usual"


def test_a_tensor_in_bfloat16_is_read_without_torch(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}, folder / WEIGHTS)
    found = read_tensors(folder)
    stored = load_file(folder / WEIGHTS)
    assert len(found) == len(stored) > 10
    for name, tensor in stored.items():
        ours = found[name.removeprefix("base_model.model.")]
        assert (ours.bytes, ours.size, ours.shape) == (tensor.nbytes, tensor.numel(), tuple(tensor.shape))
        assert torch.equal(
            torch.tensor(ours.values), tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype)
        )


def test_an_option_that_does_not_exist_exits_with_2(run, folder):
    assert run("inspect", folder, "--jsn")[0] == 2


def test_the_program_itself_runs(folder):
    program = Path(sys.executable).parent / "bn-adapters"
    command = [str(program)] if program.exists() else [sys.executable, "-m", "bn_affine_adapters.cli"]
    done = subprocess.run([*command, "verify", str(folder), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] == "full"


def test_a_name_from_a_strangers_file_cannot_command_the_terminal(run, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["label_names"] = ["\x1b[2Jcat", "dog\r", "owl"]
    config["versions"] = {"torch": "\x1b]0;title\x07"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    image = folder.parent / "a.png"
    Image.new("RGB", (30, 30)).save(image)
    for words in (("inspect", folder), ("predict", folder, image), ("inspect", folder, "--json")):
        code, out, _ = run(*words)
        assert code == 0
        assert "\x1b" not in out
        assert "\r" not in out


def test_the_loaded_network_is_what_predict_used(run, folder, tmp_path):
    Image.effect_noise((40, 30), 80).save(tmp_path / "a.png")
    from bn_affine_adapters import predict

    expected = predict(load_bn_only_model(folder), tmp_path / "a.png", top_k=1)[0]
    (classes,) = json.loads(run("predict", folder, tmp_path / "a.png", "--json")[1]).values()
    assert classes[0] == {"label": expected.label, "probability": expected.probability}
