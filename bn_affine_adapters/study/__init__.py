"""What was learned, and what it says of the paper's claims.

- ``architectures.py``: what an adapter of each architecture of timm trains, and how large its file is.
- ``networks.py``: gamma and beta, dead activations, accuracy against size; ``analyse.py``: the script.
- ``replicates.py``: result lines that differ only in their seeds; ``claims.py``: verdicts on the paper's claims.
- ``paper.yaml``: what the paper states; ``paper.py`` reads it.
- ``report.py``: writes docs/reproduction.md; ``report_figures.py``: the runs of each figure, ``figures.py``: draws it;
  ``report_tables.py``: the tables.
- ``costs.py``: operations and memory of a training step; ``pages.py``: sections that benchmarks write.
- ``gpu/``: checks, measurements and runs on a GPU within a bound of time.
"""
