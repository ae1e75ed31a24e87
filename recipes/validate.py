"""Measure an adapter's accuracy: `accelerate launch recipes/validate.py adapter=FOLDER [key=value ...]`."""

from bn_affine_adapters.training.validate import main

if __name__ == "__main__":
    main()
