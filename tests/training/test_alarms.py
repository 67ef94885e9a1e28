"""Alarms are raised if adversarial training fails, and only then, and have the consequences that were chosen."""

import json
import pathlib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_tf import train
from robust_tf.attacks import AttackConfig
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job import fitting
from robust_tf.models import build_classifier, load_classifier
from robust_tf.training.alarms import Alarms, EndOnAlarm, Reading, TrainingAlarm, measure
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress, named_arrays
from robust_tf.training.distribution import start_distribution
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.trainer import AdversarialTrainer

FINE = Reading(fgsm_accuracy=0.6, pgd_accuracy=0.5, square_accuracy=0.7, zero_gradients=0.0)
OVERFITTED = FINE._replace(fgsm_accuracy=0.9, pgd_accuracy=0.1)
EPSILON = 0.1
ATTACK = AttackConfig(norm="linf", epsilon=EPSILON, step_size=EPSILON, steps=1)


def measured(model) -> Reading:
    """Measurements on 32 images with values around 0.5, all of class 1."""
    images = tf.constant(np.random.default_rng(0).uniform(0.49, 0.5, (32, 4, 4, 3)), tf.float32)
    values = measure(model, images, tf.ones(32, tf.int32), ATTACK)
    return Reading(*(float(value) for value in values))


def two_logits(margin: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.zeros_like(margin), margin], axis=-1)


def test_a_linear_model_raises_no_alarm():
    def linear(images: tf.Tensor) -> tf.Tensor:
        return two_logits(tf.reduce_mean(images, axis=(1, 2, 3)) - 0.42)

    reading = measured(linear)
    assert reading.alarms == []
    assert reading == Reading(0.0, 0.0, reading.square_accuracy, 0.0)  # one step is as strong as ten


def test_a_model_that_withstands_only_the_full_step_is_overfitted():
    def dipped(images: tf.Tensor) -> tf.Tensor:
        moved = 0.5 - tf.reduce_mean(images, axis=(1, 2, 3))
        return two_logits((moved - EPSILON / 2) ** 2 - (EPSILON / 4) ** 2)  # negative only halfway

    reading = measured(dipped)
    assert (reading.fgsm_accuracy, reading.pgd_accuracy) == (1.0, 0.0)
    assert [alarm.split(":")[0] for alarm in reading.alarms] == ["catastrophic overfitting"]
    assert "100% under FGSM but 0% under PGD-10" in reading.alarms[0]


def test_a_model_without_a_gradient_raises_the_alarm_of_gradient_masking():
    def masked(images: tf.Tensor) -> tf.Tensor:
        return two_logits(tf.reduce_mean(tf.round(images * 255) / 255, axis=(1, 2, 3)) - 0.47)  # round: no gradient

    reading = measured(masked)
    assert reading.zero_gradients == 1.0 and reading.pgd_accuracy == 1.0 and reading.square_accuracy < 0.5
    assert [alarm.split(":")[0] for alarm in reading.alarms][0] == "gradient masking"
    assert "cannot change 100% of the images" in reading.alarms[1]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 0),
        ({"fgsm_accuracy": 0.9, "pgd_accuracy": 0.46}, 0),  # a large difference, but PGD leaves more than half
        ({"fgsm_accuracy": 0.15, "pgd_accuracy": 0.0}, 0),  # an early epoch
        ({"fgsm_accuracy": 0.9, "pgd_accuracy": 0.4}, 1),
        ({"square_accuracy": 0.42}, 0),
        ({"square_accuracy": 0.39}, 1),
        ({"zero_gradients": 0.05}, 0),
        ({"zero_gradients": 0.15}, 1),
    ],
)
def test_thresholds(changes, count):
    assert len(FINE._replace(**changes).alarms) == count


