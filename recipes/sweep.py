"""Run conditions x networks x replicates: `python recipes/sweep.py NAME|FILE.yaml [key=value ...]`."""

from bn_affine_adapters.training.sweep import main

if __name__ == "__main__":
    main()
