"""The optimizers are compared with the PyTorch reference, with steps computed by hand, and with Keras's optimizers."""

import os
import platform
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from smallbn import (
    LEARNING_RATES,
    MOMENTUM,
    PYTORCH_NAMES,
    WEIGHT_DECAY,
    build_smallbn,
    golden,
    golden_batches,
    keras_layout,
)

from robust_tf.errors import UserError
from robust_tf.training.optimizers import OPTIMIZERS, PyTorchSGD, build_optimizer

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train_golden_epoch(classifier: keras.Model, epoch: int) -> None:
    images, labels = golden_batches()
    classifier.optimizer.learning_rate = LEARNING_RATES[epoch]
    for batch_images, batch_labels in zip(images[epoch], labels[epoch], strict=True):
        classifier.train_on_batch(batch_images, batch_labels)


@pytest.mark.parametrize("how", ["graph", "eager", "xla"])
def test_sgd_equals_pytorch_over_a_learning_rate_drop(how):
    classifier = build_smallbn()
    optimizer = build_optimizer("sgd", learning_rate=0.1, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    classifier.compile(optimizer, CROSSENTROPY, run_eagerly=how == "eager", jit_compile=how == "xla")
    arrays = golden()
    for epoch in range(2):
        train_golden_epoch(classifier, epoch)
        weights = {weight.path: weight.numpy() for weight in classifier.trainable_weights}
        buffers = {variable.name: variable.numpy() for variable in optimizer.variables}
        for path, weight in weights.items():
            name = PYTORCH_NAMES[path]
            np.testing.assert_allclose(
                weight, keras_layout(arrays[f"standard/epoch{epoch}/{name}"]), rtol=0, atol=1e-5, err_msg=path
            )
            np.testing.assert_allclose(
                buffers[path.replace("/", "_") + "_momentum"],
                keras_layout(arrays[f"standard/epoch{epoch}/momentum/{name}"]),
                rtol=0,
                atol=1e-5,
                err_msg=path,
            )


def weights_after(optimizer: keras.optimizers.Optimizer, gradients: list[float], start: float = 1.0) -> list[float]:
    """Returns the values of one weight after each step with a given gradient."""
    weight = keras.Variable([start], name="kernel")
    values = []
    for gradient in gradients:
        optimizer.apply([tf.constant([gradient])], [weight])
        values.append(float(weight.numpy()[0]))
    return values


def test_nesterov_steps_equal_those_computed_by_hand():
    # d = g + 0.1 w; b = 0.5 b + d; w -= 0.1 (d + 0.5 b): 1.0 -> d 2.1, b 2.1; 0.685 -> d 1.0685, b 2.1185
    optimizer = PyTorchSGD(0.1, momentum=0.5, nesterov=True, weight_decay=0.1)
    np.testing.assert_allclose(weights_after(optimizer, [2.0, 1.0]), [0.685, 0.685 - 0.1 * 2.12775], rtol=1e-6)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors may round a product and a sum once")
def test_sgd_rounds_in_the_order_of_pytorch():
    rng = np.random.default_rng(0)
    weight = keras.Variable(rng.normal(size=(30, 30)).astype(np.float32), name="kernel")
    optimizer = PyTorchSGD(0.1, momentum=0.9, weight_decay=5e-4)
    expected, buffer = weight.numpy().copy(), np.zeros((30, 30), np.float32)
    update = tf.function(lambda gradient: optimizer.apply([gradient], [weight]))
    for _ in range(20):
        gradient = rng.normal(size=(30, 30)).astype(np.float32)
        update(tf.constant(gradient))
        buffer = np.float32(0.9) * buffer + (gradient + np.float32(5e-4) * expected)
        expected = expected - np.float32(0.1) * buffer
    np.testing.assert_array_equal(weight, expected)


def test_without_momentum_there_is_no_buffer():
    optimizer = PyTorchSGD(0.1, weight_decay=0.5)
    np.testing.assert_allclose(weights_after(optimizer, [2.0, 0.0]), [0.75, 0.7125], rtol=1e-6)
    assert [variable.name for variable in optimizer.variables] == ["iteration", "learning_rate"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adam_equals_keras_adam_with_coupled_or_decoupled_weight_decay(name):
    gradients = [0.3, -0.2, 0.5, 0.1]
    ours = build_optimizer(name, learning_rate=0.1, momentum=0.8, weight_decay=0.2)
    if name == "adamw":
        expected = weights_after(keras.optimizers.AdamW(0.1, beta_1=0.8, weight_decay=0.2), gradients)
    else:  # coupled weight decay is part of the gradient
        plain = build_optimizer(name, learning_rate=0.1, momentum=0.8)
        if name == "adam":
            plain = keras.optimizers.Adam(0.1, beta_1=0.8)
        weight = keras.Variable([1.0])
        expected = []
        for gradient in gradients:
            plain.apply([gradient + 0.2 * weight.numpy()], [weight])
            expected.append(float(weight.numpy()[0]))
    np.testing.assert_allclose(weights_after(ours, gradients), expected, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multipliers_scale_the_learning_rate_by_stage(name):
    """With {"stem": 0.5, "head": 0} the stem has half the rate, stage 1 the full rate, and the head does not change."""
    images, labels = golden_batches()
    moved = {}
    for rate, multipliers in ((0.1, None), (0.05, None), (0.1, {"stem": 0.5, "head": 0})):
        classifier = build_smallbn()
        before = {weight.path: weight.numpy() for weight in classifier.trainable_weights}
        optimizer = build_optimizer(name, learning_rate=rate, weight_decay=0.01, multipliers=multipliers)
        classifier.compile(optimizer, CROSSENTROPY, run_eagerly=True)
        classifier.train_on_batch(images[0, 0], labels[0, 0])
        moved[rate, multipliers is None] = {w.path: w.numpy() - before[w.path] for w in classifier.trainable_weights}
    for path, change in moved[0.1, False].items():
        expected = moved[0.05, True] if path.startswith("stem_") else moved[0.1, True]
        if path.startswith("logits"):
            assert not change.any()
        else:
            np.testing.assert_allclose(change, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_weight_decay_acts_on_all_weights_except_the_excluded_ones():
    for excluded in ((), ("bias", "gamma", "beta")):
        classifier = build_smallbn()
        weights = classifier.trainable_weights
        optimizer = build_optimizer("sgd", learning_rate=0.5, weight_decay=1.0, no_weight_decay=excluded)
        before = [weight.numpy() for weight in weights]
        optimizer.apply([tf.zeros_like(weight) for weight in weights], weights)
        for weight, value in zip(weights, before, strict=True):
            shrunk = value if weight.name in excluded else value / 2
            np.testing.assert_allclose(weight, shrunk, rtol=1e-6, err_msg=weight.path)


def test_the_gradient_is_clipped_before_weight_decay_is_added():
    optimizer = build_optimizer("sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.5, global_clipnorm=1.0)
    np.testing.assert_allclose(weights_after(optimizer, [10.0]), [1 - 0.1 * (1 + 0.5)], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_configuration_survives_serialization(name):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    optimizer = build_optimizer(
        name,
        learning_rate=schedule,
        momentum=0.7,
        weight_decay=0.25,
        no_weight_decay=("bias",),
        multipliers={"head": 10.0},
        global_clipnorm=3.0,
    )
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is type(optimizer)
    assert copy.get_config() == optimizer.get_config()
    assert copy.get_config()["no_weight_decay"] == ["bias"]
    gradients = [0.3, -0.2, 4.0]
    assert weights_after_in_head(copy, gradients) == weights_after_in_head(optimizer, gradients)


def weights_after_in_head(optimizer: keras.optimizers.Optimizer, gradients: list[float]) -> list[float]:
    layer = keras.layers.Dense(1, kernel_initializer="ones", name="head_hidden1")
    layer(tf.ones((1, 1)))
    values = []
    for gradient in gradients:
        optimizer.apply([tf.constant([[gradient]])], [layer.kernel])
        values.append(float(layer.kernel.numpy()[0, 0]))
    return values


def test_a_compiled_model_is_saved_and_loaded_with_the_optimizer(tmp_path):
    classifier = build_smallbn()
    classifier.compile(build_optimizer("sgd", learning_rate=0.1, weight_decay=0.01), CROSSENTROPY)
    images, labels = golden_batches()
    classifier.train_on_batch(images[0, 0], labels[0, 0])
    classifier.save(tmp_path / "classifier.keras")
    loaded = keras.saving.load_model(tmp_path / "classifier.keras")
    for model in (classifier, loaded):
        model.train_on_batch(images[0, 1], labels[0, 1])
    for weight, other in zip(loaded.weights, classifier.weights, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-6)


def test_loss_scaling_gives_the_same_weights_as_float32():
    changes = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        classifier = build_smallbn()
        before = classifier.get_layer("logits").kernel.numpy()
        optimizer = build_optimizer("sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
        classifier.compile(optimizer, CROSSENTROPY)
        train_golden_epoch(classifier, 0)
        changes[policy] = classifier.get_layer("logits").kernel.numpy() - before
    difference = np.linalg.norm(changes["mixed_float16"] - changes["float32"])
    assert difference < 0.05 * np.linalg.norm(changes["float32"])


@pytest.mark.slow
def test_two_replicas_give_the_same_weights_as_one():
    """Runs in a separate process, because TensorFlow creates its logical devices only once."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(OPTIMIZERS)


def compare_two_replicas_with_one() -> None:
    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    images, labels = golden_batches()
    dataset = tf.data.Dataset.from_tensor_slices((images[0], labels[0]))
    for name in OPTIMIZERS:
        results = []
        for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
            with strategy.scope():
                classifier = build_smallbn()
                for layer in classifier.layers:
                    # Each replica would normalize with the statistics of its half of the batch.
                    layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
                optimizer = build_optimizer(name, learning_rate=0.01, weight_decay=0.05, multipliers={"head": 0.5})
                classifier.compile(optimizer, CROSSENTROPY)
            classifier.fit(dataset, shuffle=False, verbose=0)
            results.append(classifier.get_weights())
        for one, two in zip(*results, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)  # Adam magnifies the rounding errors of tiny gradients
        print(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sdg", {}, "'sdg'.*Did you mean 'sgd'"),
        ("sgd", {"learning_rate": 0.0}, "learning_rate=0.0"),
        ("sgd", {"momentum": 1.0}, "momentum=1.0"),
        ("adam", {"momentum": -0.1}, "momentum=-0.1"),
        ("sgd", {"weight_decay": -5e-4}, "weight_decay=-0.0005"),
        ("adam", {"nesterov": True}, "name='adam'"),
        ("sgd", {"nesterov": True, "momentum": 0.0}, "momentum=0"),
        ("sgd", {"global_clipnorm": 0.0}, "global_clipnorm=0.0"),
        ("sgd", {"multipliers": {"stage1": -1.0}}, "stage1=-1.0"),
        ("sgd", {"multipliers": {"layer1": 1.0}}, "'layer1'"),
    ],
)
def test_wrong_arguments_are_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(name, **{"learning_rate": 0.1} | arguments)


def test_multipliers_refuse_a_weight_without_a_stage():
    layer = keras.layers.Dense(1, name="encoder")
    layer.build((None, 2))
    with pytest.raises(UserError, match="'encoder/kernel'"):
        build_optimizer("sgd", learning_rate=0.1, multipliers={"head": 2.0}).build(layer.trainable_weights)


if __name__ == "__main__":
    compare_two_replicas_with_one()
