"""What an adversarial step minimizes: one file for each objective, each a small class with the same few methods."""

from robust_tf.attacks import AttackConfig
from robust_tf.training.objectives.awp import AdversarialWeights, perturbed_weights, weight_perturbation
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer
from robust_tf.training.objectives.free import FreeReplays, moved_perturbation
from robust_tf.training.objectives.madry import AdversarialLoss, StandardLoss
from robust_tf.training.objectives.recipe import Recipe
from robust_tf.training.objectives.trades import Trades, ascend_divergence, divergence

__all__ = [
    "AdversarialLoss",
    "AdversarialWeights",
    "Batch",
    "FreeReplays",
    "Objective",
    "Outputs",
    "Recipe",
    "StandardLoss",
    "Trades",
    "ascend_divergence",
    "divergence",
    "moved_perturbation",
    "objective_of",
    "perturbed_weights",
    "weight_perturbation",
]


def objective_of(recipe: Recipe, trainer: Trainer, attack: AttackConfig) -> Objective:
    """Builds the objective that a recipe describes, for a trainer and its attack."""
    if not attack.active:
        return StandardLoss()
    if recipe.free_replays:
        return FreeReplays(trainer, replays=recipe.free_replays, batch_size=recipe.free_batch_size)
    if recipe.trades_beta is not None:
        objective: Objective = Trades(recipe.trades_beta)
    else:
        passes = attack.steps + attack.use_best  # the last iterate of `use_best` is one more forward pass
        objective = AdversarialLoss(
            attack_mode=recipe.attack_mode, attack_passes=passes, random_start=attack.random_start
        )
    if recipe.awp_gamma is None:
        return objective
    return AdversarialWeights(objective, gamma=recipe.awp_gamma, warmup_steps=recipe.awp_warmup_steps)
