"""How the learning rate changes over training, as one Keras schedule counted in steps."""

import math
from typing import Any

import keras
import tensorflow as tf

from robust_tf.config.job import JobConfig
from robust_tf.errors import unknown_name

SCHEDULES = ("constant", "step", "piecewise", "cosine", "cyclic")


@keras.saving.register_keras_serializable(package="robust_tf")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """learning_rate x shape(epoch) x warm-up(epoch), the epoch being fractional for the smooth shapes.

    Args:
        kind: "constant"; "step": x `decay` every `step_epochs`; "piecewise": x `decay` at each of `milestones`;
            "cosine": half a cosine down to 0; "cyclic": linearly up to the peak at `peak` of all steps, and down to 0
            (Wong et al. 2020, arXiv 2001.03994).
        learning_rate: the highest value.
        steps_per_epoch: moves of the weights in one epoch; a fraction with accumulated gradients and in free training.
        epochs: length of the training.
        warmup_epochs: linear rise from 0 over so many epochs; the other shapes are multiplied by it.
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
        """The learning rate of one step, float32 scalar; `step` counts from 0."""
        config = self._config
        step = tf.cast(step, tf.float32)
        warmup_steps = config["warmup_epochs"] * config["steps_per_epoch"]
        # Counted from 1: the very first step should already learn.
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
        """The steps from which on the rate is multiplied by `decay` once more, float32.

        The quotient of a step and a fraction of steps per epoch may lie a rounding error below a whole epoch.
        """
        config = self._config
        epochs = config["milestones"]
        if config["kind"] == "step":
            epochs = range(config["step_epochs"], config["epochs"] + 1, config["step_epochs"])
        return tf.constant([math.ceil(epoch * config["steps_per_epoch"] - 1e-6) for epoch in epochs], tf.float32)

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)


def schedule_of(config: JobConfig, steps_per_epoch: int, *, factor: float = 1.0) -> Schedule:
    """The schedule that a job's flags describe, with `factor` on its learning rate.

    Args:
        steps_per_epoch: batches in one pass over the training part.
    """
    return Schedule(
        config.lr_schedule,
        learning_rate=peak_learning_rate(config) * factor,
        steps_per_epoch=optimizer_steps_per_epoch(config, steps_per_epoch),
        epochs=config.epochs,
        step_epochs=config.lr_step_epochs,
        milestones=config.lr_milestones,
        decay=config.lr_decay,
        peak=config.lr_peak,
        warmup_epochs=config.warmup_epochs,
    )


def optimizer_steps_per_epoch(config: JobConfig, steps_per_epoch: int) -> float:
    """Moves of the weights in one of `config.epochs`: free adversarial training packs several into each step."""
    return steps_per_epoch * config.replays * config.passes / (config.epochs * config.accumulate_steps)


def peak_learning_rate(config: JobConfig) -> float:
    """The highest learning rate of a job, scaled to its batch if the flags ask for that.

    Source: Goyal et al. 2017, arXiv 1706.02677, the linear scaling rule.
    """
    if config.base_batch_size is None:
        return config.learning_rate
    return config.learning_rate * config.batch_size * config.accumulate_steps / config.base_batch_size
