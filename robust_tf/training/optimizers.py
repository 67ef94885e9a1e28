"""Optimizers: SGD as PyTorch does it, Adam and AdamW, each with a learning rate of its own for every stage."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from robust_tf.errors import UserError, unknown_name
from robust_tf.transfer.stages import stage_of

# Variables that BatchNorm moves in its forward pass, where no gradient reaches them.
_STATISTICS = ("moving_mean", "moving_variance")


class _StatisticsAverages:
    """Pairs of a statistic and its moving average.

    A plain object, because Keras takes every variable in a list of an optimizer for one of the optimizer's variables.
    """

    def __init__(self, pairs: list[tuple[keras.Variable, keras.Variable]]) -> None:
        self.pairs = pairs


class _StagewiseOptimizer(keras.optimizers.Optimizer):
    """What the optimizers of this module share: weight decay inside the update, and learning rates by stage.

    `update_step` of a subclass starts with `_adjusted`. Keras's own weight decay stays off (`self.weight_decay` is
    None): it knows nothing of the stages, and is decoupled from the gradient whatever the optimizer.
    """

    decoupled_weight_decay = False

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        *,
        weight_decay: float = 0.0,
        no_weight_decay: Sequence[str] = (),
        multipliers: Mapping[str, float] | None = None,
        average_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """See `build_optimizer` for the arguments; `kwargs` are those of the Keras optimizer below."""
        if not 0 <= average_decay < 1:
            raise UserError(f"`average_decay` must lie in [0, 1). Received: average_decay={average_decay}.")
        if weight_decay < 0:
            raise UserError(f"`weight_decay` must be at least 0. Received: weight_decay={weight_decay}.")
        for stage, multiplier in (multipliers or {}).items():
            if stage_of(f"{stage}_") != stage:
                raise unknown_name("stage in `multipliers`", stage, ["stem", "stage1", "stage2", "...", "head"])
            if not multiplier >= 0:
                raise UserError(f"A learning-rate multiplier must be at least 0. Received: {stage}={multiplier}.")
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.decay = weight_decay
        self.no_weight_decay = tuple(no_weight_decay)
        self.multipliers = dict(multipliers or {})
        self.average_decay = average_decay
        self._averages: list[keras.Variable] = []
        self._statistics = _StatisticsAverages([])

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        # Not Keras's own averages: `fit` puts those into the model when it ends, and a run may take several of them.
        if self.average_decay:
            self._averages = self.add_optimizer_variables(variables, "average")
        for weight, average in self.averages:
            average.assign(weight)
        self._decays = [0.0 if v.name in self.no_weight_decay else self.decay for v in variables]
        self._multipliers = [self._multiplier(v.path) for v in variables]

    def average_statistics(self, statistics: Sequence[keras.Variable]) -> None:
        """Keeps moving averages of these variables, too; they start at the present values. Needs a built optimizer.

        Averaged weights need the averages of BatchNorm's statistics: the latest ones belong to the latest weights.
        """
        if not self.average_decay or self._statistics.pairs:
            return
        pairs = []
        for statistic in statistics:
            name = f"{statistic.path.replace('/', '_')}_average"
            # Every replica assigns the same value, and their mean is that value.
            average = self.add_variable(statistic.shape, dtype=statistic.dtype, aggregation="mean", name=name)
            average.assign(statistic)
            pairs.append((statistic, average))
        self._statistics = _StatisticsAverages(pairs)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        next_move = self.iterations + 1
        super().apply(grads, trainable_variables)
        if not self._statistics.pairs:
            return
        # While gradients are accumulated, neither the weights nor their averages move.
        moved = self.iterations >= next_move
        decay = keras.ops.where(moved, self._decay_of_averages(next_move - 1), 1.0)
        for statistic, average in self._statistics.pairs:
            average.assign(decay * average + (1.0 - decay) * statistic)

    def _get_current_learning_rate(self) -> Any:
        """The learning rate of the next move of the weights.

        Keras gives its schedules the number of batches, which is larger than the number of moves while gradients are
        accumulated.
        """
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _multiplier(self, path: str) -> float:
        if not self.multipliers:
            return 1.0
        stage = stage_of(path.partition("/")[0])
        if stage is None:
            raise UserError(
                "Learning-rate multipliers need layers that belong to a stage. Received a weight of none: "
                f"{path!r}. Name its layer 'stem_...', 'stage1_...', ... or 'head_...', or leave `multipliers` out."
            )
        return self.multipliers.get(stage, 1.0)

    def _adjusted(self, gradient: Any, variable: Any, learning_rate: Any) -> tuple[Any, Any]:
        """The gradient and the learning rate of this variable, weight decay and multiplier included."""
        index = self._get_variable_index(variable)
        learning_rate = keras.ops.cast(learning_rate, variable.dtype) * self._multipliers[index]
        gradient = keras.ops.cast(gradient, variable.dtype)
        if self._decays[index] and self.decoupled_weight_decay:
            self.assign_sub(variable, learning_rate * self._decays[index] * variable)
        elif self._decays[index]:
            gradient = gradient + self._decays[index] * variable
        return gradient, learning_rate

    def _follow(self, variable: Any) -> None:
        """Moves the average of a weight towards the weight, which has just been updated."""
        if self._averages:
            average = self._averages[self._get_variable_index(variable)]
            decay = self._decay_of_averages(self.iterations)
            self.assign(average, decay * average + (1.0 - decay) * variable)

    def _decay_of_averages(self, moves: Any) -> Any:
        """Smaller in the first moves, so that the average soon forgets the weights that training started from.

        Args:
            moves: how often the weights had moved before.

        Source: TensorFlow, tf.train.ExponentialMovingAverage, `num_updates`.
        """
        moves = keras.ops.cast(moves, "float32")
        return keras.ops.minimum(self.average_decay, (1.0 + moves) / (10.0 + moves))

    @property
    def averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Each trained weight, then each averaged statistic, with its moving average; empty without `average_decay`."""
        if not self._averages:
            return []
        return [*zip(self._trainable_variables, self._averages, strict=True), *self._statistics.pairs]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "average_decay": self.average_decay,
            "weight_decay": self.decay,
            "no_weight_decay": list(self.no_weight_decay),
            "multipliers": dict(self.multipliers),
        }


