"""What a user calls.

- ``loading.py``: `get_bn_only_model` wraps a network, `load_bn_only_model` loads an adapter; `register` for PEFT.
- ``peft_model.py``: `BNOnlyPeftModel`, which saves, pushes, loads further adapters and counts parameters.
- ``recalibration.py``: `recalibrate` recomputes running statistics over a data set.
- ``adaptation.py``: `adapt_to` adapts an adapter to images without labels.
- ``images.py``: from a file to the pixels that a network gets, for training, evaluation and predict alike.
- ``prediction.py``: `predict` classifies an image.
"""

from .. import adapter as adapter  # first, so that PEFT is loaded and the method registered: see there
