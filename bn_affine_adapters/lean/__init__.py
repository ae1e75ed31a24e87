"""Lean training: leave out what a network with frozen convolutions need not compute, or keep for backward.

- ``known.py``: the layers and activations that can be replaced; ``rewrite.py``: finds them in a network.
- ``forward.py``: the forward that then runs; ``dispatch.py``: lean or plain, decided at each call.
- ``batch_norm.py``, ``conv_pool.py``, ``row_norm.py``: the differentiable functions.
- ``backends/``: their operators, in PyTorch, C++ and Triton.
- ``switch.py``: turns it on and off, and tries it first.
"""

from .forward import plain_
from .known import LEVELS, Report
from .switch import lean_, saved_bytes

__all__ = ["LEVELS", "Report", "lean_", "plain_", "saved_bytes"]