@keras.saving.register_keras_serializable(package="robust_tf")
class PyTorchSGD(_StagewiseOptimizer):
    """Gradient descent with momentum, by the rule of PyTorch's SGD.

    With gradient g, weight w and buffer b (0 at the start): d = g + weight_decay * w; b = momentum * b + d;
    w = w - learning_rate * b, or w - learning_rate * (d + momentum * b) with `nesterov`.

    `keras.optimizers.SGD` differs in two ways that change results: its buffer contains the learning rate, so that a
    drop of the rate takes some steps to arrive, and its weight decay is decoupled.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        name: str = "pytorch_sgd",
        **kwargs: Any,
    ) -> None:
        """See `build_optimizer` for the arguments; `kwargs` are those of every Keras optimizer."""
        if not 0 <= momentum < 1:
            raise UserError(f"`momentum` must lie in [0, 1). Received: momentum={momentum}.")
        if nesterov and not momentum:
            raise UserError("`nesterov` needs a momentum above 0. Received: momentum=0.")
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.nesterov = nesterov

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._buffers = self.add_optimizer_variables(variables, "momentum") if self.momentum else []

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        direction, learning_rate = self._adjusted(gradient, variable, learning_rate)
        if self.momentum:
            buffer = self._buffers[self._get_variable_index(variable)]
            moved = self.momentum * buffer + direction
            self.assign(buffer, moved)
            direction = direction + self.momentum * moved if self.nesterov else moved
        self.assign_sub(variable, learning_rate * direction)
        self._follow(variable)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum, "nesterov": self.nesterov}


@keras.saving.register_keras_serializable(package="robust_tf")
class StagewiseAdam(_StagewiseOptimizer, keras.optimizers.Adam):
    """Keras's Adam, with weight decay added to the gradient, and bias correction by the steps of each weight.

    Keras corrects the moments for the number of all steps. A weight that is unfrozen late starts with moments of zero,
    and without a correction for its own first steps it would move up to 6.6 times too far in them.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._steps = [self.add_variable((), name=f"{v.path.replace('/', '_')}_steps") for v in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        gradient, learning_rate = self._adjusted(gradient, variable, learning_rate)
        steps = self._steps[self._get_variable_index(variable)]
        self.assign_add(steps, 1.0)
        learning_rate = learning_rate * self._bias_correction(steps) / self._bias_correction(self.iterations + 1)
        super().update_step(gradient, variable, learning_rate)
        self._follow(variable)

    def _bias_correction(self, steps: Any) -> Any:
        steps = keras.ops.cast(steps, "float32")
        return keras.ops.sqrt(1 - self.beta_2**steps) / (1 - self.beta_1**steps)


@keras.saving.register_keras_serializable(package="robust_tf")
class StagewiseAdamW(StagewiseAdam):
    """Keras's Adam, with weight decay that shrinks the weights by learning_rate * weight_decay before each update.

    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """

    decoupled_weight_decay = True


OPTIMIZERS: dict[str, type[_StagewiseOptimizer]] = {
    "sgd": PyTorchSGD,
    "adam": StagewiseAdam,
    "adamw": StagewiseAdamW,
}


def build_optimizer(
    name: str,
    *,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    no_weight_decay: Sequence[str] = (),
    multipliers: Mapping[str, float] | None = None,
    global_clipnorm: float | None = None,
    accumulate_steps: int = 1,
    average_decay: float = 0.0,
) -> keras.optimizers.Optimizer:
    """Builds one of `OPTIMIZERS`.

    Args:
        name: "sgd" (the rule of PyTorch), "adam" or "adamw".
        learning_rate: a number above 0, or a Keras schedule.
        momentum: in [0, 1); for "adam" and "adamw" it is beta_1, the decay of the first moment.
        nesterov: for "sgd" only.
        weight_decay: at least 0; added to the gradient as weight_decay * w by "sgd" and "adam" (after clipping, as
            in PyTorch), decoupled from it by "adamw", where it scales with the learning rate of the weight. It
            acts on all trainable weights, those of BatchNormalization and the biases too.
        no_weight_decay: names of weights without decay, such as ("gamma", "beta", "bias").
        multipliers: learning-rate multiplier by stage, e.g. {"stem": 0.1, "head": 10}; 1 where no other is given.
        global_clipnorm: the gradient of all weights together is scaled down to at most this L2 norm.
        accumulate_steps: the weights move once in so many steps, by the mean of their gradients; the learning-rate
            schedule counts the moves.
        average_decay: in [0, 1); above 0 the optimizer keeps an exponential moving average of every weight it trains:
            average = decay * average + (1 - decay) * weight after each move, with the decay
            min(average_decay, (1 + t) / (10 + t)) after t earlier moves. See also `average_statistics`.

    Raises:
        UserError: an unknown name, a number outside its range, or `nesterov` with another optimizer than "sgd".
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    if not callable(learning_rate):
        learning_rate = float(learning_rate)
        if not learning_rate > 0:
            raise UserError(f"`learning_rate` must be above 0. Received: learning_rate={learning_rate}.")
    if global_clipnorm is not None and not global_clipnorm > 0:
        raise UserError(f"`global_clipnorm` must be above 0. Received: global_clipnorm={global_clipnorm}.")
    if accumulate_steps < 1:
        raise UserError(f"`accumulate_steps` must be at least 1. Received: accumulate_steps={accumulate_steps}.")
    if not 0 <= momentum < 1:
        raise UserError(f"`momentum` must lie in [0, 1). Received: momentum={momentum}.")
    if nesterov and name != "sgd":
        raise UserError(f"`nesterov` belongs to the optimizer 'sgd'. Received: name={name!r}.")
    own = {"momentum": momentum, "nesterov": nesterov} if name == "sgd" else {"beta_1": momentum, "name": name}
    return OPTIMIZERS[name](
        learning_rate,
        weight_decay=weight_decay,
        no_weight_decay=no_weight_decay,
        multipliers=multipliers,
        global_clipnorm=global_clipnorm,
        gradient_accumulation_steps=accumulate_steps if accumulate_steps > 1 else None,
        average_decay=average_decay,
        **own,
    )


def average_statistics(optimizer: keras.optimizers.Optimizer, classifier: keras.Model) -> None:
    """Lets a built optimizer that averages the weights average BatchNorm's statistics, too; a second call does nothing.

    Args:
        optimizer: any; one that keeps no averages stays as it is. It may be within a LossScaleOptimizer.
        classifier: the network with the BatchNormalization layers, frozen ones included.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, _StagewiseOptimizer):
        optimizer.average_statistics([v for v in classifier.non_trainable_variables if v.name in _STATISTICS])


