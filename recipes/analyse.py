"""Analyse a trained network: `python recipes/analyse.py adapter=FOLDER [key=value ...]`."""

from bn_affine_adapters.study.analyse import main

if __name__ == "__main__":
    main()
