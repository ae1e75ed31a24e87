"""Pages that a script writes: the place of its figures in them."""

import re
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a Markdown page.

    Raises:
        ValueError: the page has no such place, or more than one.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    place = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    changed, count = place.subn(lambda _: f"\n{text.strip()}\n\n", page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page} has {count} places {begin} ... {end}")
    page.write_text(changed, encoding="utf-8")
