"""Early stopping: when training ends, what it prints, and that a resumed training keeps the count."""

import json
import pathlib

import pytest

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job.patience import Patience, patience_of
from robust_tf.job.task import check_steps
from robust_tf.training.callbacks import SaveProgress
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress


@pytest.mark.parametrize(
    ("settings", "epochs_done", "best_epoch", "expected"),
    [
        ({}, 9, 0, False),  # off
        ({"patience": 3}, 0, -1, False),
        ({"patience": 3}, 3, 0, False),
        ({"patience": 3}, 4, 0, True),
        ({"patience": 3}, 10, 0, False),  # the last epoch ends the training anyway
        ({"patience": 1}, 2, 1, False),
        ({"patience": 1}, 3, 1, True),
        ({"patience": 2, "fast": "free", "epsilon": 1.0, "epochs": 16}, 3, 0, True),  # of 4 passes over the data
        ({"patience": 2, "fast": "free", "epsilon": 1.0, "epochs": 16}, 4, 0, False),
    ],
)
def test_patience_is_exhausted_after_enough_epochs_without_gain(settings, epochs_done, best_epoch, expected):
    progress = TrainingProgress(epochs_done=epochs_done, best_epoch=best_epoch)
    assert patience_of(JobConfig.from_flags(**settings)).is_exhausted(progress) == expected


def test_the_count_starts_again_when_the_network_is_unfrozen():
    patience = Patience(limit=2, num_epochs=10, unfreeze_at_epoch=5)
    assert not any(patience.is_exhausted(TrainingProgress(epochs_done=done, best_epoch=0)) for done in range(7))
    assert patience.is_exhausted(TrainingProgress(epochs_done=7, best_epoch=0))
    assert not patience.is_exhausted(TrainingProgress(epochs_done=7, best_epoch=5))


@pytest.fixture
def job(tmp_path, data_dir, monkeypatch):
    """Makes small jobs whose validation accuracies are given, one for each epoch."""

    def make(accuracies, **changes) -> JobConfig:
        save = SaveProgress.on_epoch_end
        monkeypatch.setattr(
            SaveProgress,
            "on_epoch_end",
            lambda self, epoch, logs: save(self, epoch, {**logs, "val_accuracy": accuracies[epoch]}),
        )
        return JobConfig.from_flags(
            workdir=str(tmp_path / "job"),
            data_dir=str(data_dir),
            architecture="resnet8",
            image_size=8,
            classes=(0, 1, 2),
            subset="60",
            batch_size=30,
            learning_rate=0.05,
            **{"epochs": 8, "patience": 2, **changes},
        )

    return make


def results_of(config: JobConfig) -> dict:
    return json.loads((pathlib.Path(config.run.workdir) / "results.json").read_text())


@pytest.mark.slow
def test_training_stops_early_and_says_why(job, capsys):
    config = job([0.2, 0.5, 0.4, 0.3, 0.9], class_weight="balanced")
    train.run(config)
    results = results_of(config)
    assert (results["stopped_early"], results["epochs_done"], results["best_epoch"]) == (True, 4, 2)
    out = capsys.readouterr().out
    assert "Stopped early after epoch 4 of 8: 2 epochs without a better validation figure than 50.0%. Epoch 2, " in out


@pytest.mark.slow
def test_a_resumed_training_keeps_the_count(job, monkeypatch):
    """A signal arrives while the epoch that exhausts the patience is saved, so nothing is left to train."""
    config = job([0.5, 0.4, 0.3, 0.9])
    save = SaveProgress._save

    def save_and_stop(self):
        save(self)
        if self._progress.epochs_done == 3:
            self._pending.receive(15, None)

    with monkeypatch.context() as patched:
        patched.setattr(SaveProgress, "_save", save_and_stop)
        with pytest.raises(SystemExit):
            train.run(config)
    monkeypatch.setattr("robust_tf.job.fitting._run_epochs", lambda *args, **options: pytest.fail("continues"))
    train.run(config)
    results = results_of(config)
    assert (results["stopped_early"], results["epochs_done"], results["best_epoch"]) == (True, 3, 1)
    assert Checkpoints(pathlib.Path(config.run.workdir) / "checkpoints").latest().progress.epochs_done == 3


def test_the_plan_mentions_patience_accumulation_and_class_weights(job, capsys):
    train.run(job([], dry_run=True, class_weight="balanced", accumulate_steps=4))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())  # the table wraps lines
    assert (
        "8 epochs x 2 = 16 steps of 30 images, an update of the weights every 4: 4 updates; fewer after 2 epochs" in out
    )
    assert "3 classes, weighted in the loss" in out
    assert "rate learning rate 0.05, step, x 0.1 never within 8 epochs" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_steps": 21}, "never be updated: the job has 20 steps in all. Received: --accumulate_steps=21"),
        ({"profile_steps": (21, 30)}, "within the 20 steps of the job. Received: --profile_steps=21,30"),
    ],
)
def test_flags_beyond_the_end_of_the_job_are_refused(settings, message):
    check_steps(JobConfig.from_flags(epochs=10, accumulate_steps=20, profile_steps=(20, 30)), 2)
    with pytest.raises(UserError, match=message):
        check_steps(JobConfig.from_flags(epochs=10, **settings), 2)
