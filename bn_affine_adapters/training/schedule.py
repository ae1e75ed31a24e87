"""The learning rate of every optimiser step."""

import math

from .recipe import Recipe


def lr_at(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of an optimiser step, the first being 0, ``steps`` of which make an epoch.

    Warm-up, cosine and milestones are factors, all counted from the first step. timm.scheduler does not serve: its
    milestones take effect one step early (m at t = m - 1), and its warm-up ignores the cosine.
    """
    warmup = recipe.warmup_epochs * steps
    factor = min(1.0, step / warmup) if warmup else 1.0
    if recipe.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / (recipe.epochs * steps)))
    drops = sum(step >= milestone * steps for milestone in recipe.milestones)
    return recipe.lr * factor * recipe.lr_decay**drops
