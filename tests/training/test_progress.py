"""The progress display of a long job."""

import types

import pytest

from robust_tf import console
from robust_tf.console import meter, track
from robust_tf.training.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand, in seconds."""
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def run_epochs(bar: ProgressBar, clock: list[float], *, first: int, epochs: int, seconds_a_step: float) -> None:
    bar.on_train_begin()
    for epoch in range(first, epochs):
        bar.on_epoch_begin(epoch)
        for step in range(10):
            clock[0] += seconds_a_step + (100.0 if epoch == first and step == 0 else 0.0)  # the first step traces
            bar.on_train_batch_end(step, {"loss": 1.5})
        clock[0] += 1000.0  # the time of the validation does not count
        bar.on_epoch_end(epoch, {"loss": 1.5, "accuracy": 0.5, "val_accuracy": 0.25})
    bar.on_train_end()


def test_rate_counts_only_the_training_steps(clock, capsys):
    bar = ProgressBar(num_images=95, batch_size=10, epochs=2, adversarial=False)
    run_epochs(bar, clock, first=0, epochs=2, seconds_a_step=0.5)
    assert bar.images_per_second == pytest.approx(19.0)  # 95 images in 10 steps; the last batch has 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "epoch 2/2  loss 1.500  train 50.0%  validation 25.0%  19 images/s"


def test_a_log_file_gets_the_remaining_time_once_a_minute(clock, capsys):
    bar = ProgressBar(num_images=100, batch_size=10, epochs=4, adversarial=False)
    run_epochs(bar, clock, first=2, epochs=4, seconds_a_step=25.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert lines[0] == "epoch 3/4  10% of all  0.4 images/s  ETA 0:07:30"  # 180 images at 0.4 images/s
    assert len(lines) < 10
    # 90 images at 0.4 images/s, and a validation that takes as long as the first one, 1,000 s.
    second = next(line for line in lines if line.startswith("epoch 4/4"))
    assert second == "epoch 4/4  55% of all  0.4 images/s  ETA 0:20:25"


def test_a_task_with_minutes_between_two_updates_has_a_remaining_time(clock, capsys):
    with meter("attack", total=10, unit="passes") as bar:
        bar.update(0)
        clock[0] += 200
        bar.update(50, "half", total=100)
        clock[0] += 100
        bar.update(75, "more", total=90)
    assert capsys.readouterr().out.splitlines() == [
        "attack  50% of all  0.25 passes/s  ETA 0:03:20  half",
        "attack  83% of all  0.25 passes/s  ETA 0:01:00  more",
    ]


def test_the_bar_counts_down_between_two_updates(clock):
    column, task = console._Remaining(), types.SimpleNamespace(fields={"ends": 200.0})
    shown = []
    for clock[0] in (0.0, 90.0, 600.0):
        shown.append(column.render(task).plain)
    assert shown == ["ETA 0:03:20", "ETA 0:01:50", "ETA 0:00:00"]


def test_clean_and_robust_accuracies_are_labeled(capsys):
    bar = ProgressBar(num_images=10, batch_size=10, epochs=1, adversarial=True)
    bar.on_epoch_begin(0)
    logs = {"loss": 1.0, "accuracy": 0.1, "clean_accuracy": 0.2, "val_accuracy": 0.3, "val_clean_accuracy": 0.4}
    bar.on_epoch_end(0, logs)
    expected = "train clean 20.0% robust 10.0%  validation clean 40.0% robust 30.0%"
    assert expected in capsys.readouterr().out


def test_track_yields_every_item():
    batches = [("images", [0, 1]), ("more images", [2])]
    assert list(track(batches, "test", num_images=3)) == batches


def test_a_changing_epsilon_is_shown(capsys):
    radii = iter([0.25, 0.5])
    bar = ProgressBar(num_images=10, batch_size=10, epochs=2, adversarial=True, epsilon=lambda: next(radii))
    logs = {"loss": 1.0, "accuracy": 0.1, "val_accuracy": 0.3, "val_clean_accuracy": 0.4}
    for epoch in range(2):
        bar.on_epoch_end(epoch, logs)
    lines = capsys.readouterr().out.splitlines()
    shared = "train robust 10.0%  validation clean 40.0% robust 30.0%"
    assert [f"{shared}  epsilon {radius}" in line for radius, line in zip((0.25, 0.5), lines, strict=True)] == [
        True
    ] * 2
