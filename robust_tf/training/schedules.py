"""The learning rate over the course of training, as one Keras schedule that counts steps."""

import math
from typing import Any, get_args

import keras
import tensorflow as tf

from robust_tf.config.optimization import OptimizationConfig, ScheduleName
from robust_tf.errors import unknown_name

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@keras.saving.register_keras_serializable(package="robust_tf")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Multiplies the learning rate by a curve over the epochs (its shape) and by a linear warm-up.

    Example:
        >>> schedule = Schedule("step", learning_rate=0.1, steps_per_epoch=100, epochs=60, step_epochs=50)
        >>> [round(float(schedule(step)), 3) for step in (0, 4999, 5000)]
        [0.1, 0.1, 0.01]

    Args:
        kind: Shape. "constant"; "step": multiplied by `decay` every `step_epochs`; "piecewise": multiplied by `decay`
            at each of `milestones`; "cosine": half a cosine down to 0; "cyclic": linearly up to the peak and down to 0
            again (Wong et al. 2020, arXiv 2001.03994).
        learning_rate: Highest learning rate.
        steps_per_epoch: Number of updates of the weights in one epoch. It need not be an integer: accumulated gradients
            and free adversarial training can make it a fraction.
        epochs: Length of the training, in epochs.
        step_epochs: Number of epochs between two drops of "step".
        milestones: Epochs at which "piecewise" drops.
        decay: Factor of each drop of "step" and "piecewise".
        peak: Position of the peak of "cyclic", as a share of all steps.
        warmup_epochs: Number of epochs over which the learning rate rises linearly from 0, with any shape.

    Raises:
        UserError: There is no shape of that name.
    """

    def __init__(
        self,
        kind: str,
        *,
        learning_rate: float,
        steps_per_epoch: float,
        epochs: int,
        step_epochs: int = 50,
        milestones: tuple[int, ...] = (),
        decay: float = 0.1,
        peak: float = 4 / 15,
        warmup_epochs: float = 0.0,
    ) -> None:
        if kind not in SCHEDULES:
            raise unknown_name("learning-rate schedule", kind, SCHEDULES)
        self._config: dict[str, Any] = {
            "kind": kind,
            "learning_rate": learning_rate,
            "steps_per_epoch": steps_per_epoch,
            "epochs": epochs,
            "step_epochs": step_epochs,
            "milestones": tuple(milestones),
            "decay": decay,
            "peak": peak,
            "warmup_epochs": warmup_epochs,
        }

    def __call__(self, step: Any) -> tf.Tensor:
        """Returns the learning rate of one step, a float32 scalar; `step` counts from 0."""
        config = self._config
        step = tf.cast(step, tf.float32)
        warmup_steps = config["warmup_epochs"] * config["steps_per_epoch"]
        # Counted from 1, because the very first step should already learn.
        warmup = tf.minimum((step + 1.0) / warmup_steps, 1.0) if warmup_steps else 1.0
        return config["learning_rate"] * self._shape(step) * warmup

    def _shape(self, step: tf.Tensor) -> tf.Tensor:
        config = self._config
        if config["kind"] in ("step", "piecewise"):
            passed = tf.cast(step >= self._drops(), tf.float32)
            return tf.pow(config["decay"], tf.reduce_sum(passed))
        progress = tf.minimum(step / config["steps_per_epoch"] / config["epochs"], 1.0)
        if config["kind"] == "cosine":
            return 0.5 * (1.0 + tf.cos(math.pi * progress))
        if config["kind"] == "cyclic":
            peak = config["peak"]
            return tf.minimum(progress / peak, (1.0 - progress) / (1.0 - peak))
        return tf.ones_like(step)

    def _drops(self) -> tf.Tensor:
        """Returns the first step after each drop, float32.

        Drops are counted in steps, because dividing a step by a fractional number of steps per epoch may give slightly
        less than a whole epoch, due to rounding.
        """
        config = self._config
        epochs = config["milestones"]
        if config["kind"] == "step":
            epochs = range(config["step_epochs"], config["epochs"] + 1, config["step_epochs"])
        return tf.constant([math.ceil(epoch * config["steps_per_epoch"] - 1e-6) for epoch in epochs], tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, for Keras to save."""
        return dict(self._config)


def build_schedule(optimization: OptimizationConfig, steps_per_epoch: float, *, factor: float = 1.0) -> Schedule:
    """Builds the learning-rate schedule of a job.

    Args:
        optimization: Settings of the optimization.
        steps_per_epoch: Number of updates of the weights in one of `optimization.epochs`.
        factor: Factor for the learning rate.
    """
    return Schedule(
        optimization.lr_schedule,
        learning_rate=optimization.peak_learning_rate * factor,
        steps_per_epoch=steps_per_epoch,
        epochs=optimization.epochs,
        step_epochs=optimization.lr_step_epochs,
        milestones=optimization.lr_milestones,
        decay=optimization.lr_decay,
        peak=optimization.lr_peak,
        warmup_epochs=optimization.warmup_epochs,
    )
