"""Rows of cells as a table: aligned columns for a terminal, Markdown for a page."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows with their columns aligned.

    >>> print(text_table([["network", "steps"], ["cifar_resnet14", "24"]]))
    network         steps
    cifar_resnet14  24
    """
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a head and rows as a Markdown table; line breaks become spaces, and ``|`` is escaped.

    >>> print(markdown_table(["network", "steps"], [["cifar_resnet14", 24]]))
    | network | steps |
    |---|---|
    | cifar_resnet14 | 24 |
    """
    return "\n".join([_markdown_row(head), "|---" * len(head) + "|", *map(_markdown_row, rows)])


def _markdown_row(cells: Sequence[object]) -> str:
    texts = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)
