"""What the rest of the package knows of norm layers.

- ``find.py``: norm layers, head and shortcuts of a network, found by type (a new norm class of timm: `_TIMM_NORMS`);
  the names of gamma and beta; a wrapped network's names as those of the plain network.
- ``statistics.py``: batch statistics over all processes of a distributed run; when running statistics must not move.
- ``scale_shift.py``: scales and shifts of several copies of a norm layer, stacked.
- ``copies.py``: copies of a network's modules that share its tensors, to evaluate a network that others train.
"""

SCALE_SUFFIX = "_scale"  # of a module that holds a layer scale which trains
COPIES = "bn_only_layers"  # where a wrapped module keeps its per-adapter copies
