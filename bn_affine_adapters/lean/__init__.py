"""Lean training: what a network whose convolutions are frozen need not compute, or remember for backward."""

from .forward import plain_
from .known import LEVELS, Report
from .switch import lean_, saved_bytes

__all__ = ["LEVELS", "Report", "lean_", "plain_", "saved_bytes"]
