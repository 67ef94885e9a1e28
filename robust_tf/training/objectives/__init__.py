"""The objectives of adversarial training, one file for each.

* `madry`: the loss on adversarial images, and standard training without an attack.
* `trades`: TRADES.
* `awp`: adversarial weight perturbation, on top of Madry's loss or TRADES.
* `free`: free adversarial training.

To add an objective:

1. Write a subclass of `Objective` (see `base.py`) in a new file of this folder. Override the methods that differ:
   `inputs` makes the adversarial images, `forward` runs the network on them, `loss` returns the scalar to minimize. Set
   `knows_clean_figures = False` unless `inputs` calls `trainer.update_clean`. `trades.py` is a complete example.
2. Add the fields that select and configure it to `Recipe` in `recipe.py`, with their checks in `__post_init__`.
3. Build it in `build_objective`, below. `AdversarialTrainer(classifier, attack, recipe=Recipe(...))` then uses it.
4. To offer it in `python -m robust_tf.train`, add its name to the type `Objective`, its flags to `AdversarialConfig`
   and to `_RECIPE`, and its cost to `gradients_per_image`, all in `robust_tf/config/adversarial.py`. Pass the flags on
   in `job_recipe` in `robust_tf/job/building.py`, and describe them in `robust_tf/job/planning/table.py`.
5. Test it in `tests/training/test_objectives.py`.
"""

import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.errors import UserError
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
    "build_objective",
    "divergence",
    "moved_perturbation",
    "perturbed_weights",
    "weight_perturbation",
]


def build_objective(recipe: Recipe, trainer: Trainer, attack: AttackConfig) -> Objective:
    """Builds the objective that a recipe describes.

    Args:
        recipe: Choice of the objective and its parameters.
        trainer: Trainer that will minimize the objective.
        attack: Attack of the training batches. Without an active attack the objective is the compiled loss.

    Raises:
        UserError: The objective does not work with several replicas, and there are several.
    """
    if not attack.active:
        return StandardLoss()
    if recipe.free_replays:
        return FreeReplays(trainer, replays=recipe.free_replays, batch_size=recipe.free_batch_size)
    if recipe.trades_beta is not None:
        objective: Objective = Trades(recipe.trades_beta)
    else:
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if recipe.attack_mode == "training" and attack.steps > 1 and replicas > 1:
            raise UserError(
                "In training mode every step of the attack updates statistics that the replicas share, which cannot be "
                f"done in a loop. Received: attack_mode='training' and {attack.steps} steps on {replicas} "
                "replicas. Use one step, attack_mode='inference', or one device."
            )
        passes = attack.steps + attack.use_best  # `use_best` needs one more forward pass, for the last iterate
        objective = AdversarialLoss(
            attack_mode=recipe.attack_mode, attack_passes=passes, random_start=attack.random_start
        )
    if recipe.awp_gamma is None:
        return objective
    return AdversarialWeights(objective, gamma=recipe.awp_gamma, warmup_steps=recipe.awp_warmup_steps)
