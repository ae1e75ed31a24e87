"""The model card says what is true of an adapter, runs as printed, and holds nothing that a stranger put there."""

import json
import math
import re
import shutil
from importlib import import_module
from pathlib import Path
from string import Template

import numpy as np
import pytest
import yaml
from huggingface_hub import hf_hub_download
from PIL import Image

from bn_affine_adapters.adapter.rebuild import versions
from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.sharing.card import CARD_NAME, md, render, write_card
from bn_affine_adapters.sharing.contents import read_tensors
from bn_affine_adapters.sharing.figure import FIGURE_NAME
from bn_affine_adapters.sharing.folder import read_config
from bn_affine_adapters.sharing.hub import push_folder
from bn_affine_adapters.sharing.results import RESULTS_NAME, merged, scores

GOLDEN = Path(__file__).parents[1] / "golden"
CARDS = Path(__file__).parents[2] / "hub_cards"
TINY = ("epochs=2", "image_size=8", "threads=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an adapter after a real short training, and its result line."""
    train = import_module("bn_affine_adapters.training.train")
    result = train.train(train.read_recipe([*TINY, f"output_dir={tmp_path_factory.mktemp('card') / 'run'}"]))[0].result
    return Path(result["adapter"]), result


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_card_of_a_real_training_is_the_golden_one(folder, trained):
    write_card(folder, "me/digits-bn-only", license="apache-2.0")
    result = trained[1]
    values = {"top1": round(result["top1"], 2), "top5": round(result["top5"], 2), "command": result["command"]}
    made_with = ", ".join(f"{name} {number}" for name, number in sorted(versions().items()))
    card = (folder / CARD_NAME).read_text()
    values["digest"] = re.search(r"bn-adapters:end (\w+)", card)[1]
    golden = Template((GOLDEN / "card.md").read_text()).substitute(values, made_with=made_with)
    assert card == golden
    assert "More Information Needed" not in golden


def test_an_unchanged_adapter_has_an_unchanged_card_and_picture(folder, tmp_path):
    for output in ("one", "two"):
        write_card(folder, "me/x", output=tmp_path / output)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [CARD_NAME, FIGURE_NAME, RESULTS_NAME]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_the_picture_is_one(folder):
    write_card(folder, "me/x")
    with Image.open(folder / FIGURE_NAME) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").tobytes())) > 10
    assert f"]({FIGURE_NAME})" in (folder / CARD_NAME).read_text()


def test_without_matplotlib_the_card_has_no_picture_and_says_how_to_get_one(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"bn-affine-adapters\[plots\]"):
        write_card(folder, "me/x")
    assert FIGURE_NAME not in (folder / CARD_NAME).read_text()
    assert not (folder / FIGURE_NAME).exists()


def test_a_license_is_stated_only_when_given(folder):
    text = render("me/x", read_config(folder), read_tensors(folder))
    assert "license" not in metadata(text)
    assert "license" not in text.lower()
    assert metadata(render("me/x", read_config(folder), read_tensors(folder), license="mit"))["license"] == "mit"


def test_without_results_there_is_no_accuracy(folder):
    data = metadata(text := render("me/x", read_config(folder), read_tensors(folder)))
    assert "model-index" not in data
    assert "metrics" not in data
    assert "No accuracy was recorded." in text


def test_replicates_give_n_mean_and_standard_deviation(folder, trained, tmp_path):
    own = json.loads((folder / RESULTS_NAME).read_text())[0]
    other = {**own, "recipe": {**own["recipe"], "seed": 1}, "top1": own["top1"] + 3}
    foreign = {**own, "recipe": {**own["recipe"], "lr": 9.0}, "top1": 99}
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (own, other, foreign)))
    write_card(folder, "me/x", results=file)
    (score,) = scores(json.loads((folder / RESULTS_NAME).read_text()))
    assert (score.n, score.top1) == (2, round(own["top1"], 2))
    assert score.mean == pytest.approx(own["top1"] + 1.5, abs=0.01)
    assert score.deviation == pytest.approx(3 / math.sqrt(2), abs=0.01)
    (entry,) = metadata((folder / CARD_NAME).read_text())["model-index"][0]["results"]
    assert entry["metrics"][0]["value"] == score.top1
    assert entry["metrics"][0]["args"] == {"n": 2, "mean": score.mean, "standard_deviation": score.deviation}


def test_results_on_a_data_set_of_the_hub_are_written_in_its_newer_form_too(folder):
    write_card(folder, "me/x", results=[{"dataset": "uoft-cs/cifar10", "top1": 69.5, "top5": 97.0}])
    (entry,) = yaml.safe_load((folder / ".eval_results" / "bn-affine-adapters--uoft-cs--cifar10.yaml").read_text())
    assert entry["dataset"]["id"] == "uoft-cs/cifar10"
    assert entry["value"] == 69.5
    assert "datasets" not in metadata((folder / CARD_NAME).read_text())  # measured on it, not trained


