"""Write an adapted network for tools that do not know this package.

- ``exporting.py``: `export` to timm's folder or PEFT's LN tuning; `export_network` for a network that trained whole.
- ``pruning.py``: remove channels that are constant; ``channels.py`` proves which are.
- ``graphs.py``: ONNX and torch.export, with the adapter inside or as inputs.
- ``compact.py``: write a compact file; fit its rounding. ``qr.py``: the file as a QR code.
"""
