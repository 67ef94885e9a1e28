"""What happens around the steps of a job: its state is saved, and a run that has gone wrong stops."""

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
    """Within it the classifier has the moving averages of its weights, if the optimizer keeps any."""
    trainer.swap_averages()
    try:
        yield
    finally:
        trainer.swap_averages()


class CallbacksFromStep(keras.callbacks.CallbackList):
    """Callbacks of a `fit` that begins in the middle of an epoch: they see the numbers that the steps really have.

    Args:
        callbacks: to be called.
        first_step: of the epoch that `fit` runs, counted from 0.
        kwargs: of Keras's `CallbackList`.
    """

    def __init__(self, callbacks: list[keras.callbacks.Callback], *, first_step: int, **kwargs: Any) -> None:
        super().__init__(callbacks, add_history=True, **kwargs)
        self._first_step = first_step

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_train_batch_begin(batch + self._first_step, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_train_batch_end(batch + self._first_step, logs)


class SaveProgress(keras.callbacks.Callback):
    """Saves the state after each epoch, every so many steps or minutes, and when a signal asks for an end.

    It also measures and keeps the moving average of the weights instead of the weights, if the optimizer has one.

    Args:
        checkpoints: where to.
        progress: of the run so far; goes on being updated.
        select_by: name in the epoch's logs of the figure to maximise, or None: every epoch is the best so far.
        every_steps: steps between two saves within an epoch; None saves after no step.
        every_minutes: time between two saves within an epoch; 0 saves at no time.
        pending: the signal that has come, if any. The state is saved and `Interrupted` raised after the step that runs.
        rate: images a second in the training steps of the epoch that ends; 0 if this process has run none of them.
        distribution: the chief writes; all processes save and stop at the same step, whichever got the signal.
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
    ) -> None:
        super().__init__()
        self._checkpoints, self._progress, self._select_by, self._rate = checkpoints, progress, select_by, rate
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._pending, self._distribution = pending, distribution
        self._training_metrics: list[np.ndarray] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._since = self._saved = time.perf_counter()
        if self._progress.steps_done:
            self._training_metrics = self._metrics()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._progress.steps_done:  # Keras has just reset what the steps before this run had counted
            self._restore_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._progress.steps_done = batch + 1
        by_steps = self._every_steps is not None and (batch + 1) % self._every_steps == 0
        by_time = self._every_seconds > 0 and time.perf_counter() - self._saved >= self._every_seconds
        asked = self._distribution.any(by_time or self._pending.received)
        if by_steps or asked:
            self._save()
        if asked:
            self._stop_if_signalled()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Validation counts in the same metrics.
        self._training_metrics = self._metrics()
        self.model.swap_averages()

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._distribution.any(self._pending.received):
            return
        self.model.swap_averages()
        self._restore_metrics()
        self._save()
        self._stop_if_signalled()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self.model.swap_averages()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {name: float(value) for name, value in (logs or {}).items()}
        progress = self._progress
        value = float(epoch) if self._select_by is None else logs[self._select_by]
        loss = logs["val_loss"]
        # Ties are frequent on a small validation part: the lower loss decides them.
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
        now = time.perf_counter()
        self._progress.seconds += now - self._since
        state = named_arrays(self.model.state)  # in every process: the metrics are counted in all of them
        self._distribution.on_chief(lambda: self._checkpoints.save(self._progress, state))
        self._since, self._saved = now, time.perf_counter()

    def _stop_if_signalled(self) -> None:
        if self._distribution.any(self._pending.received):
            self._pending.raise_if_received()
            raise Interrupted(signal.SIGTERM)  # another process got it


class StopOnNaN(keras.callbacks.Callback):
    """Ends the run at the first loss that is no finite number, before anything is saved.

    The loss of an epoch's last step is that before its update: what the update broke shows in the validation.
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._check(logs, "loss", f"step {batch + 1}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check(logs, "val_loss", "the validation")

    def _check(self, logs: dict[str, Any] | None, name: str, where: str) -> None:
        loss = float((logs or {}).get(name, 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is no longer a finite number. Received: {name}={loss} in {where} of epoch "
                f"{self._epoch + 1}. The last checkpoint is kept. Try a lower --learning_rate, "
                "--warmup_epochs=1, or --precision=float32, in a new --workdir."
            )
