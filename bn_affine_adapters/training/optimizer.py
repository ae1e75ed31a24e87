"""The optimiser of a recipe: timm's, by its name there."""

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .recipe import Recipe

NAMES = {"sgd": "momentum"}  # plain momentum, as in the paper: timm's own sgd is Nesterov's


def create_optimizer(recipe: Recipe, network: nn.Module) -> Optimizer:
    """Return the optimiser of what trains in a network.

    Raises:
        ConfigError: timm cannot make it: it takes no such argument, or needs a package that is not installed.
    """
    # The list of what trains, and not the network: of a network timm takes the weight decay off every gamma and beta.
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    usual = {"lr": recipe.lr, "momentum": recipe.sgd_momentum, "weight_decay": recipe.weight_decay}
    try:
        return create_optimizer_v2(
            trained,
            NAMES.get(recipe.optimizer, recipe.optimizer),
            filter_bias_and_bn=False,
            **usual,
            **recipe.optimizer_args,
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"timm cannot make the optimiser {recipe.optimizer}.",
            seen=f"{type(error).__name__}: {error}; optimizer_args={recipe.optimizer_args}",
            do="leave out what it does not take, install what it needs, or choose optimizer=sgd",
        ) from error
