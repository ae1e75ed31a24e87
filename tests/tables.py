"""Tables of bad input in the pages: the tests ask, and the pages say what the answer was."""

import os
import re
from pathlib import Path

import pytest

from bn_affine_adapters import BNAdapterError
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table

DOCS = Path(__file__).parents[1] / "docs"


def check_answers(page, name, cases):
    """Compare a page's table with what the errors say; write it there where BNAA_WRITE is set.

    Args:
        page: in docs.
        name: of the table, in the comments around it.
        cases: (what is asked, in words; what asks it).
    """
    rows = []
    for asked, call in cases:
        with pytest.raises(BNAdapterError) as caught:
            call()
        said = re.sub(r"(\d+\.){2}\d+\S*", "X.Y.Z", caught.value.what)  # the version of a library
        rows.append([asked, f"`{type(caught.value).__name__}`: {said}"])
    table = markdown_table(["asked", "answer"], rows)
    if os.environ.get("BNAA_WRITE"):
        write_section(DOCS / page, name, table)
    text = (DOCS / page).read_text()
    assert f"<!-- begin {name} -->\n\n{table}\n\n<!-- end {name} -->" in text, f"BNAA_WRITE=1 writes {page}"
