"""Every code block of README.md and docs/ runs as printed; every number, path and link in them is checked."""

import builtins
import doctest
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shlex
import shutil
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from test_house import ORDER

import bn_affine_adapters
from bn_affine_adapters import errors
from bn_affine_adapters.cli import main
from bn_affine_adapters.study.paper import PAPER
from bn_affine_adapters.study.replicates import read_runs
from bn_affine_adapters.training import compare
from bn_affine_adapters.training.recipe import find_config, read_recipe
from bn_affine_adapters.training.sweeps import read_sweep

ROOT = Path(__file__).parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "bn_affine_adapters"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEMPLATES = [*sorted(ROOT.glob("recipes/**/*.md")), *sorted(ROOT.glob("bn_affine_adapters/study/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The commands that .ci/run itself runs, as printed.
SET_UP = ("pip install",)
# Pages whose commands are run here, with the pages' Python; commands that would download, or were set up.
EXECUTED = ("sharing.md", "command-line.md", "your-images.md")
NOT_HERE = ("pip install", "bn-adapters train finetune", "accelerate launch")


def code(page, language):
    """Return the blocks of a page in a language."""
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def blocks(language, without=()):
    """Return pytest's parameters: the blocks of each page that has some."""
    found = {page.name: code(page, language) for page in PAGES if page.name not in without}
    return [pytest.param(texts, id=name) for name, texts in found.items() if texts]


def lines_of(texts):
    """Return the commands of bash blocks, each on one line."""
    joined = "".join(texts).replace("\\\n", " ")
    return [" ".join(line.split()) if "'" not in line else line for line in joined.strip().splitlines()]


def test_the_pages_have_blocks_of_known_languages():
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds == {"python", "bash"}
    python, bash = ({param.id for param in blocks(language)} for language in ("python", "bash"))
    assert python >= {"README.md", "quickstart.md", "how-to.md", "how-it-works.md", "lean.md", "troubleshooting.md"}
    assert bash >= {"README.md", "training.md", "contributing.md", *EXECUTED}


@pytest.fixture
def me(hub, tmp_path, monkeypatch):
    """Where the pages are: an empty folder, and logged in on the Hub as `me`."""
    hub.users["me"] = {"orgs": []}
    hub.tokens["hf_me"] = ("me", "write")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the commands would take all cores


def run_python(texts):
    names = {"__name__": "__page__"}
    for text in texts:
        exec(compile(text, "<page>", "exec"), names)


def run_commands(texts):
    """Run a page's bn-adapters commands in this process; return the names of the commands that ran."""
    ran = []
    for line in lines_of(texts):
        if not line.startswith(NOT_HERE):
            words = shlex.split(line)
            assert words[0] == "bn-adapters", line
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
            ran.append(words[1])
    return ran


@pytest.mark.parametrize("texts", blocks("python", without=("your-images.md",)))
def test_a_pages_python_runs_from_top_to_bottom(texts, me, monkeypatch, capsys):
    # The graph is captured as printed; compiling it takes a minute, and is tested elsewhere.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    run_python(texts)


def test_the_commands_of_the_sharing_page_run_after_its_python(me, capsys):
    page = DOCS / "sharing.md"
    run_python(code(page, "python"))
    Image.new("RGB", (40, 30)).save("cat.png")
    shutil.rmtree("plain")
    ran = run_commands(code(page, "bash"))
    others = {
        "architectures", "train", "validate", "configs", "sweep", "tune", "analyse", "gpu-check", "prune", "compare",
        "serve",
    }  # fmt: skip
    assert set(ran) == set(main.commands) - others


def test_the_commands_of_the_command_line_page_run(me):
    assert set(run_commands(code(DOCS / "command-line.md", "bash"))) == {
        "architectures",
        "configs",
        "train",
        "validate",
    }
    assert Path("runs/mine/adapter/adapter_model.safetensors").stat().st_size < 20_000


def test_the_page_on_own_images_runs_on_a_folder_of_pictures(me, capsys):
    colours = {"cat": (200, 120, 40), "dog": (40, 80, 200)}
    for split, numbers in {"train": range(1, 9), "test": range(101, 104)}.items():
        for name, colour in colours.items():
            folder = Path("pets", split, name)
            folder.mkdir(parents=True)
            for number in numbers:
                Image.new("RGB", (40 + number % 5, 30), tuple(c + number % 7 for c in colour)).save(
                    folder / f"{number:03}.jpg"
                )
    page = DOCS / "your-images.md"
    named = set(re.findall(r"`(pets/\S+\.jpg)`", page.read_text()))
    assert len(named) == 4
    assert all(Path(path).is_file() for path in named)
    assert run_commands(code(page, "bash")) == ["train", "validate", "predict", "predict", "push"]
    run_python(code(page, "python"))
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= set(colours)
    assert json.loads(Path("runs/pets/adapter/adapter_config.json").read_text())["label_names"] == ["cat", "dog"]


def test_a_block_that_is_wrong_would_be_noticed():
    with pytest.raises(AssertionError):
        run_python(["assert 1 == 2"])
    with pytest.raises(AssertionError, match="inspect nothing"):
        run_commands(["bn-adapters inspect nothing\n"])


def check_script(line):
    """Look for the launcher that a line of a checkout runs."""
    _, path, *words = shlex.split(line)
    assert (ROOT / path).is_file(), line
    assert (path, words) == ("recipes/report.py", []), line  # a test of its own runs it


def check_plan(name, words):
    """Parse a sweep's or a search's line with its own options, and read the file that it names."""
    module = importlib.import_module(f"bn_affine_adapters.training.{name}")
    file = module.command.make_context(name, words).params["file"]
    read_sweep(file) if name == "sweep" else module.read_tuning(file)


def check_comparison(words):
    """Parse a comparison's line with its own options, and read the recipe that it asks for."""
    given = compare.command.make_context("compare", words).params
    changes = [word for word in given["words"] if "=" in word]
    read_recipe(["--config", given["config"], *changes], find_config(given["config"]))
    assert {*given["methods"].split(",")} <= {*compare.METHODS}


def check_recipe(words):
    """Read the recipe that the arguments of a training command ask for."""
    read_recipe([word for word in words if word != "--json"], find_config("digits"))


def check_launch(line):
    """Parse a launch line with the launcher's own parser, then the recipe's arguments with the recipe's own."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:])
    else:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
    target = parsed.training_script
    if parsed.module:
        assert importlib.util.find_spec(target), target
    else:
        assert (ROOT / target).is_file(), target
    if target in ("recipes/train.py", "bn_affine_adapters.training.train"):
        check_recipe(parsed.training_script_args)


def check_command(line):
    """Understand a line of a bash block as its program does."""
    program, *words = line.split()
    if program == "bn-adapters":
        assert words[0] in main.commands, line
        if words[0] == "train":
            check_recipe(shlex.split(line)[2:])
        elif words[0] in ("sweep", "tune"):
            check_plan(words[0], words[1:])
        elif words[0] == "compare":
            check_comparison(shlex.split(line)[2:])
    elif program == "python":
        check_script(line)
    elif program in ("accelerate", "ACCELERATE_USE_CPU=true"):
        check_launch(line)
    else:
        assert program in (".venv/bin/python", "pre-commit"), line


@pytest.mark.parametrize("texts", blocks("bash"))
def test_a_pages_commands_are_run_by_ci_or_understood_by_their_programs(texts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.yaml").write_text("epochs: 1\n")
    lines = lines_of(texts)
    for line in lines:
        if not any(word in line for word in SET_UP):
            check_command(line)
    assert lines


def test_every_example_in_a_docstring_prints_what_it_says(capsys):
    attempted = {}
    for info in pkgutil.walk_packages(bn_affine_adapters.__path__, "bn_affine_adapters."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, f"{info.name}: {capsys.readouterr().out}"
        attempted[info.name] = result.attempted
    files = [path for path in (ROOT / "bn_affine_adapters").rglob("*.py") if path.parent.name != "__pycache__"]
    assert len(attempted) == len(files) - 1  # the package itself has no example
    assert sum(count > 0 for count in attempted.values()) >= 7


WRONG = {
    "accelerate launch recipes/train.py epoch=1": (ValueError, "epochs"),
    "bn-adapters train cifar10 leen=exact": (ValueError, "lean"),
    "bn-adapters train cifar11": (ValueError, "cifar10"),
    "bn-adapters trian": (AssertionError, "trian"),
    "accelerate launch -m bn_affine_adapters.training.trian": (AssertionError, "trian"),
    "accelerate launch --num_process_count 1 recipes/train.py": (SystemExit, "2"),
    "bn-adapters sweep no_such_sweep": (ValueError, "no_such_sweep"),
    "python recipes/reports.py": (AssertionError, "reports"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_would_be_noticed(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error, words = WRONG[line]
    with pytest.raises(error, match=words):
        check_command(line)


def test_the_readmes_two_commands_are_those_that_ci_runs():
    marks = re.findall(r"^<!-- ci: (\w+) -->\n```bash\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in marks] == ["train", "test"]
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for _, command in marks)
    script = (ROOT / ".ci" / "run").read_text()
    assert "for name in train test" in script
    assert "mkdocs build --strict -q -f .mkdocs.yml" in script


# Numbers.


def rows_of(text, head):
    """Return the rows of the Markdown table whose first line begins with ``head``, as lists of cells."""
    lines = text[text.index(f"\n| {head}") + 1 :].splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:end]]


LABELS = {
    "ResNet-14": "cifar_resnet14",
    "ResNet-56": "cifar_resnet56",
    "EfficientNet-Lite0, pretrained": "tf_efficientnet_lite0",
}
TRAINS = {
    "gamma, beta": "bn",
    "head": "head",
    "everything": "all",
    "gamma, beta, head": "bn+head, pretrained=true, pretrained_file=model.safetensors",
}


def result_lines(data, epochs, network, trains):
    """Return the plain runs among the result lines, those that compute the same: one of each pair of seeds."""
    cell = (data.lower().replace("-", ""), int(epochs), LABELS[network], TRAINS[trains])
    found = [
        run
        for run in read_runs(ROOT / "recipes" / "results", PAPER["recipes"])
        if (run.dataset.replace("-", ""), run.line["recipe"]["epochs"], run.network, run.named) == cell
    ]
    assert len({run.steps for run in found}) == 1, cell
    assert len({run.replicate for run in found}) == len(found), cell
    return [run.line for run in found]


def result_row(cells):
    """Return what a row of README's table of results has to say, from the result lines."""
    data, epochs, network, trains = cells[:4]
    lines = result_lines(data, epochs, network, trains)
    scores = [line["top1"] for line in lines]
    mean = f"{statistics.mean(scores):.2f}" + (f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else "")
    (size,) = {line.get("adapter_bytes", line.get("network_bytes")) for line in lines}
    (trained,) = {line["trained"] for line in lines}
    paper = PAPER["accuracy"].get(TRAINS[trains], {}).get(LABELS[network], "") if data == "CIFAR-10" else ""
    counts = [f"{trained:,}", mean, str(len(lines)), f"{size / 1000:.1f}"]
    return [*cells[:4], *counts, str(paper)]


def test_the_readmes_results_are_the_means_of_the_result_lines():
    rows = rows_of((ROOT / "README.md").read_text(), "data |")
    assert len(rows) >= 8
    assert rows == [result_row(row) for row in rows]


def test_a_wrong_result_would_be_noticed():
    row = ["digits", "40", "ResNet-14", "gamma, beta", "1,120", "97.66 ± 0.74", "3", "17.6", ""]
    assert result_row(row)[5] == "96.66 ± 0.74"


def test_the_readmes_sizes_are_measured(me, capsys):
    readme = (ROOT / "README.md").read_text()
    run_python(code(ROOT / "README.md", "python"))
    assert f"# {capsys.readouterr().out.strip()}\n" in readme
    assert "about 90 kB" in readme
    assert 85_000 < sum(path.stat().st_size for path in Path("my-adapter").iterdir()) < 95_000
    (row,) = rows_of((DOCS / "performance.md").read_text(), "network | adapter, bytes")
    assert f"{int(row[1]) / 1000:.0f} kB to download, its weights are {int(row[2]) / 1e6:.1f} MB" in readme


def test_the_picture_says_what_the_table_says():
    picture = (DOCS / "figures" / "idea.svg").read_text()
    row = rows_of((ROOT / "README.md").read_text(), "data |")[0]
    assert f">{row[7]} kB<" in picture
    assert f"{row[4]} of 175,258 parameters" in picture


# Tables that name what is in the code.


def test_the_troubleshooting_page_explains_every_error_once():
    text = (DOCS / "troubleshooting.md").read_text()
    found = re.findall(r"^(?:## .*: |\| `)(\w+Error)`?(?: \((\w+)\))?", text, re.MULTILINE)
    classes = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and name.endswith("Error")}
    assert len(classes) >= 24
    assert {name for name, _ in found} == classes.keys() - {"BNAdapterError"}
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert len(rows) == len(set(rows)) >= 20
    wrong = [(name, base) for name, base in found if base and not issubclass(classes[name], getattr(builtins, base))]
    assert not wrong


def test_the_command_line_page_names_every_command():
    named = [row[0].strip("`").split()[0] for row in rows_of((DOCS / "command-line.md").read_text(), "command |")]
    assert set(named) == set(main.commands)


def test_the_error_that_the_page_for_contributors_shows_is_real():
    text = (DOCS / "contributing.md").read_text()
    with pytest.raises(errors.UnknownKeyError) as raised:
        eval(re.search(r"raised by `(.+)`", text)[1], {"BNOnlyConfig": bn_affine_adapters.BNOnlyConfig})
    for part in ("what", "seen", "do"):
        assert f"\n- {part}: `{getattr(raised.value, part)}`\n" in text


def test_the_map_of_parts_is_that_of_the_layout_test():
    text = (DOCS / "contributing.md").read_text()
    named = [re.sub(r"`|/|\.py", "", row[0]) for row in rows_of(text, "part | holds")]
    assert named == [part for part in ORDER if part != "__init__"]


def paths_of(page):
    """Return the files and folders of the repository that a page names in backticks."""
    words = re.findall(r"`([\w.]+(?:/[\w.]+)*/?)`", page.read_text())
    parts = tuple(f"{part}/" for part in ORDER)
    return [
        word for word in words if word.startswith((*parts, "recipes/", "tests/", "docs/")) and not word.endswith("-")
    ]


def test_the_files_that_the_page_for_contributors_names_are_there():
    paths = paths_of(DOCS / "contributing.md")
    assert len(paths) >= 25
    missing = [path for path in paths if not ((ROOT / path).exists() or (PACKAGE / path).exists())]
    assert not missing


def test_the_version_and_the_paper_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == bn_affine_adapters.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert [reference["type"] for reference in citation["references"]] == ["conference-paper"]
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "mypy"}


# Markdown.


def long_lines(text):
    """Return the numbers of the lines over 120 characters; tables, links and a script's signature may be longer."""
    lines = enumerate(text.splitlines(), 1)
    return [n for n, line in lines if len(line) > 120 and not re.match(r"\||.*\]\(|Written by `|.*https?://", line)]


def test_lines_of_markdown_have_at_most_120_characters():
    pages = [*PAGES, *TEMPLATES, ROOT / "hub_cards" / "README.md"]
    assert len(pages) >= 23
    assert not {page.name: found for page in pages if (found := long_lines(page.read_text()))}


def test_a_long_line_would_be_noticed():
    word = "x" * 121
    assert long_lines(f"short\n{word}\n| {word} |\nsee [page]({word})\n") == [2]


def test_links_between_pages_lead_somewhere():
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())]
    assert len(links) >= 40
    broken = [(page.name, target) for page, target in links if not (page.parent / target).exists()]
    assert not broken


