"""Tables of bad input in the pages: the tests ask, and the pages say what the answer was."""

import os
import re
from pathlib import Path

import pytest

from bn_affine_adapters import BNAdapterError

DOCS = Path(__file__).parents[1] / "docs"


def check_answers(page, name, cases):
    """Compare a page's table with what the errors say; write it there where BNAA_WRITE is set.

    Args:
        page: in docs.
        name: of the table, in the comments around it.
        cases: (what is asked, in words; what asks it).
    """
    rows = ["| asked | answer |", "|---|---|"]
    for asked, call in cases:
        with pytest.raises(BNAdapterError) as caught:
            call()
        said = re.sub(r"(\d+\.){2}\d+\S*", "X.Y.Z", str(caught.value).splitlines()[0])
        rows.append(f"| {asked} | `{type(caught.value).__name__}`: {said} |")
    path = DOCS / page
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    text = path.read_text()
    assert len(pattern.findall(text)) == 1
    new = pattern.sub(lambda found: found[1] + "\n".join(rows) + "\n" + found[2], text)
    if os.environ.get("BNAA_WRITE"):
        path.write_text(new)
    assert new == text or os.environ.get("BNAA_WRITE"), "BNAA_WRITE=1 writes it"