def averages_of(optimizer: keras.optimizers.Optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Each averaged variable with its moving average, also within a LossScaleOptimizer; empty where none are kept."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.averages if isinstance(optimizer, _StagewiseOptimizer) else []


def carry_over_optimizer_state(old: keras.optimizers.Optimizer, new: keras.optimizers.Optimizer) -> None:
    """Copies the state of `old` into `new` wherever both know the weight; the state of the other weights stays fresh.

    A used optimizer refuses weights that it was not built with, so unfreezing needs a new one. Momentum, Adam's
    moments, the step count, the learning rate and the loss scale go over.

    Args:
        old: the optimizer that trained so far.
        new: one of the same class and name, built on the weights that train from now on.

    Raises:
        UserError: the two are not of one class and name, `new` is not built, or two weights share a name.
    """
    if not new.built:
        raise UserError("The new optimizer must be built first: new.build(model.trainable_variables).")
    states, fresh = _variables_by_name(old), _variables_by_name(new)
    if _step_counts(states) != _step_counts(fresh):
        raise UserError(
            "The state of an optimizer goes over to one of the same class and name only. Received: "
            f"{type(old).__name__} {old.name!r} and {type(new).__name__} {new.name!r}. Make the new one with "
            "type(old).from_config(old.get_config())."
        )
    for name, variable in fresh.items():
        if name in states and states[name].shape == variable.shape:
            variable.assign(states[name])


def _variables_by_name(optimizer: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """The optimizer's variables by "<optimizer>/<weight>_<slot>"; how deep the optimizer is wrapped does not matter."""
    by_name: dict[str, keras.Variable] = {}
    for variable in optimizer.variables:
        name = "/".join(variable.path.split("/")[-2:])
        if name in by_name:
            raise UserError(
                f"Two weights of the model share a name. Received twice: {name!r}. Rename one of the layers."
            )
        by_name[name] = variable
    return by_name


def _step_counts(names: Iterable[str]) -> set[str]:
    """The one variable that every optimizer has, also inside a LossScaleOptimizer: "<optimizer>/iteration"."""
    return {name for name in names if name.endswith("/iteration")}
