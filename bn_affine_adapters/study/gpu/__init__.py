"""What a GPU is asked: does the package work on it, how fast is a training step, what do runs in full give.

- ``gpu_check.py``: the command; gives each part its time, in a process of its own that is killed at its bound.
- ``child.py``: that process; does the items of a part one after another and writes a line about each.
- ``checks.py``, ``steps.py``, ``runs.py``: the items.
"""
