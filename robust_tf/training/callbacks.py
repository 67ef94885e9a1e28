"""What happens around the epochs of a job: the state is saved, and a run that has gone wrong stops."""

import math
import time
from typing import Any

import keras

from robust_tf.errors import UserError
from robust_tf.training.checkpoint import Checkpoints, Progress


class SaveEpochs(keras.callbacks.Callback):
    """Saves the state after each epoch, and the weights of the best one.

    Args:
        checkpoints: where to.
        progress: of the run so far; goes on being updated.
        select_by: name in the epoch's logs of the figure to maximise, or None: every epoch is the best so far.
    """

    def __init__(self, checkpoints: Checkpoints, progress: Progress, *, select_by: str | None) -> None:
        super().__init__()
        self._checkpoints, self._progress, self._select_by = checkpoints, progress, select_by

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._since = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {name: float(value) for name, value in (logs or {}).items()}
        progress = self._progress
        value = float(epoch) if self._select_by is None else logs[self._select_by]
        loss = logs["val_loss"]
        # Ties are frequent on a small validation part: the lower loss decides them.
        is_best = (value, -loss) > (progress.best_value, -progress.best_loss)
        if is_best:
            progress.best_epoch, progress.best_value, progress.best_loss = epoch, value, loss
        now = time.perf_counter()
        progress.seconds += now - self._since
        self._since = now
        progress.epochs_done = epoch + 1
        progress.history.append(logs)
        self._checkpoints.save(progress, self.model.classifier, self.model.optimizer, is_best=is_best)


class StopOnNaN(keras.callbacks.Callback):
    """Ends the run at the first loss that is no finite number, before anything is saved.

    The loss of an epoch's last step is that before its update: what the update broke shows in the validation.
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._step = batch + 1
        self._check(logs, "loss", f"step {self._step}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check(logs, "val_loss", f"the validation after step {self._step}")

    def _check(self, logs: dict[str, Any] | None, name: str, where: str) -> None:
        loss = float((logs or {}).get(name, 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is no longer a finite number. Received: {name}={loss} in {where} of epoch "
                f"{self._epoch + 1}. The checkpoint of the last finished epoch is kept. Try a lower --learning_rate, "
                "--warmup_epochs=1, or --precision=float32, in a new --workdir."
            )
