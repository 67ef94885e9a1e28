"""Unfreezing of layers in the middle of a training run."""

from collections.abc import Callable, Iterable

import keras

from robust_tf.config.transfer import FrozenBatchNorm, TransferMode
from robust_tf.errors import UserError
from robust_tf.training.optimizers import average_statistics
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
        recompile: Function that takes an optimizer, and compiles `model` with it and with the same loss and metrics as
            before.
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


def carry_over_optimizer_state(old: keras.optimizers.Optimizer, new: keras.optimizers.Optimizer) -> None:
    """Copies the state of the weights that both optimizers know. The state of the other weights stays fresh.

    A built optimizer accepts no further weights, so unfreezing needs a new optimizer. Momentum, Adam's moments, the
    step count, the learning rate and the loss scale are copied.

    Args:
        old: Optimizer that was used so far.
        new: Optimizer of the same class and name, built on the weights that will be trained.

    Raises:
        UserError: The classes or names differ, `new` is not built, or two weights share a name.
    """
    if not new.built:
        raise UserError("The new optimizer must be built first: new.build(model.trainable_variables).")
    states, fresh = _variables_by_name(old), _variables_by_name(new)
    if _step_counts(states) != _step_counts(fresh):
        raise UserError(
            "The state of an optimizer can only be copied to an optimizer of the same class and name. Received: "
            f"{type(old).__name__} {old.name!r} and {type(new).__name__} {new.name!r}. Create the new one with "
            "type(old).from_config(old.get_config())."
        )
    for name, variable in fresh.items():
        if name in states and states[name].shape == variable.shape:
            variable.assign(states[name])


def _variables_by_name(optimizer: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """Returns the optimizer's variables by name, "<optimizer>/<weight>_<slot>", however the optimizer is wrapped."""
    by_name: dict[str, keras.Variable] = {}
    for variable in optimizer.variables:
        name = "/".join(variable.path.split("/")[-2:])
        if name in by_name:
            raise UserError(
                f"The weights of the model must have different names. Received: {name!r} twice. Rename one of the "
                "layers."
            )
        by_name[name] = variable
    return by_name


def _step_counts(names: Iterable[str]) -> set[str]:
    """Returns the names "<optimizer>/iteration". Every optimizer has such a variable, whether it is wrapped or not."""
    return {name for name in names if name.endswith("/iteration")}
