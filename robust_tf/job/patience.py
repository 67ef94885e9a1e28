"""Early stopping: a run ends when the validation figure that chooses the epoch has not improved for some epochs."""

from typing import Any

import keras

from robust_tf.config.job import JobConfig
from robust_tf.console import console
from robust_tf.training.checkpoint import TrainingProgress


def epochs_without_gain(config: JobConfig, progress: TrainingProgress) -> int:
    """Epochs since the best one, or since the whole network began to train: a head's best says nothing about that."""
    unfrozen_at = config.unfreeze_at_epoch
    since = progress.best_epoch if unfrozen_at is None else max(progress.best_epoch, unfrozen_at - 1)
    return progress.epochs_done - 1 - since


def stopped_early(config: JobConfig, progress: TrainingProgress) -> bool:
    """Whether `--patience` ends the run before its last epoch; a run that is resumed then has nothing left to do."""
    if not config.patience or not 0 < progress.epochs_done < config.passes:
        return False
    return epochs_without_gain(config, progress) >= config.patience


def say_why(config: JobConfig, progress: TrainingProgress) -> None:
    """Tells the user of the early end of a run, and of the epoch that is kept."""
    count = epochs_without_gain(config, progress)
    console.print(
        f"Stopped early after epoch {progress.epochs_done} of {config.passes}: {count} epoch{'s' * (count != 1)} "
        f"without a better validation figure than {progress.best_value:.1%}, that of epoch {progress.best_epoch + 1}, "
        f"which is kept (--patience={config.patience})."
    )


class StopEarly(keras.callbacks.Callback):
    """Ends `fit` after an epoch that has used up the patience. Stands after the callback that saves the epoch.

    Args:
        config: of the job.
        progress: what the callback that saves keeps up to date.
    """

    def __init__(self, config: JobConfig, progress: TrainingProgress) -> None:
        super().__init__()
        self._config, self._progress = config, progress

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if stopped_early(self._config, self._progress):
            self.model.stop_training = True