def test_the_data_set_of_a_recipe_is_what_was_trained_on(folder):
    line = {"recipe": {"dataset": "uoft-cs/cifar10", "seed": 0}, "top1": 69.5}
    write_card(folder, "me/x", results=[line], tags="own")
    data = metadata((folder / CARD_NAME).read_text())
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert "own" in data["tags"]


def test_equal_results_without_a_recipe_are_counted_each(trained, tmp_path):
    lines = [{"dataset": "x", "top1": top1} for top1 in (90, 90, 92)]
    (score,) = scores(merged(tmp_path, lines))
    assert (score.n, score.mean, score.deviation) == (3, 90.67, 1.15)


def test_results_may_be_one_dictionary_with_numbers_of_numpy(folder):
    write_card(folder, "me/x", results={"dataset": "x", "top1": np.float32(91.5)})
    assert json.loads((folder / RESULTS_NAME).read_text())[-1]["top1"] == 91.5


def test_a_fraction_is_doubted(tmp_path):
    with pytest.warns(UserWarning, match="given in %") as warned:
        merged(tmp_path, [{"dataset": "x\x1b[31m" + "y" * 1000, "top1": 0.912}])
    text = str(warned[0].message)
    assert text.isprintable(), "a stranger's name commands the terminal"
    assert len(text) < 250


@pytest.mark.parametrize(
    "results",
    [
        [{"top1": 3}],
        [{"dataset": "x"}],
        [{"dataset": "x", "top1": math.nan}],
        [{"dataset": "x", "top1": 912}],
        [7],
        "no.jsonl",
    ],
)
def test_results_that_are_none_are_refused(folder, results, refused):
    with refused(ConfigError, "results"):
        write_card(folder, "me/x", results=results)
    assert not (folder / CARD_NAME).exists()


def test_a_base_on_the_hub_is_named_as_what_was_adapted(folder):
    config = read_config(folder)
    config.seed, config.base_model_name_or_path, config.revision = None, "timm/some.weights", "0" * 40
    data = metadata(text := render("me/x", config, read_tensors(folder)))
    assert (data["base_model"], data["base_model_relation"]) == ("timm/some.weights", "adapter")
    assert "0" * 40 in text
    config.base_model_name_or_path = config.revision = None
    assert "base_model" not in metadata(text := render("me/x", config, read_tensors(folder)))
    assert "model=base" in text
    assert "base_model" not in metadata(render("me/x", read_config(folder), read_tensors(folder)))


# -- a card that is there


OURS = re.compile(r"<!-- bn-adapters:begin.*?-->\n.*<!-- bn-adapters:end \w+ -->\n", re.DOTALL)
BY_HAND = """license: mit
language: [en, de]
tags: [mine, timm]
datasets: imagenet-1k
metrics: [f1]
model-index:
- name: x
  results:
  - {task: {type: image-classification}, dataset: {name: d, type: d}, metrics: [{type: f1, value: 7.5}]}
"""


