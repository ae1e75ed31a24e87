"""What every part is told, and its lines."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sharing.folder import writing


class NotEnoughTime(Exception):
    """An item was not done for lack of time; ``found`` is what is known by then."""

    def __init__(self, state: str, **found: Any) -> None:
        """Take the state, "skipped" or "cut", and what was found."""
        super().__init__(state)
        self.state, self.found = state, found


@dataclass(frozen=True)
class Options:
    """What a part's process is told."""

    out: str
    device: str
    data: str  # CIFAR-10: a Hub id or a folder
    toy: bool = False  # small networks and few steps: a rehearsal
    only: str = ""  # words, with commas between: items whose name has one
    deadline: float = float("inf")  # when the part ends, as `time.time` counts

    @property
    def lines(self) -> Path:
        """The file of lines."""
        return Path(self.out, "lines.jsonl")

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.time()

    def note(self, part: str, item: str, state: str, **found: Any) -> None:
        """Append a line about an item."""
        import torch

        name = torch.cuda.get_device_name() if self.device == "cuda" and torch.cuda.is_initialized() else self.device
        line = {"part": part, "item": item, "state": state, "toy": self.toy, "device": name, "at": time.time()}
        with writing(self.lines), self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | found, allow_nan=False) + "\n")

    def mend(self) -> None:
        """Remove the last line if it is torn: what wrote it was killed."""
        whole, newline, _ = self.lines.read_bytes().rpartition(b"\n")
        os.truncate(self.lines, len(whole + newline))

    def read(self, start: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the last line of each item, by part and item, of those from byte ``start`` on."""
        text = self.lines.read_bytes()[start:].decode() if self.lines.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return {(line["part"], line["item"]): line for line in lines if line["toy"] == self.toy}
