"""Check the package on a GPU and measure it there: `python recipes/gpu.py --minutes 9 --out FOLDER [--dry-run]`."""

import sys

from bn_affine_adapters.cli import main

if __name__ == "__main__":
    main(["gpu-check", *sys.argv[1:]])
