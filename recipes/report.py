"""Write docs/reproduction.md and its figures from the results: `python recipes/report.py`."""

from pathlib import Path

from bn_affine_adapters.study.report import main

if __name__ == "__main__":
    main(Path(__file__).parents[1])