def test_the_pages_name_no_path_of_one_machine():
    for page in PAGES:
        assert not re.search(r"(^|[\s(\"'=])/(root|work|home|tmp)/", page.read_text()), page.name
    assert os.sep == "/" or len(PAGES) > 5


# The site. `mkdocs build --strict`, which .ci/run runs, checks the rest.


def site(name):
    """Import a hook of the site, which is no module of a package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sites_start_page_is_the_first_part_of_the_readme():
    hooks = site("hooks")
    page = hooks.start_page((ROOT / "README.md").read_text())
    assert page.startswith("# bn_affine_adapters\n")
    assert "](figures/idea.svg)" in page
    assert "](docs/" not in page
    assert {"train", "test"} == set(re.findall(r"<!-- ci: (\w+) -->", page))
    assert "## What it does" not in page
    with pytest.raises(ValueError, match="end of the start page"):
        hooks.start_page("# Another\n")


def test_links_that_leave_the_site_become_text():
    text = (
        "[code](../recipes/train.py), [page](lean.md#kernels), ![figure](figures/lean.png), [paper](https://arxiv.org)"
    )
    assert site("hooks").without_outside_links(text) == text.replace("[code](../recipes/train.py)", "code")


def test_examples_in_docstrings_become_code_blocks():
    fenced = site("docstrings").fenced("Add.\n\n>>> 1 + 1\n2\n\nMore.\n")
    assert fenced == "Add.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.\n"


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / ".mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in text for page in DOCS.glob("*.md"))
