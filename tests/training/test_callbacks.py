"""The callbacks of a training: what they read, and what they refuse to save."""

import types

import keras
import pytest

from robust_tf.errors import UserError
from robust_tf.training.callbacks import SaveProgress, StopOnNaN
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress
from robust_tf.training.distribution import start_distribution
from robust_tf.training.progress import ProgressBar


class Loss:
    """The loss of a step, which notes in a list that it has been read. Reading it would wait for the device."""

    def __init__(self, step: int, value: float, read: list[int]) -> None:
        self._step, self._value, self._read = step, value, read

    def __float__(self) -> float:
        self._read.append(self._step)
        return self._value

    def __format__(self, form: str) -> str:
        return format(float(self), form)


def test_the_loss_of_a_step_is_read_one_step_later():
    read: list[int] = []
    stop_on_nan, bar = StopOnNaN(), ProgressBar(num_images=40, batch_size=10, epochs=1, adversarial=False)
    callbacks: tuple[keras.callbacks.Callback, ...] = (stop_on_nan, bar)
    for callback in callbacks:
        callback.on_train_begin()
        callback.on_epoch_begin(0)
    for step in range(4):
        for callback in callbacks:
            callback.on_train_batch_end(step, {"loss": Loss(step, 1.0, read)})
        assert step not in read
        assert read.count(step - 1) == 2 * (step > 0)
    stop_on_nan.on_test_begin()
    bar.close()
    assert read.count(3) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_next_step_or_at_the_end_of_the_epoch(value):
    for ending in ("next step", "validation", "epoch"):
        callback = StopOnNaN()
        callback.on_epoch_begin(2)
        callback.on_train_batch_end(6, {"loss": value})
        with pytest.raises(UserError, match=rf"Received: loss={value} in step 7 of epoch 3\."):
            if ending == "next step":
                callback.on_train_batch_end(7, {"loss": 1.0})
            elif ending == "validation":
                callback.on_test_begin()
            else:
                callback.on_epoch_end(2, {"val_loss": 1.0})


def test_a_state_whose_loss_is_not_finite_is_not_saved(tmp_path):
    stop_on_nan = StopOnNaN()
    save = SaveProgress(
        Checkpoints(tmp_path),
        TrainingProgress(),
        select_by=None,
        every_steps=2,
        every_minutes=0.0,
        pending=types.SimpleNamespace(received=False),
        rate=lambda: 0.0,
        distribution=start_distribution("none"),
        before_save=stop_on_nan.check,
    )
    save.set_model(types.SimpleNamespace(state=[], metrics_variables=[]))
    stop_on_nan.on_epoch_begin(0)
    save.on_train_begin()
    for step, loss in enumerate([1.0, 0.9, 0.8]):
        stop_on_nan.on_train_batch_end(step, {"loss": loss})
        save.on_train_batch_end(step)
    (saved,) = tmp_path.iterdir()
    stop_on_nan.on_train_batch_end(3, {"loss": float("nan")})
    with pytest.raises(UserError, match="step 4 of epoch 1"):
        save.on_train_batch_end(3)
    assert list(tmp_path.iterdir()) == [saved]
