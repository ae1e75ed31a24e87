"""BNOnlyConfig: an adapter's settings as a PEFT configuration."""

from dataclasses import dataclass

from peft import PeftConfig

from ..settings import Settings


@dataclass
class BNOnlyConfig(Settings, PeftConfig):  # noqa: D101  # documented where its fields are
    __doc__ = Settings.__doc__

    def __post_init__(self) -> None:
        """Let PEFT fill in its version, then check every value."""
        self.task_type = None  # PEFT would refuse ours
        PeftConfig.__post_init__(self)
        Settings.__post_init__(self)
