"""Choose hyper-parameters with Optuna: `python recipes/tune.py NAME|FILE.yaml [key=value ...]`."""

from bn_affine_adapters.training.tune import main

if __name__ == "__main__":
    main()
