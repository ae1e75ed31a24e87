"""A griffe extension: examples in docstrings become code blocks, which Markdown would take for quotations."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)+", re.MULTILINE)


def fenced(text: str) -> str:
    """Put each doctest of a docstring, up to the next empty line, into a fence."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


class Examples(griffe.Extension):
    """Fence the examples of every object that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Show the docstring of `Settings`, which has the fields, at `BNOnlyConfig`."""
        if pkg.name == "bn_affine_adapters":
            pkg["adapter.method.BNOnlyConfig"].docstring = pkg["settings.Settings"].docstring
