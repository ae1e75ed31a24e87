"""Every code block of README.md and docs/ runs as printed."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import script
from PIL import Image

import bn_affine_adapters
from bn_affine_adapters.cli import main
from bn_affine_adapters.training.sweeps import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The commands that .ci/run itself runs, as printed.
SET_UP = ("pip install",)


def blocks(language):
    found = []
    for page in PAGES:
        code = [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]
        if code:
            found.append(pytest.param(code, id=page.name))
    return found


def test_the_pages_have_blocks_of_known_languages():
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds == {"python", "bash"}
    assert {param.id for param in blocks("python")} >= {"README.md", "quickstart.md", "how-it-works.md"}
    assert {param.id for param in blocks("bash")} >= {"README.md", "training.md", "contributing.md"}


@pytest.fixture
def me(hub, tmp_path, monkeypatch):
    """Where the pages are: an empty folder, and logged in on the Hub as `me`."""
    hub.users["me"] = {"orgs": []}
    hub.tokens["hf_me"] = ("me", "write")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.chdir(tmp_path)


def run_python(code):
    names = {"__name__": "__page__"}
    for text in code:
        exec(compile(text, "<page>", "exec"), names)


@pytest.mark.parametrize("code", blocks("python"))
def test_a_pages_python_runs_from_top_to_bottom(code, me, capsys):
    run_python(code)


def test_the_commands_of_the_sharing_page_run_after_its_python(me, capsys):
    text = (ROOT / "docs" / "sharing.md").read_text()
    run_python([code for kind, code in BLOCK.findall(text) if kind == "python"])
    Image.new("RGB", (40, 30)).save("cat.png")
    shutil.rmtree("plain")
    lines = [line for kind, code in BLOCK.findall(text) if kind == "bash" for line in code.splitlines()]
    assert {shlex.split(line)[1] for line in lines} == set(main.commands)
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_a_block_that_is_wrong_would_be_noticed():
    with pytest.raises(AssertionError):
        exec(compile("assert 1 == 2", "<page>", "exec"), {})


def check_script(line):
    """Parse a script's line with its own options, and read the file that it names."""
    _, path, *words = shlex.split(line)
    name = re.fullmatch(r"recipes/(\w+)\.py", path)[1]
    if name == "report":
        assert words == [], line  # a test of its own runs it
        return
    module = script(name)
    file = module.main.make_context(name, words).params["file"]
    read_sweep(file) if name == "sweep" else module.read_plan(file)


def check_launch(line):
    """Parse a launch line with the launcher's own parser, then the recipe's arguments with the recipe's own."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:])
    else:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
    assert (ROOT / parsed.training_script).is_file(), parsed.training_script
    if parsed.training_script == "recipes/train.py":
        import_module("bn_affine_adapters.training.train").read_recipe(parsed.training_script_args)


@pytest.mark.parametrize("code", blocks("bash"))
def test_a_pages_commands_are_run_by_ci_or_understood_by_their_programs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = 0
    for line in "".join(code).strip().splitlines():
        if not any(word in line for word in SET_UP):
            program = line.split()[0]
            assert program in ("accelerate", "ACCELERATE_USE_CPU=true", ".venv/bin/python", "bn-adapters", "python"), (
                line
            )
            if program == "python":
                check_script(line)
            elif program == "bn-adapters":
                assert line.split()[1] in main.commands, line
            elif program != ".venv/bin/python":
                check_launch(line)
        seen += 1
    assert seen


def test_every_example_in_a_docstring_prints_what_it_says(capsys):
    attempted = {}
    for info in pkgutil.walk_packages(bn_affine_adapters.__path__, "bn_affine_adapters."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, f"{info.name}: {capsys.readouterr().out}"
        attempted[info.name] = result.attempted
    files = [path for path in (ROOT / "bn_affine_adapters").rglob("*.py") if path.parent.name != "__pycache__"]
    assert len(attempted) == len(files) - 1  # the package itself has no example
    assert sum(count > 0 for count in attempted.values()) >= 7


def test_a_launch_line_with_an_unknown_key_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="epochs"):
        check_launch("accelerate launch recipes/train.py epoch=1")
    with pytest.raises(SystemExit):
        check_launch("accelerate launch --num_process_count 1 recipes/train.py")


def test_the_readmes_two_commands_are_those_that_ci_runs():
    marks = re.findall(r"^<!-- ci: (\w+) -->\n```bash\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in marks] == ["train", "test"]
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for _, command in marks)
    assert "for name in train test" in (ROOT / ".ci" / "run").read_text()


def test_links_between_pages_lead_somewhere():
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())]
    assert len(links) >= 10
    broken = [(page.name, target) for page, target in links if not (page.parent / target).exists()]
    assert not broken


def test_the_pages_name_no_path_of_one_machine():
    for page in PAGES:
        assert not re.search(r"(^|[\s(\"'=])/(root|work|home|tmp)/", page.read_text()), page.name
    assert os.sep == "/" or len(PAGES) > 5
