"""Train by recipe.

- ``recipe.py``: every key of a recipe with its default; ``RANGES`` of all keys; ``configs/``: the recipes, as YAML.
- ``ranges.py``: how a range is written and checked.
- ``train.py``, ``validate.py``, ``sweep.py``, ``tune.py``: the scripts; ``scripts.py``: what they share.
- ``loop.py``: the loop; ``schedule.py``: the learning rate; ``optimizer.py``; ``checkpoint.py``: how a run resumes.
- ``generators.py``: random states; ``stopping.py``: signals; ``lock.py``; ``divergence.py``: values not finite.
- ``network.py``: the network of a recipe; ``stacked.py``: several side by side; ``features.py``: a head alone.
- ``rounding.py``: train through the rounding of a compact file; start from an adapter.
- ``data.py``: images in memory or streamed; ``feed.py``: the batches of an epoch, accuracy; ``metrics.py``: top-k.
- ``sweeps.py``: the runs that a sweep's file asks for, which ``sweep.py`` does.
- ``lines.py``: write and read result lines; ``tables.py``: print rows of cells; ``terminal.py``: to any terminal.
- ``options.py``: the keys of all scripts; ``advice.py``: what an error advises, as a command line.
"""
