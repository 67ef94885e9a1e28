"""Callbacks that save the state of a training run and stop a run that has diverged."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from robust_tf.errors import UserError
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress, named_arrays
from robust_tf.training.distribution import Distribution
from robust_tf.training.interruption import Interrupted, PendingSignal


@contextlib.contextmanager
def averages_in_place(trainer: Any) -> Iterator[None]:
    """Returns a context in which the classifier uses the moving averages of its weights, if the optimizer keeps any.

    Args:
        trainer: Trainer of the classifier.
    """
    trainer.swap_averages()
    try:
        yield
    finally:
        trainer.swap_averages()


class CallbacksFromStep(keras.callbacks.CallbackList):
    """A list of callbacks for a `fit` that begins in the middle of an epoch. The callbacks see the true step numbers.

    Args:
        callbacks: Callbacks to call.
        first_step: Number of the step of the epoch at which `fit` begins, counted from 0.
        **kwargs: Further arguments of Keras's `CallbackList`.
    """

    def __init__(self, callbacks: list[keras.callbacks.Callback], *, first_step: int, **kwargs: Any) -> None:
        super().__init__(callbacks, add_history=True, **kwargs)
        self._first_step = first_step

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Passes on the corrected number of the step."""
        super().on_train_batch_begin(batch + self._first_step, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Passes on the corrected number of the step."""
        super().on_train_batch_end(batch + self._first_step, logs)


class SaveProgress(keras.callbacks.Callback):
    """Saves the state after each epoch, at regular intervals within an epoch, and after a signal to stop.

    If the optimizer keeps moving averages of the weights, validation uses the averages, and so do the saved best
    weights.

    Args:
        checkpoints: Folder to save to.
        progress: Progress of the run so far. The callback keeps it up to date.
        select_by: Name of the logged metric that selects the best epoch; higher is better. With None the latest epoch
            is always the best.
        every_steps: Number of steps between two saves within an epoch. None turns these saves off.
        every_minutes: Minutes between two saves within an epoch. 0 turns these saves off.
        pending: The signal that has been received, if any. Once there is one, the state is saved after the current
            step, and `Interrupted` is raised.
        rate: Function that returns the training speed of the current epoch in images per second, or 0 if this process
            has run none of its steps.
        distribution: Distribution of the job. The chief writes the files. All processes save and stop after the same
            step, whichever of them received the signal.
        before_save: Function that is called before the state of a training step is saved, and that raises an error if
            it must not be saved.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        progress: TrainingProgress,
        *,
        select_by: str | None,
        every_steps: int | None,
        every_minutes: float,
        pending: PendingSignal,
        rate: Callable[[], float],
        distribution: Distribution,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._before_save = before_save
        self._checkpoints, self._progress, self._select_by, self._rate = checkpoints, progress, select_by, rate
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._pending, self._distribution = pending, distribution
        self._training_metrics: list[np.ndarray] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts the clocks, and remembers the restored metrics if the run continues in the middle of an epoch."""
        self._since = self._saved = time.perf_counter()
        if self._progress.steps_done:
            self._training_metrics = self._metrics()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restores the metrics if the run continues in the middle of an epoch."""
        if self._progress.steps_done:  # Keras has just reset the metrics of the earlier steps of this epoch
            self._restore_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves the state if an interval has passed, and stops after a signal."""
        self._progress.steps_done = batch + 1
        by_steps = self._every_steps is not None and (batch + 1) % self._every_steps == 0
        by_time = self._every_seconds > 0 and time.perf_counter() - self._saved >= self._every_seconds
        asked = self._distribution.any(by_time or self._pending.received)
        if by_steps or asked:
            self._save()
        if asked:
            self._stop_if_signalled()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Puts the averaged weights in place for the validation."""
        # The validation uses the same metrics as the training.
        self._training_metrics = self._metrics()
        self.model.swap_averages()

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """After a signal, saves the state from before the validation and stops."""
        if not self._distribution.any(self._pending.received):
            return
        self.model.swap_averages()
        self._restore_metrics()
        self._save()
        self._stop_if_signalled()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts the trained weights back."""
        self.model.swap_averages()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves the weights if they are the best so far, then the state, and stops after a signal."""
        logs = {name: float(value) for name, value in (logs or {}).items()}
        progress = self._progress
        value = float(epoch) if self._select_by is None else logs[self._select_by]
        loss = logs["val_loss"]
        # Ties are frequent on a small validation part, so the lower loss decides between them.
        if (value, -loss) > (progress.best_value, -progress.best_loss):
            progress.best_epoch, progress.best_value, progress.best_loss = epoch, value, loss
            with averages_in_place(self.model):
                weights = named_arrays(self.model.classifier.variables)
            self._distribution.on_chief(lambda: self._checkpoints.save_best(epoch, weights))
        progress.epochs_done, progress.steps_done = epoch + 1, 0
        progress.history.append({**logs, "learning_rate": float(self.model.optimizer.learning_rate)})
        if self._rate():
            progress.rates.append(round(self._rate(), 3))
        self._save()
        self._stop_if_signalled()

    def _metrics(self) -> list[np.ndarray]:
        return [np.array(variable) for variable in self.model.metrics_variables]

    def _restore_metrics(self) -> None:
        for variable, value in zip(self.model.metrics_variables, self._training_metrics, strict=True):
            variable.assign(value)

    def _save(self) -> None:
        self._before_save()
        now = time.perf_counter()
        self._progress.seconds += now - self._since
        state = named_arrays(self.model.state)  # in every process, because reading the metrics involves all of them
        self._distribution.on_chief(lambda: self._checkpoints.save(self._progress, state))
        self._since, self._saved = now, time.perf_counter()

    def _stop_if_signalled(self) -> None:
        if self._distribution.any(self._pending.received):
            self._pending.raise_if_received()
            raise Interrupted(signal.SIGTERM)  # another process received the signal


class StopOnNaN(keras.callbacks.Callback):
    """Stops the run with a `UserError` at the first loss that is NaN or infinite, before anything is saved.

    The loss of a step is measured before its update. If the update of the last step of an epoch breaks the weights,
    the validation loss shows it.

    A loss is read one step later than it is computed, because reading it waits for the device. This way a GPU already
    has the next step to compute while Python prepares the one after it.
    """

    _unread: tuple[int, Any] | None = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the number of the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks the training loss of the step before."""
        self.check()
        self._unread = (batch, (logs or {}).get("loss", 0.0))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks the training loss of the last step of the epoch."""
        self.check()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks the losses of the last step and of the validation."""
        self.check()
        self._check((logs or {}).get("val_loss", 0.0), "val_loss", "the validation")

    def check(self) -> None:
        """Checks the training loss of the latest step now. Call it before the state of that step is saved.

        Raises:
            UserError: The loss is NaN or infinite.
        """
        unread, self._unread = self._unread, None
        if unread is not None:
            self._check(unread[1], "loss", f"step {unread[0] + 1}")

    def _check(self, value: Any, name: str, where: str) -> None:
        loss = float(value)
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is no longer a finite number. Received: {name}={loss} in {where} of epoch "
                f"{self._epoch + 1}. The last checkpoint is kept. Try a lower learning_rate, warmup_epochs=1, or "
                "precision=float32, in a new workdir."
            )
