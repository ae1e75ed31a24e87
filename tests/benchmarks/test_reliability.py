"""The page on reliability says what the last run of each promise found, in the README's words."""

from xml.etree import ElementTree

import pytest
from conftest import script

reliability = script("benchmarks/reliability")


def test_the_page_is_written_from_the_last_runs():
    found = reliability.read()
    assert found.keys() <= reliability.PROMISES.keys()
    assert reliability.page(found) in (reliability.ROOT / "docs" / "reliability.md").read_text()
    for line in found.values():
        assert line["tests"]["passed"]
        assert not line["tests"]["failed"]


@pytest.mark.parametrize("name", reliability.PROMISES)
def test_a_promise_is_the_readmes_and_its_tests_are_there(name):
    promise = reliability.PROMISES[name]
    assert promise.words in (reliability.ROOT / "README.md").read_text()
    assert all((reliability.ROOT / test).exists() for test in promise.tests if test.startswith("tests"))
    variables = [part.split("=")[0] for part in promise.often.split()]
    text = "".join((reliability.ROOT / test).read_text() for test in promise.tests if test.endswith(".py"))
    assert all(f'"{variable}"' in text and f'"{variable}_SEED"' in text for variable in variables)
    assert {f"{variable}_SEED" for variable in variables} <= set(reliability.SEEDS)


def test_a_report_is_counted_by_outcome_and_by_what_the_tests_counted():
    text = """<testsuites><testsuite>
      <testcase time="1.5"><properties><property name="kills" value="50"/></properties></testcase>
      <testcase time="2.0"><properties><property name="kills" value="10"/></properties></testcase>
      <testcase time="0.1"><skipped/></testcase>
      <testcase time="0.1"><failure/></testcase>
      <testcase time="0.1"><error/></testcase>
    </testsuite></testsuites>"""
    counted = reliability.counted(ElementTree.fromstring(text))
    assert counted["tests"] == {"passed": 2, "failed": 2, "skipped": 1}
    assert counted["tries"] == {"kills": 60}
    assert counted["seconds"] == 4
