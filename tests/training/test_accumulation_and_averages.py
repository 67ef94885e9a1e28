"""Accumulated gradients are compared with one large batch, and moving averages with averages computed by hand."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from smallbn import build_smallbn, golden_batches

from robust_tf.config.job import JobConfig
from robust_tf.job.building import job_optimizer, optimizer_steps_per_epoch
from robust_tf.training.optimizers import average_statistics, averages_of, build_optimizer
from robust_tf.training.unfreezing import unfreeze
from robust_tf.transfer.stages import freeze

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SCHEDULES = {
    "constant": {},
    "step": {"lr_step_epochs": 2},
    "piecewise": {"lr_milestones": (1, 3)},
    "cosine": {},
    "cyclic": {},
}


def optimizer_of(config: JobConfig, batches: int) -> keras.optimizers.Optimizer:
    steps = optimizer_steps_per_epoch(config.optimization, replays=config.adversarial.replays, batches=batches)
    return job_optimizer(config.optimization, steps)


def rates_that_acted(config: JobConfig, *, batches: int, scaled: bool) -> list[float]:
    """The learning rate of every update of one weight, measured with a gradient of 1."""
    optimizer = optimizer_of(config, batches)
    scale = 1.0
    if scaled:
        optimizer, scale = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0), 256.0
    weight = keras.Variable([0.0], name="kernel")
    optimizer.build([weight])
    step = tf.function(lambda: optimizer.apply([tf.constant([scale])], [weight]))
    values, shown = [0.0], []
    for batch in range(batches * config.data_epochs):
        if batch % config.optimization.accumulate_steps == 0:
            shown.append(float(optimizer.learning_rate))  # what TensorBoard charts
        step()
        if (batch + 1) % config.optimization.accumulate_steps == 0:
            values.append(float(weight.numpy()[0]))
    rates = -np.diff(values)
    np.testing.assert_allclose(shown, rates, rtol=1e-3)
    return rates.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_gradients_use_the_learning_rates_of_the_large_batch(schedule, scaled):
    settings = {
        "epochs": 4,
        "lr_schedule": schedule,
        **SCHEDULES[schedule],
        "warmup_epochs": 1.5,
        "learning_rate": 0.25,
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    large = rates_that_acted(JobConfig.from_flags(**settings, batch_size=32), batches=3, scaled=scaled)
    small = rates_that_acted(
        JobConfig.from_flags(**settings, batch_size=8, accumulate_steps=4), batches=12, scaled=scaled
    )
    assert len(large) == 12
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulated_gradients_give_the_weights_of_the_large_batch(name):
    """On a network without BatchNorm, because its statistics would differ."""
    images, labels = (array.reshape(-1, *array.shape[3:])[:96] for array in golden_batches())
    weights = []
    for batch_size, steps in ((32, 1), (8, 4)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
        config = JobConfig.from_flags(
            optimizer=name,
            epochs=3,
            lr_schedule="cosine",
            learning_rate=0.01,
            batch_size=batch_size,
            accumulate_steps=steps,
            clip_norm=1.0,
        )
        model.compile(optimizer_of(config, 96 // batch_size), CROSSENTROPY)
        model.fit(images, labels, batch_size=batch_size, epochs=3, shuffle=False, verbose=0)
        assert int(model.optimizer.iterations) == 9
        weights.append(model.get_weights())
    for small, large in zip(weights[1], weights[0], strict=True):
        np.testing.assert_allclose(small, large, atol=2e-5)


def averaged_by_hand(values: list[np.ndarray], decay: float) -> np.ndarray:
    """`values` holds the value before the first update and after each update."""
    average = np.array(values[0], np.float64)
    for moves, value in enumerate(values[1:]):
        now = min(decay, (1 + moves) / (10 + moves))
        average = now * average + (1 - now) * value
    return average


@pytest.mark.parametrize("how", ["graph", "eager", "accumulated", "scaled"])
def test_weights_and_statistics_are_averaged_with_a_rising_decay(how):
    steps = 2 if how == "accumulated" else 1
    optimizer = build_optimizer("sgd", learning_rate=0.05, accumulate_steps=steps, average_decay=0.3)
    if how == "scaled":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
    classifier = build_smallbn()
    classifier.compile(optimizer, CROSSENTROPY, run_eagerly=how == "eager")
    optimizer.build(classifier.trainable_variables)
    for _ in range(2):  # the second call must have no effect
        average_statistics(optimizer, classifier)
    pairs = averages_of(optimizer)
    assert {variable.path for variable, _ in pairs} == {variable.path for variable in classifier.variables}
    values = [[variable.numpy()] for variable, _ in pairs]
    images, labels = golden_batches()
    for batch in range(6):
        classifier.train_on_batch(images[batch // 3, batch % 3], labels[batch // 3, batch % 3])
        if (batch + 1) % steps == 0:
            for history, (variable, _) in zip(values, pairs, strict=True):
                history.append(variable.numpy())
    for history, (variable, average) in zip(values, pairs, strict=True):
        assert not np.array_equal(history[0], history[-1]), variable.path
        expected = averaged_by_hand(history, 0.3)
        np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-6, err_msg=variable.path)


def test_without_averages_no_statistics_are_kept():
    classifier = build_smallbn()
    for optimizer in (build_optimizer("sgd", learning_rate=0.1), keras.optimizers.SGD(0.1)):
        optimizer.build(classifier.trainable_variables)
        average_statistics(optimizer, classifier)
        assert averages_of(optimizer) == []


def test_unfreezing_keeps_the_averages_and_starts_new_ones_at_the_current_weights():
    classifier = build_smallbn()
    freeze(classifier, mode="fixed_feature", batchnorm="update")
    model = keras.Model(classifier.input, classifier.output)

    def recompile(optimizer: keras.optimizers.Optimizer) -> None:
        model.compile(optimizer, CROSSENTROPY)

    recompile(build_optimizer("sgd", learning_rate=0.05, average_decay=0.9))
    model.optimizer.build(model.trainable_variables)
    average_statistics(model.optimizer, classifier)
    images, labels = golden_batches()
    for batch in range(3):
        model.train_on_batch(images[0, batch], labels[0, batch])
    before = {variable.path: average.numpy() for variable, average in averages_of(model.optimizer)}
    assert not np.array_equal(before["stem_bn/moving_mean"], classifier.get_layer("stem_bn").moving_mean.numpy())
    unfreeze(model, classifier, recompile=recompile)
    after = averages_of(model.optimizer)
    assert len(after) == len(classifier.variables)
    for variable, average in after:
        np.testing.assert_array_equal(average, before.get(variable.path, variable.numpy()), err_msg=variable.path)


@pytest.mark.slow
def test_two_replicas_compute_the_same_averages_as_one():
    """Runs in a process with two devices."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def compare_two_replicas_with_one() -> None:
    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    images, labels = golden_batches()
    dataset = tf.data.Dataset.from_tensor_slices((images[0], labels[0]))
    results = []
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        with strategy.scope():
            classifier = build_smallbn()
            for name in ("stem_bn", "stage1_bn"):
                classifier.get_layer(name).synchronized = True
            classifier.compile(build_optimizer("sgd", learning_rate=0.01, average_decay=0.9), CROSSENTROPY)
            classifier.optimizer.build(classifier.trainable_variables)
            average_statistics(classifier.optimizer, classifier)
        classifier.fit(dataset, shuffle=False, verbose=0)
        results.append([average.numpy() for _, average in averages_of(classifier.optimizer)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


if __name__ == "__main__":
    compare_two_replicas_with_one()
