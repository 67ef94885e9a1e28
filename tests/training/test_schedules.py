"""The learning rate at the steps where it matters."""

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.training.schedules import Schedule


def rates(kind, steps, **options):
    schedule = Schedule(kind, learning_rate=0.4, steps_per_epoch=10, epochs=15, **options)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("kind", "options", "steps", "expected"),
    [
        ("constant", {}, [0, 149], [0.4, 0.4]),
        ("step", {"step_epochs": 5}, [0, 49, 50, 100, 149], [0.4, 0.4, 0.04, 0.004, 0.004]),
        ("step", {"step_epochs": 5, "decay": 0.5}, [50, 100], [0.2, 0.1]),
        ("piecewise", {"milestones": (3, 6)}, [29, 30, 59, 60], [0.4, 0.04, 0.04, 0.004]),
        ("cosine", {}, [0, 75, 150], [0.4, 0.2, 0.0]),
        ("cyclic", {"peak": 1 / 3}, [0, 25, 50, 100, 150], [0.0, 0.2, 0.4, 0.2, 0.0]),
        ("constant", {"warmup_epochs": 1.0}, [0, 4, 9, 10], [0.04, 0.2, 0.4, 0.4]),
        ("cosine", {"warmup_epochs": 0.5}, [0], [0.08]),
    ],
)
def test_value(kind, options, steps, expected):
    np.testing.assert_allclose(rates(kind, steps, **options), expected, atol=1e-6)


def test_reference_cyclic_peaks_at_four_fifteenths():
    values = rates("cyclic", range(150))
    assert int(np.argmax(values)) == 40


def test_drop_is_exact_far_into_a_long_training():
    """A rounding error in epoch = step / steps_per_epoch would move the drop by one step."""
    for steps_per_epoch in (7, 313, 2503, 10_010):
        schedule = Schedule("step", learning_rate=1.0, steps_per_epoch=steps_per_epoch, epochs=200, step_epochs=50)
        for drop in (1, 2, 3):
            step = 50 * drop * steps_per_epoch
            np.testing.assert_allclose(schedule(step), 0.1**drop, rtol=1e-5)
            np.testing.assert_allclose(schedule(step - 1), 0.1 ** (drop - 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulated"),
    # Here step / steps_per_epoch rounds to below the epoch, or epoch * steps_per_epoch rounds to above the step.
    [(15, 13, 3), (27, 13, 3), (27, 7, 3), (15, 25, 3)],
)
def test_drop_is_exact_with_a_fraction_of_steps_per_epoch(epochs, batches, accumulated):
    drop = epochs * batches // accumulated
    for kind, options in (("step", {"step_epochs": epochs}), ("piecewise", {"milestones": (epochs,)})):
        schedule = Schedule(
            kind, learning_rate=1.0, steps_per_epoch=batches / accumulated, epochs=epochs + 1, **options
        )
        np.testing.assert_allclose([schedule(drop - 1), schedule(drop)], [1.0, 0.1], rtol=1e-5)


def test_survives_serialization():
    schedule = Schedule("piecewise", learning_rate=0.4, steps_per_epoch=10, epochs=15, milestones=(3, 6))
    config = keras.optimizers.schedules.serialize(schedule)
    restored = keras.optimizers.schedules.deserialize(config)
    assert float(restored(30)) == float(schedule(30))


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'cosin'.*Did you mean 'cosine'"):
        Schedule("cosin", learning_rate=0.1, steps_per_epoch=1, epochs=1)
