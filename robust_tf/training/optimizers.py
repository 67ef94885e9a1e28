"""Optimizers: SGD with PyTorch's update rule, Adam and AdamW, all with a separate learning rate for each stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_tf.errors import UserError, unknown_name
from robust_tf.transfer.stages import stage_of

# Variables that BatchNorm updates in its forward pass, not by gradients.
_STATISTICS = ("moving_mean", "moving_variance")


def _handle_of(variable: Any) -> tf.Tensor:
    """Returns the handle of a variable of Keras or TensorFlow; with several replicas, the one on this device."""
    return (variable.value if isinstance(variable, keras.Variable) else variable).handle


class _StatisticsAverages:
    """Pairs of a statistic and its moving average.

    The pairs are in a plain object, because Keras treats all variables in a list as variables of the optimizer itself.
    """

    def __init__(self, pairs: list[tuple[keras.Variable, keras.Variable]]) -> None:
        self.pairs = pairs


class _StagewiseOptimizer(keras.optimizers.Optimizer):
    """Base class of the optimizers of this module: adds weight decay, learning rates by stage, and moving averages.

    The `update_step` of a subclass calls `_adjusted` first and `_follow` last. Keras's own weight decay stays off
    (`self.weight_decay` is None), because it ignores the stages and is always decoupled from the gradient.
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
        """See `build_optimizer` for the arguments. `kwargs` go to the Keras optimizer."""
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
        """Creates the averages and looks up the weight decay and the multiplier of each weight."""
        if self.built:
            return
        super().build(variables)
        # Keras's own averages cannot be used: at its end, each `fit` overwrites the weights with them, and a run may
        # call `fit` several times.
        if self.average_decay:
            self._averages = self.add_optimizer_variables(variables, "average")
        for weight, average in self.averages:
            average.assign(weight)
        self._decays = [0.0 if v.name in self.no_weight_decay else self.decay for v in variables]
        self._multipliers = [self._multiplier(v.path) for v in variables]

    def average_statistics(self, statistics: Sequence[keras.Variable]) -> None:
        """Adds moving averages of other variables, such as BatchNorm's statistics. They start at the current values.

        Averaged weights need averaged statistics, since the current statistics only fit the current weights. The
        optimizer must be built.

        Args:
            statistics: Variables to average.
        """
        if not self.average_decay or self._statistics.pairs:
            return
        pairs = []
        for statistic in statistics:
            name = f"{statistic.path.replace('/', '_')}_average"
            # Every replica assigns the same value, so the mean over the replicas is that value.
            average = self.add_variable(statistic.shape, dtype=statistic.dtype, aggregation="mean", name=name)
            average.assign(statistic)
            pairs.append((statistic, average))
        self._statistics = _StatisticsAverages(pairs)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Updates the weights, then the averages of the statistics."""
        next_move = self.iterations + 1
        super().apply(grads, trainable_variables)
        if not self._statistics.pairs:
            return
        # While gradients are accumulated, neither the weights nor their averages change.
        moved = self.iterations >= next_move
        decay = keras.ops.where(moved, self._decay_of_averages(next_move - 1), 1.0)
        for statistic, average in self._statistics.pairs:
            average.assign(decay * average + (1.0 - decay) * statistic)

    def _get_current_learning_rate(self) -> Any:
        """Returns the learning rate of the next update.

        Keras calls its schedules with the number of batches, which is larger than the number of updates while gradients
        are accumulated. Here the schedule gets the number of updates.
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
                f"Learning-rate multipliers need layers that belong to a stage. Received: {path!r}, a weight that "
                "belongs to no stage. Name its layer 'stem_...', 'stage1_...', ... or 'head_...', or do not use "
                "`multipliers`."
            )
        return self.multipliers.get(stage, 1.0)

    def _adjusted(self, gradient: Any, variable: Any, learning_rate: Any) -> tuple[Any, Any]:
        """Applies weight decay and the multiplier; returns the gradient and the learning rate of this variable."""
        index = self._get_variable_index(variable)
        learning_rate = keras.ops.cast(learning_rate, variable.dtype) * self._multipliers[index]
        gradient = keras.ops.cast(gradient, variable.dtype)
        if self._decays[index] and self.decoupled_weight_decay:
            self.assign_sub(variable, learning_rate * self._decays[index] * variable)
        elif self._decays[index]:
            gradient = gradient + self._decays[index] * variable
        return gradient, learning_rate

    def _follow(self, variable: Any) -> None:
        """Updates the moving average of a weight. Call it after the weight has been updated."""
        if self._averages:
            average = self._averages[self._get_variable_index(variable)]
            decay = self._decay_of_averages(self.iterations)
            self.assign(average, decay * average + (1.0 - decay) * variable)

    def _decay_of_averages(self, moves: Any) -> Any:
        """Returns the decay of the averages. It is smaller at first, so that the initial weights are soon forgotten.

        Args:
            moves: Number of updates of the weights so far.

        Source: TensorFlow, tf.train.ExponentialMovingAverage, `num_updates`.
        """
        moves = keras.ops.cast(moves, "float32")
        return keras.ops.minimum(self.average_decay, (1.0 + moves) / (10.0 + moves))

    @property
    def averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Pairs of a variable and its moving average, first the trained weights, then the statistics.

        The list is empty without `average_decay`.
        """
        if not self._averages:
            return []
        return [*zip(self._trainable_variables, self._averages, strict=True), *self._statistics.pairs]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config: dict[str, Any] = super().get_config()
        return config | {
            "average_decay": self.average_decay,
            "weight_decay": self.decay,
            "no_weight_decay": list(self.no_weight_decay),
            "multipliers": dict(self.multipliers),
        }


@keras.saving.register_keras_serializable(package="robust_tf")
class PyTorchSGD(_StagewiseOptimizer):
    """Gradient descent with momentum, with the update rule of PyTorch's SGD.

    With the gradient g, the weight w and the buffer b (0 at the start), an update computes d = g + weight_decay * w,
    then b = momentum * b + d, then w = w - learning_rate * b. With `nesterov`, the last step is
    w = w - learning_rate * (d + momentum * b).

    `keras.optimizers.SGD` differs in two ways that change results: its buffer already includes the learning rate, so a
    drop in the rate takes full effect only after some steps, and its weight decay is decoupled from the gradient.
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
        """See `build_optimizer` for the arguments. `kwargs` go to `keras.optimizers.Optimizer`."""
        if not 0 <= momentum < 1:
            raise UserError(f"`momentum` must lie in [0, 1). Received: momentum={momentum}.")
        if nesterov and not momentum:
            raise UserError("`nesterov` needs a momentum above 0. Received: momentum=0.")
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.nesterov = nesterov

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates the momentum buffers."""
        if self.built:
            return
        super().build(variables)
        self._buffers = self.add_optimizer_variables(variables, "momentum") if self.momentum else []

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one weight."""
        direction, learning_rate = self._adjusted(gradient, variable, learning_rate)
        if self.momentum:
            buffer = self._buffers[self._get_variable_index(variable)]
            # One pass over the weights instead of five.
            tf.raw_ops.ResourceApplyMomentum(
                var=_handle_of(variable),
                accum=_handle_of(buffer),
                lr=learning_rate,
                grad=direction,
                momentum=keras.ops.cast(self.momentum, variable.dtype),
                use_nesterov=self.nesterov,
            )
        else:
            self.assign_sub(variable, learning_rate * direction)
        self._follow(variable)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return super().get_config() | {"momentum": self.momentum, "nesterov": self.nesterov}


