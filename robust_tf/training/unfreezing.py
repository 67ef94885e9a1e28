"""Unfreezing in the middle of a training run."""

from collections.abc import Callable

import keras

from robust_tf.training.optimizers import average_statistics, carry_over_optimizer_state
from robust_tf.config.transfer import FrozenBatchNorm, TransferMode
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
    """Changes what trains in a compiled model, and keeps the optimizer's state of the weights that go on training.

    Args:
        model: the compiled model that is being trained: the classifier itself, or one built on its layers.
        classifier: the model with the stages.
        recompile: compiles `model` with the optimizer it is given, and the same loss and metrics as before.
        mode, through, batchnorm: what trains from now on, see `freeze`.
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

    A run that is resumed after that epoch must call `unfreeze` itself, before it restores the optimizer's state.
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
        """`epoch` counts from 0, as `fit` does; for the other arguments see `unfreeze`."""
        super().__init__()
        self.epoch = epoch
        self._unfreeze = lambda model: unfreeze(
            model, classifier, recompile=recompile, mode=mode, through=through, batchnorm=batchnorm
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch == self.epoch:
            self._unfreeze(self.model)
            # `fit` makes the training function once, before its first epoch, and `compile` has just thrown it away.
            self.model.make_train_function()
