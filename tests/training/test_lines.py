"""Result lines read from a file: each run once, and nothing that is torn, foreign or contradictory."""

import copy
import json

import pytest

from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.training.lines import TIMES, read_results

LINE = {
    "loss": 1.5,
    "top1": 50.0,
    "trained": 1120,
    "seconds": 3.0,
    "images_per_second": 100.0,
    "hardware": {"device": "cpu"},
    "versions": {"python": "3.11"},
    "commit": "abc",
    "command": "accelerate launch recipes/train.py",
    "recipe": {"seed": 1, "eval_every": 1},
    "epochs": [{"loss": 2.0, "top1": 40.0}, {"loss": 1.5, "top1": 50.0}],
}


@pytest.fixture
def written(tmp_path):
    """Write lines to a file; return its path."""

    def write(*lines, end="\n"):
        path = tmp_path / "results.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + end, encoding="utf-8")
        return path

    return write


def changed(**values):
    return copy.deepcopy(LINE) | values


def other():
    return changed(recipe={"seed": 2}, top1=60.0)


def test_lines_come_back_in_their_order(written):
    assert read_results(written(LINE, other())) == [LINE, other()]
    assert read_results(written(end="")) == []


def test_a_run_that_is_there_twice_counts_once_whatever_it_took(written):
    again = changed(seconds=9.0, images_per_second=1.0, hardware={}, versions={}, commit=None, command="")
    assert sum(again[key] != LINE[key] for key in TIMES) == len(TIMES) == 6
    assert read_results(path := written(LINE, other(), again)) == [LINE, other()]
    assert read_results(path, path) == [LINE, other()]


def test_how_often_a_run_was_evaluated_is_no_difference(written):
    rare = changed(recipe={"seed": 1, "eval_every": 2}, epochs=[{"loss": 2.0}, {"loss": 1.5, "top1": 50.0}])
    assert read_results(written(LINE, rare)) == [LINE]
    for epochs in ([{"loss": 2.1}, {"loss": 1.5, "top1": 50.0}], [{"loss": 2.0}]):
        with pytest.raises(ConfigError, match=r"line 1, and .*, line 2"):
            read_results(written(LINE, rare | {"epochs": epochs}))


def test_of_equal_lines_the_analysed_one_is_kept(written):
    analysed = changed(analysis={"near_zero": 3.0})
    for lines in ([LINE, analysed], [analysed, LINE], [LINE, analysed, LINE]):
        assert read_results(written(*lines)) == [analysed]


@pytest.mark.parametrize("change", [{"top1": 50.1}, {"trained": 1}, {"loss": None}, {"top5": 90.0}, {"epochs": []}])
def test_two_results_of_one_run_are_an_error_that_names_both_lines(written, refused, change):
    path = written(other(), LINE, changed(**change))
    with refused(ConfigError, "results.jsonl, line 2, and ", ", line 3", next(iter(change)), '{"seed": 1}'):
        read_results(path)


def test_two_analyses_of_one_run_that_differ_are_an_error(written, refused):
    with refused(ConfigError, "line 1, and ", "line 3", "analysis"):
        read_results(written(changed(analysis=1), other(), changed(analysis=2)))


@pytest.mark.parametrize(
    "line",
    ["", '{"top1": 1', "[]", '{"top1": 1}', '{"recipe": {}}', '{"recipe": 3, "top1": 1}', "[" * 100_000],
    ids=["empty", "cut", "list", "no recipe", "no accuracy", "recipe", "deep"],
)
def test_a_line_that_is_no_result_is_an_error_with_file_and_line(written, refused, line):
    with refused(ConfigError, "results.jsonl, line 2, is not the result of a run"):
        read_results(written(LINE, line, other()))


@pytest.mark.parametrize("length", [1, len(json.dumps(LINE))])
def test_a_torn_last_line_is_an_error_of_its_own(written, refused, length):
    with refused(ConfigError, "torn last line, 2", "without a newline"):
        read_results(written(other(), json.dumps(LINE)[:length], end=""))


def test_a_file_that_is_not_there_is_an_error(tmp_path, refused):
    with refused(ConfigError, "none.jsonl cannot be read"):
        read_results(tmp_path / "none.jsonl")
