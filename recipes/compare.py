"""Compare ways to fine-tune: `python recipes/compare.py TASK ... [key=value ...] [--methods A,B]`."""

from bn_affine_adapters.training.compare import main

if __name__ == "__main__":
    main()
