"""Early stopping: training ends when the validation metric that selects the epoch has not improved for some epochs."""

import dataclasses
from typing import Any

import keras

from robust_tf.config.job import JobConfig
from robust_tf.training.checkpoint import TrainingProgress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """The rule by which training ends early.

    Attributes:
        limit: Number of epochs without a better validation metric after which training ends; 0 never ends it early.
        num_epochs: Number of epochs of the whole training.
        unfreeze_at_epoch: Epoch from which the whole network trains, or None. The count starts again there, because the
            best metric of the head alone says nothing about the whole network.
    """

    limit: int
    num_epochs: int
    unfreeze_at_epoch: int | None = None

    def epochs_without_gain(self, progress: TrainingProgress) -> int:
        """Returns the number of epochs since the best one, or since the whole network began to train."""
        since = progress.best_epoch
        if self.unfreeze_at_epoch is not None:
            since = max(since, self.unfreeze_at_epoch - 1)
        return progress.epochs_done - 1 - since

    def is_exhausted(self, progress: TrainingProgress) -> bool:
        """Returns whether the patience is exhausted. Training then ends early, and resuming it trains no further."""
        if not self.limit or not 0 < progress.epochs_done < self.num_epochs:
            return False
        return self.epochs_without_gain(progress) >= self.limit

    def explanation(self, progress: TrainingProgress) -> str:
        """Returns a sentence that says why training ended early and which epoch is kept."""
        count = self.epochs_without_gain(progress)
        return (
            f"Stopped early after epoch {progress.epochs_done} of {self.num_epochs}: {count} epoch{'s' * (count != 1)} "
            f"without a better validation figure than {progress.best_value:.1%}. Epoch {progress.best_epoch + 1}, "
            f"which reached it, is kept (--patience={self.limit})."
        )


def patience_of(job: JobConfig) -> Patience:
    """Returns the patience of a job."""
    return Patience(
        limit=job.optimization.patience,
        num_epochs=job.data_epochs,
        unfreeze_at_epoch=job.transfer.unfreeze_at_epoch,
    )


class StopEarly(keras.callbacks.Callback):
    """Ends `fit` after the epoch that exhausts the patience. It must come after the callback that saves the epoch.

    Args:
        patience: Rule by which training ends early.
        progress: Progress of the training, which the callback that saves the epoch keeps up to date.
    """

    def __init__(self, patience: Patience, progress: TrainingProgress) -> None:
        super().__init__()
        self._patience, self._progress = patience, progress

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Asks `fit` to stop if the patience is exhausted."""
        if self._patience.is_exhausted(self._progress):
            self.model.stop_training = True