@keras.saving.register_keras_serializable(package="robust_tf")
class StagewiseAdam(_StagewiseOptimizer, keras.optimizers.Adam):
    """Keras's Adam, with weight decay added to the gradient, and with a separate bias correction for each weight.

    Keras corrects the moments of all weights by the total number of steps. But a weight that is unfrozen later starts
    with moments of zero, and its first updates would be up to 6.6 times too large. So each weight counts its own steps.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates a step counter for each weight."""
        if self.built:
            return
        super().build(variables)
        self._steps = [self.add_variable((), name=f"{v.path.replace('/', '_')}_steps") for v in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one weight."""
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
    """Adam with decoupled weight decay: each update first shrinks the weights by learning_rate * weight_decay.

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
        name: Name of the optimizer: "sgd" (with PyTorch's update rule), "adam" or "adamw".
        learning_rate: Number above 0, or a Keras schedule.
        momentum: Momentum in [0, 1). For "adam" and "adamw" it is beta_1, the decay of the first moment.
        nesterov: Whether to use Nesterov momentum, for "sgd" only.
        weight_decay: Factor of at least 0. "sgd" and "adam" add weight_decay * w to the gradient (after clipping, as in
            PyTorch). In "adamw" it is decoupled from the gradient and multiplied by the learning rate of the weight. It
            acts on all trainable weights, including biases and the weights of BatchNormalization.
        no_weight_decay: Names of weights without decay, such as ("gamma", "beta", "bias").
        multipliers: Factors for the learning rate, by stage, for example {"stem": 0.1, "head": 10}. The default is 1.
        global_clipnorm: Largest L2 norm of the gradient of all weights together. A larger gradient is scaled down.
        accumulate_steps: Number of steps whose gradients are averaged for one update of the weights. The learning-rate
            schedule counts updates.
        average_decay: Decay in [0, 1) of moving averages of the trained weights; 0 keeps no averages. Each update
            computes average = decay * average + (1 - decay) * weight, with the decay
            min(average_decay, (1 + t) / (10 + t)) after t earlier updates. See also `average_statistics`.

    Raises:
        UserError: The name is unknown, a number is outside its range, or `nesterov` is used without "sgd".

    Example:
        >>> optimizer = build_optimizer("sgd", learning_rate=0.1, weight_decay=5e-4, multipliers={"head": 10.0})
        >>> optimizer.momentum, optimizer.multipliers
        (0.9, {'head': 10.0})
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
        raise UserError(f"`nesterov` is available for the optimizer 'sgd' only. Received: name={name!r}.")
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
    """Adds BatchNorm's statistics to the moving averages of an optimizer. A second call has no effect.

    Args:
        optimizer: Built optimizer, possibly inside a LossScaleOptimizer. One that keeps no averages is not changed.
        classifier: Network with the BatchNormalization layers. Frozen layers are included.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, _StagewiseOptimizer):
        optimizer.average_statistics([v for v in classifier.non_trainable_variables if v.name in _STATISTICS])


def averages_of(optimizer: keras.optimizers.Optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Returns pairs of a variable and its moving average; the list is empty if the optimizer keeps no averages.

    Args:
        optimizer: Any optimizer, possibly inside a LossScaleOptimizer.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.averages if isinstance(optimizer, _StagewiseOptimizer) else []
