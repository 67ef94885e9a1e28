"""Max pooling from slices equals TensorFlow's, in values and gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models.pooling import max_pool, use_deterministic_pooling


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("size", "strides"), [((3, 3), (2, 2)), ((2, 2), (2, 2)), ((1, 1), (2, 2)), ((3, 2), (1, 3))])
@pytest.mark.parametrize("static", [True, False])
def test_equals_tensorflow(size, strides, padding, static):
    # Small integers, so that many windows hold equal values, and sums of gradients are exact.
    rng = np.random.default_rng(0)
    images = tf.constant(rng.integers(-2, 3, (2, 9, 8, 3)), tf.float32)
    shape = (2, 9, 8, 3) if static else (None, None, None, 3)

    def pooled(pool):
        @tf.function(input_signature=[tf.TensorSpec(shape)])
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = pool(x)
                # Weights that differ show where each gradient goes.
                loss = tf.reduce_sum(y * tf.reshape(tf.range(tf.cast(tf.size(y), tf.float32)), tf.shape(y)))
            return y, tape.gradient(loss, x)

        return run(images)

    ours = pooled(lambda x: max_pool(x, size=size, strides=strides, padding=padding))
    theirs = pooled(lambda x: tf.nn.max_pool2d(x, size, strides, padding.upper()))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_with_it_is_saved_as_before(tmp_path):
    inner = keras.Sequential([keras.Input((9, 9, 3)), keras.layers.MaxPooling2D(3, 2, padding="same", name="pool")])
    model = keras.Sequential([keras.Input((9, 9, 3)), inner, keras.layers.Flatten(), keras.layers.Dense(2)])
    images = np.random.default_rng(0).random((2, 9, 9, 3)).astype(np.float32)
    before, config = model(images), model.get_config()
    use_deterministic_pooling(model)
    operations = tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec((2, 9, 9, 3))).graph
    assert "MaxPool" not in {operation.type for operation in operations.get_operations()}
    np.testing.assert_array_equal(model(images), before)
    assert model.get_config() == config
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(images), before)
