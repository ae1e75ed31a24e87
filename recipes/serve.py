"""Serve adapters of one network over HTTP: `python recipes/serve.py ADAPTER... [--prefix me/] [--port 8000]`."""

import sys

from bn_affine_adapters.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
