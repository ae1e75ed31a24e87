"""Train norm parameters by a recipe: `accelerate launch recipes/train.py [NAME|FILE.yaml] [key=value ...]`."""

from bn_affine_adapters.training.train import main

if __name__ == "__main__":
    main()
