"""Running out of memory: the message, and what stays on the disk."""

import pathlib

import keras
import pytest
import tensorflow as tf

from robust_tf import train
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.job.out_of_memory import out_of_memory_explained
from robust_tf.models import build_classifier
from robust_tf.training.callbacks import StopOnNaN
from robust_tf.training.checkpoint import Checkpoints

EXHAUSTED = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[96,8]\nstatistics")


@pytest.fixture
def classifier() -> keras.Model:
    return build_classifier("resnet8", 10, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(
    ("error", "reason"), [(EXHAUSTED, r"\(OOM when allocating tensor with shape\[96,8\]\)"), (MemoryError(), "Memory")]
)
def test_the_message_has_the_batch_size_an_estimate_and_ways_out(classifier, error, reason):
    with (
        pytest.raises(UserError, match=rf"Received: --batch_size=4096, .* about 6\.\d GB .*{reason}") as raised,
        out_of_memory_explained(JobConfig.from_flags(batch_size=4096), classifier),
    ):
        raise error
    for way in ("than 4096", "--batch_size=2048 --accumulate_steps=2", "--precision=mixed_", "--image_size than 32"):
        assert way in str(raised.value)
    assert "statistics" not in str(raised.value) and raised.value.__cause__ is error


def test_other_errors_pass_and_flags_in_use_are_not_suggested(classifier):
    with pytest.raises(KeyError), out_of_memory_explained(JobConfig(), classifier):
        raise KeyError
    with (
        pytest.raises(UserError) as raised,
        out_of_memory_explained(JobConfig.from_flags(precision="mixed_bfloat16"), classifier),
    ):
        raise MemoryError
    assert "--precision" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"batch_size": 64, "accumulate_steps": 3}, "--batch_size=32 --accumulate_steps=6"),
        ({"batch_size": 64, "distribution": "mirrored"}, None),  # where gradients are not accumulated
        ({"batch_size": 1}, None),
    ],
)
def test_accumulation_is_suggested_only_where_the_flags_allow_it(classifier, settings, way):
    config = JobConfig.from_flags(**settings)
    with pytest.raises(UserError) as raised, out_of_memory_explained(config, classifier):
        raise MemoryError
    assert (f" {way} (the same batch, in parts)" in str(raised.value)) == (way is not None)
    assert ("--accumulate_steps" in str(raised.value)) == (way is not None)


@pytest.mark.slow
def test_the_job_continues_from_the_last_checkpoint(tmp_path, data_dir, monkeypatch):
    config = JobConfig.from_flags(
        workdir=str(tmp_path / "job"),
        data_dir=str(data_dir),
        architecture="resnet8",
        image_size=8,
        examples_per_class=10,
        epochs=2,
        batch_size=50,
        eval_steps=1,
    )

    def exhaust(self, epoch, logs=None):
        if epoch == 1:
            raise EXHAUSTED

    with monkeypatch.context() as patched:
        patched.setattr(StopOnNaN, "on_epoch_begin", exhaust)
        with pytest.raises(UserError, match="Received: --batch_size=50"):
            train.run(config)
    assert Checkpoints(pathlib.Path(config.run.workdir) / "checkpoints").latest().progress.epochs_done == 1
    train.run(config)
    assert (pathlib.Path(config.run.workdir) / "results.json").exists()