def test_what_a_person_wrote_around_the_section_and_into_the_metadata_stays(folder):
    write_card(folder, "me/x", tags=["own"])
    card = folder / CARD_NAME
    data = {**metadata(card.read_text()), **yaml.safe_load(BY_HAND)}
    section = OURS.search(card.read_text())[0]
    card.write_text(f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n# Mine\n\n{section}\n## Thanks\n\nto you\n")
    line = {"recipe": {"dataset": "uoft-cs/cifar10", "seed": 0}, "top1": 69.5}
    write_card(folder, "me/y", results=[line])
    text = card.read_text()
    before, after = OURS.split(text)
    assert (before.partition("\n---\n")[2], after) == ("# Mine\n\n", "\n## Thanks\n\nto you\n")
    assert "69.5 %" in OURS.search(text)[0]
    assert OURS.search(text)[0].count("# me/y") == 1
    now = metadata(text)
    assert (now["license"], now["language"]) == ("mit", ["en", "de"])
    assert set(now["tags"]) == {"timm", "peft", "bn-only", "image-classification", "mine"}
    assert now["datasets"] == ["uoft-cs/cifar10", "imagenet-1k"]
    assert set(now["metrics"]) == {"f1", "accuracy"}
    values = [result["metrics"][0]["value"] for entry in now["model-index"] for result in entry["results"]]
    assert sorted(values) == sorted(
        [7.5, 69.5, round(scores(json.loads((folder / RESULTS_NAME).read_text()))[0].top1, 2)]
    )
    write_card(folder, "me/y")
    assert card.read_text() == text, "written once more, it is the same"


def test_a_section_that_was_edited_is_not_overwritten(folder, refused):
    write_card(folder, "me/x")
    card = folder / CARD_NAME
    card.write_text(edited := card.read_text().replace("## Limits", "It fails at night.\n\n## Limits"))
    with refused(ConfigError, "edited by hand", "above or below the marks"):
        write_card(folder, "me/x")
    assert card.read_text() == edited
    card.write_text(edited.replace("It fails at night.\n\n", "  \n").replace("\n", "\r\n"))
    write_card(folder, "me/x", license="mit")  # spaces and ends of lines are no edit
    assert metadata(card.read_text())["license"] == "mit"


def test_a_card_without_marks_is_kept_above_the_section_unless_it_is_ours(folder):
    write_card(folder, "me/x")
    card, text = folder / CARD_NAME, (folder / CARD_NAME).read_text()
    without = re.sub("<!-- bn-adapters.*?-->\n", "", text)
    card.write_text(without)
    write_card(folder, "me/x")
    assert card.read_text() == text, "what an earlier version wrote gets marks"
    card.write_text("# My own words\n")
    with pytest.warns(UserWarning, match="its text is kept"):
        write_card(folder, "me/x")
    assert card.read_text().partition("\n---\n")[2] == f"# My own words\n\n{OURS.search(text)[0]}"
    assert metadata(card.read_text()) == metadata(text)


def test_metadata_that_cannot_be_read_is_not_overwritten(folder, refused):
    (folder / CARD_NAME).write_text(text := "---\nlicense: [mit\n---\nmine\n")
    with refused(ConfigError, "metadata", "mend the YAML"):
        write_card(folder, "me/x")
    assert (folder / CARD_NAME).read_text() == text


def test_an_earlier_base_and_earlier_accuracies_do_not_stay(folder):
    base = {"base_model": "timm/x", "base_model_relation": "adapter", "metrics": ["accuracy"]}
    write_card(folder, "me/x")
    (folder / RESULTS_NAME).unlink()
    text = (folder / CARD_NAME).read_text()
    (folder / CARD_NAME).write_text(text.replace("---\n", f"---\n{yaml.safe_dump(base)}", 1))
    write_card(folder, "me/x")
    now = metadata((folder / CARD_NAME).read_text())
    assert not {"base_model", "base_model_relation", "metrics", "model-index"} & now.keys()


def test_markdown_is_escaped():
    assert md("a|b*c_[d](e)<f>`g`\nh") == "a\\|b\\*c\\_\\[d\\](e)\\<f\\>\\`g\\` h"


def test_what_looks_like_a_token_never_reaches_a_card(folder):
    token = "hf_" + "aB3" * 11
    text = render(
        "me/x", read_config(folder), read_tensors(folder), [{"dataset": "d", "top1": 1, "command": f"T={token}"}]
    )
    assert token not in text
    assert "hf_***" in text


def test_the_snippet_runs_as_printed(folder, hub, tmp_path, monkeypatch, capsys):
    hub.users["me"], hub.tokens["hf_me"] = {"orgs": []}, ("me", "write")
    push_folder(folder, "me/digits-bn-only", token="hf_me")
    card = Path(hf_hub_download("me/digits-bn-only", CARD_NAME)).read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Image.new("RGB", (30, 20), "gray").save("image.png")
    exec(compile(snippet, "<card>", "exec"), {})
    assert capsys.readouterr().out.count("Prediction(label=") == 5
    assert any("digits-bn-only/resolve" in request.path for request in hub.requests)


def test_the_index_of_cards_names_every_card_with_its_own_accuracy():
    cards = {path.parent.name: path.read_text() for path in CARDS.glob("*/README.md")}
    rows = re.findall(
        r"^\| \[(.+?)\]\((.+?)\) .*\| ([\d.]+) % \| (\d+) \|$", (CARDS / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 3
    assert {name for name, *_ in rows} == set(cards)
    for name, link, top1, n in rows:
        assert link == f"{name}/README.md"
        assert f'load_bn_only_model("bn-affine-adapters/{name}"' in cards[name]
        (score,) = scores(json.loads((CARDS / name / RESULTS_NAME).read_text()))
        assert (score.top1, score.n) == (float(top1), int(n))
        metric = metadata(cards[name])["model-index"][0]["results"][0]["metrics"][0]
        assert (metric["value"], metric["args"]["n"]) == (score.top1, score.n)
        assert (CARDS / name / FIGURE_NAME).is_file()


def test_a_command_with_a_folder_of_its_own_says_so(folder):
    line = {"dataset": "d", "top1": 2, "command": "bn-adapters train dataset=PATH/TO/birds"}
    text = render("me/x", read_config(folder), read_tensors(folder), [line])
    assert "`PATH/TO/` stands for the folder of your own copy:\n\n```bash\nbn-adapters train dataset=PATH/TO" in text
    assert "stands for" not in render("me/x", read_config(folder), read_tensors(folder), [{**line, "command": "x"}])


def test_a_command_is_printed_as_it_was_run(folder):
    command = "accelerate launch recipes/train.py 'mean=[0.5, 0.5]' `date` | tee log"
    text = render("me/x", read_config(folder), read_tensors(folder), [{"dataset": "d", "top1": 2, "command": command}])
    assert f"```bash\n{command}\n```\n" in text
