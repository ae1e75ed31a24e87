"""From (seed, name) to the same bits on every machine.

- ``draws.py``: the scheme `bnaffine-init-v1`: which numbers a seed and a name give.
- ``rules.py``: which distribution each tensor is drawn from (a tensor without a rule: `rule_for`, `parameter_rules`).
- ``generator.py``: draws of torch's own operators without its global generators.
- ``fingerprint.py``: sha256 over the frozen tensors, by which a rebuilt network is verified.
"""
