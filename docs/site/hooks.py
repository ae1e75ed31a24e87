"""Hooks of the site: the start page comes from README.md, and links that leave docs/ become plain text."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
END = "<!-- end of the start page -->"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)([^)]+)\)")


def start_page(readme: str) -> str:
    """Return README.md up to its mark, with links as seen from docs/."""
    first, mark, _ = readme.partition(END)
    if not mark:
        raise ValueError(f"README.md has no line {END}")
    return first.replace("](docs/", "](")


def without_outside_links(markdown: str) -> str:
    """Turn links to files outside docs/ into their text: the site holds no code, and the project has no address yet."""
    return LINK.sub(lambda found: found[1] if found[2].startswith("../") else found[0], markdown)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Change a page before it is rendered."""
    if page.file.src_uri == "index.md":
        markdown = start_page((ROOT / "README.md").read_text(encoding="utf-8"))
    return without_outside_links(markdown)