# In a job ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, data_dir, monkeypatch):
    """Makes small jobs whose measurements are replaced by the given ones and, after these, by FINE."""

    def make(*script: Reading, **changes) -> JobConfig:
        readings = iter(script)
        monkeypatch.setattr(Alarms, "reading", lambda self: next(readings, FINE))
        return JobConfig.from_flags(
            workdir=str(tmp_path / "job"),
            data_dir=str(data_dir),
            architecture="resnet8",
            image_size=8,
            classes=(0, 1, 2),
            examples_per_class=24,
            norm="l2",
            epsilon=0.5,
            attack_steps=1,
            eval_steps=1,
            batch_size=24,
            lr_schedule="constant",
            learning_rate=0.05,
            **{"epochs": 3, **changes},
        )

    return make


def finished(config: JobConfig) -> tuple[dict, list[dict[str, float]]]:
    """results.json and the history of the epochs."""
    workdir = pathlib.Path(config.run.workdir)
    progress = Checkpoints(workdir / "checkpoints").latest().progress
    return json.loads((workdir / "results.json").read_text()), progress.history


def chart(config: JobConfig, part: str, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(f"{config.run.workdir}/tensorboard/{part}", size_guidance={"tensors": 0}).Reload()
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]


def test_the_check_uses_the_averaged_weights_if_there_are_any():
    classifier = keras.Sequential([keras.Input((2, 2, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    classifier.compile(build_optimizer("sgd", learning_rate=0.1, average_decay=0.5), "mse")
    trainer = AdversarialTrainer(classifier, ATTACK)
    trainer.compile(classifier.optimizer, "mse")
    trainer.optimizer.build(classifier.trainable_variables)
    bias = classifier.layers[-1].bias
    bias.assign([0.0, 9.0, 0.0])  # its average is still 0
    alarms = Alarms(
        classifier,
        held_out=(np.zeros((4, 2, 2, 3), np.float32), np.ones(4, np.int32)),
        attack=ATTACK,
        every_epochs=1,
        history=[],
    )
    alarms.set_model(trainer)
    seen = []
    alarms.reading = lambda: seen.append(bias.numpy()) or FINE
    alarms.on_epoch_end(0)
    np.testing.assert_array_equal(seen, np.zeros((1, 3)))
    np.testing.assert_array_equal(bias, [0.0, 9.0, 0.0])


@pytest.mark.slow
def test_a_warning_changes_nothing(job, capsys):
    config = job(FINE, OVERFITTED, epochs=2)
    train.run(config)
    results, history = finished(config)
    assert len(history) == 2
    assert len(results["alarms"]) == 1 and results["alarms"][0].startswith("WARNING after epoch 2: catastrophic")
    assert results["alarms"][0] in capsys.readouterr().out
    gaps = chart(config, "validation", "epoch/fgsm_pgd_gap")
    assert gaps == [(0, pytest.approx(0.1)), (1, pytest.approx(0.8))]
    assert chart(config, "validation", "epoch/zero_gradients")[0] == (0, 0.0)
    assert chart(config, "validation", "epoch/pgd_square_gap")[0] == (0, pytest.approx(-0.2))


@pytest.mark.slow
def test_the_check_can_run_less_often(job):
    config = job(OVERFITTED, epochs=3, alarm_every_epochs=2)
    train.run(config)
    results, _ = finished(config)
    assert [alarm[:21] for alarm in results["alarms"]] == ["WARNING after epoch 2"]
    assert [epoch for epoch, _ in chart(config, "validation", "epoch/fgsm_pgd_gap")] == [1]


@pytest.mark.slow
def test_stop_ends_the_training_and_keeps_the_epoch_before(job, capsys):
    config = job(FINE, OVERFITTED, on_alarm="stop")
    train.run(config)
    results, history = finished(config)
    assert results["best_epoch"] == 1 and len(history) == 1
    assert "epoch 1, the best before the alarm, is kept" in capsys.readouterr().out
    best = np.load(pathlib.Path(config.run.workdir) / "checkpoints" / "best_epoch0000.npz")
    classifier = load_classifier(pathlib.Path(config.run.workdir) / "classifier.keras")
    np.testing.assert_array_equal(best["0000 " + classifier.variables[0].name], classifier.variables[0].numpy())


@pytest.mark.slow
def test_rollback_repeats_the_epoch_with_a_lower_learning_rate(job, tmp_path, capsys):
    """This rollback also undoes the unfreezing, which happens again in the second attempt."""
    source = build_classifier("resnet8", 3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
    source.save(tmp_path / "source.keras")
    config = job(FINE, OVERFITTED, FINE, on_alarm="rollback", epochs=2).with_flags(
        task="transfer",
        source=str(tmp_path / "source.keras"),
        classes=(3, 4, 5),
        architecture="",
        unfreeze_at_epoch=1,
    )
    train.run(config)
    results, history = finished(config)
    assert len(history) == 2 and len(results["alarms"]) == 1
    assert "back to the end of epoch 1" in capsys.readouterr().out
    rates = chart(config, "train", "epoch/learning_rate")
    assert [step for step, _ in rates] == [0, 1, 1]
    np.testing.assert_allclose([rate for _, rate in rates], [0.05, 0.05, 0.005], rtol=1e-5)
    # A run that is killed at this point must continue with the lower rate.
    assert Checkpoints(pathlib.Path(config.run.workdir) / "checkpoints").latest().progress.rollbacks == 1


def fake_fit(monkeypatch, *, alarm_from_epoch: int) -> list[int]:
    """Replaces training by attempts that end with an alarm in this epoch, counted from 1; returns their rollbacks."""
    tries: list[int] = []

    def train_once(fit):
        checkpoints, classifier = fit.checkpoints, fit.classifier
        state = checkpoints.latest()
        progress = state.progress if state else TrainingProgress()
        tries.append(progress.rollbacks)
        weights = named_arrays(classifier.variables)
        if not progress.epochs_done:
            checkpoints.save(progress, weights)
        if not progress.epochs_done and alarm_from_epoch > 1:
            progress.epochs_done, progress.best_epoch = 1, 0
            checkpoints.save_best(0, weights)
            checkpoints.save(progress, weights)
        progress.alarms.append(f"WARNING after epoch {alarm_from_epoch}")
        return progress, True

    monkeypatch.setattr(fitting, "_train", train_once)
    return tries


def test_rollback_gives_up_after_three(monkeypatch, tmp_path, capsys):
    classifier = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    tries = fake_fit(monkeypatch, alarm_from_epoch=2)
    config = JobConfig.from_flags(epsilon=1.0, on_alarm="rollback")
    progress = fitting.fit_classifier(config, classifier, None, tmp_path, start_distribution("none"))
    assert tries == [0, 1, 2, 3] and len(progress.alarms) == 4 and progress.best_epoch == 0
    assert "epoch 1, the best before the alarm, is kept" in capsys.readouterr().out


def test_the_job_fails_if_no_epoch_can_be_kept(monkeypatch, tmp_path):
    classifier = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    fake_fit(monkeypatch, alarm_from_epoch=1)
    with pytest.raises(UserError, match=r"alarm in 4 tries. Received: WARNING after epoch 1"):
        config = JobConfig.from_flags(epsilon=1.0, on_alarm="rollback")
        fitting.fit_classifier(config, classifier, None, tmp_path, start_distribution("none"))


def test_the_first_epoch_is_kept_if_there_is_no_other():
    alarms = types.SimpleNamespace(raised=True)
    end = EndOnAlarm(alarms, save_anyway=True)
    end.set_model(types.SimpleNamespace(stop_training=False))
    end.on_epoch_end(0)
    assert end.model.stop_training
    for callback, epoch in ((end, 1), (EndOnAlarm(alarms, save_anyway=False), 0)):
        with pytest.raises(TrainingAlarm):
            callback.on_epoch_end(epoch)
    alarms.raised = False
    EndOnAlarm(alarms, save_anyway=False).on_epoch_end(3)


def test_an_action_without_an_attack_is_refused():
    with pytest.raises(UserError, match="--on_alarm=stop needs an attack.*--epsilon=0"):
        JobConfig.from_flags(on_alarm="stop")
