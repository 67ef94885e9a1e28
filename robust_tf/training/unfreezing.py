"""Unfreezing of layers in the middle of a training run."""

from collections.abc import Callable

import keras

from robust_tf.config.transfer import FrozenBatchNorm, TransferMode
from robust_tf.training.optimizers import average_statistics, carry_over_optimizer_state
from robust_tf.transfer.stages import freeze


def unfreeze(
    model: keras.Model,
    classifier: keras.Model,
    *,
    recompile: Callable[[keras.optimizers.Optimizer], None],
    mode: TransferMode = "full_network",
    through: str | None = None,
    batchnorm: FrozenBatchNorm = "frozen",
) -> None:
    """Changes which weights of a compiled model are trained. Weights that stay trainable keep their optimizer state.

    Args:
        model: Compiled model that is being trained: the classifier itself, or a model built on its layers.
        classifier: Model with the stages.
        recompile: Function that compiles `model` with the optimizer that it is given, and with the same loss and
            metrics as before.
        mode: What to train from now on, see `freeze`.
        through: Last frozen stage, see `freeze`.
        batchnorm: Treatment of frozen BatchNorm layers, see `freeze`.
    """
    freeze(classifier, mode=mode, through=through, batchnorm=batchnorm)
    used = model.optimizer
    with model.distribute_strategy.scope():
        optimizer = type(used).from_config(used.get_config())
        optimizer.build(model.trainable_variables)
        average_statistics(optimizer, classifier)
        carry_over_optimizer_state(used, optimizer)
        recompile(optimizer)


class UnfreezeAtEpoch(keras.callbacks.Callback):
    """Calls `unfreeze` at the beginning of one epoch of `fit`.

    A run that is resumed after that epoch must call `unfreeze` itself, before it restores the state of the optimizer.

    Args:
        epoch: Number of the epoch, counted from 0 as in `fit`.
        classifier: Model with the stages.
        recompile: Function that compiles the model, see `unfreeze`.
        mode: What to train from then on, see `freeze`.
        through: Last frozen stage, see `freeze`.
        batchnorm: Treatment of frozen BatchNorm layers, see `freeze`.
    """

    def __init__(
        self,
        epoch: int,
        classifier: keras.Model,
        *,
        recompile: Callable[[keras.optimizers.Optimizer], None],
        mode: TransferMode = "full_network",
        through: str | None = None,
        batchnorm: FrozenBatchNorm = "frozen",
    ) -> None:

        super().__init__()
        self.epoch = epoch
        self._unfreeze = lambda model: unfreeze(
            model, classifier, recompile=recompile, mode=mode, through=through, batchnorm=batchnorm
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Unfreezes if this is the epoch."""
        if epoch == self.epoch:
            self._unfreeze(self.model)
            # `compile` has just deleted the training function, which `fit` makes only once, before its first epoch.
            self.model.make_train_function()
