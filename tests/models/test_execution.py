"""The faster way to run a classifier gives Keras's outputs, gradients and moving statistics."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models import Execution, build_classifier
from robust_tf.transfer import freeze

RNG = np.random.default_rng(0)


@pytest.fixture
def policy(request):
    """Sets the dtype policy that the parameter names for the time of a test."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def randomized(model: keras.Model) -> keras.Model:
    """Sets scales, shifts, means and variances that differ from those of a new model."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([RNG.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def network() -> keras.Model:
    """Convolutions, a depthwise one and one with a bias, all followed by BatchNorm, one BatchNorm before a ReLU."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(scale=False)(layers.Conv2D(8, 3, padding="same")(x)))
    y = layers.BatchNormalization(center=False)(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8, epsilon=1e-5)(layers.Conv2D(8, 1)(x + y)))
    return randomized(keras.Model(inputs, layers.Dense(4, dtype="float32")(layers.GlobalAveragePooling2D()(x))))


def images(count: int = 6) -> tf.Tensor:
    return tf.constant(RNG.random((count, 8, 8, 3), np.float32))


def error(ours, expected) -> float:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(ours - expected).max() / (np.abs(expected).max() + 1e-30))


def values_and_gradients(run, model: keras.Model, x: tf.Tensor):
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = tf.cast(run(x), tf.float32)
        loss = tf.reduce_sum(outputs * tf.constant([[1.0, -2.0, 3.0, -4.0]]))
    weights = [weight.value for weight in model.trainable_weights]
    return outputs, tape.gradient(loss, [x, *weights])


def test_inference_equals_keras_in_outputs_and_gradients():
    model, x = network(), images()
    execution = Execution(model)
    expected, expected_gradients = values_and_gradients(lambda x: model(x, training=False), model, x)
    outputs, gradients = values_and_gradients(lambda x: execution(x, training=False), model, x)
    assert error(outputs, expected) < 1e-5
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert error(ours, theirs) < 1e-4
    with execution.weights_unchanged():
        np.testing.assert_array_equal(execution(x, training=False), outputs)


@pytest.mark.parametrize("mode", ["training", "frozen", "frozen but updating"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"], indirect=True)
def test_moving_statistics_equal_those_of_keras_over_ten_steps(mode, policy):
    model = network()
    if mode != "training":
        model.layers[-1].name = "logits"
        for layer in model.layers[:-1]:
            layer.trainable = mode != "frozen"
            for weight in layer.trainable_weights:
                weight.trainable = False
    batches = [images() for _ in range(10)]
    start, results = model.get_weights(), []
    for run in (model, Execution(model)):
        model.set_weights(start)
        step = tf.function(functools.partial(run, training=True))
        for batch in batches:
            step(batch)
        results.append(model.get_weights())
    changed = [not np.array_equal(one, other) for one, other in zip(start, results[0], strict=True)]
    assert any(changed) == (mode != "frozen")
    for ours, theirs in zip(results[1], results[0], strict=True):
        # In bfloat16 the input of every layer after the first is rounded, and Keras rounds it at other places.
        assert error(ours, theirs) < (1e-6 if policy == "float32" else 1e-2)


@pytest.mark.parametrize("policy", ["mixed_bfloat16"], indirect=True)
def test_statistics_of_half_precision_activations_are_computed_in_float32(policy):
    inputs = keras.Input((8, 8, 3))
    model = randomized(keras.Model(inputs, keras.layers.BatchNormalization()(inputs)))
    execution, start = Execution(model), model.get_weights()
    results = []
    for run in (lambda x: model(x, training=True), lambda x: execution(x, training=True)):
        model.set_weights(start)
        generator = np.random.default_rng(1)
        for _ in range(10):
            run(tf.constant(generator.random((6, 8, 8, 3)) + 3.0, tf.bfloat16))
        results.append(model.get_weights())
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16"], indirect=True)
def test_half_precision_is_about_as_exact_as_keras(policy):
    ours = theirs = 0.0
    for _ in range(4):  # a single network can favor either by its roundings
        model, x = network(), images(64)
        exact = keras.models.clone_model(model, clone_function=_in_float32)
        exact.set_weights(model.get_weights())
        start = model.get_weights()
        for training in (False, True):
            expected = exact(x, training=training)
            theirs += float(tf.reduce_mean(tf.abs(model(x, training=training) - expected)))
            model.set_weights(start)
            ours += float(tf.reduce_mean(tf.abs(Execution(model)(x, training=training) - expected)))
            model.set_weights(start)
    assert 0 < ours < 1.5 * theirs


def _in_float32(layer: keras.Operation) -> keras.Operation:
    if not isinstance(layer, keras.layers.Layer):
        return layer
    return type(layer).from_config({**layer.get_config(), "dtype": "float32"})


def test_for_xla_only_attacks_are_changed():
    model, x = network(), images()
    start, execution = model.get_weights(), Execution(model, unbiased=True, fused=False)
    assert execution.fused_layers == [] != Execution(model).fused_layers
    expected = model(x, training=True)
    statistics = model.get_weights()
    model.set_weights(start)
    np.testing.assert_array_equal(execution(x, training=True), expected)
    for ours, theirs in zip(model.get_weights(), statistics, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    graph = tf.function(lambda x: execution(x, training=False)).get_concrete_function(x).graph
    assert [operation.type for operation in graph.get_operations()].count("BiasAdd") == 4


def test_the_classifier_and_its_file_stay_as_they_are(tmp_path):
    model = network()
    before = model.get_config()
    execution = Execution(model)
    execution(images(), training=True)
    execution(images(), training=False)
    assert model.get_config() == before
    assert [len(layer._inbound_nodes) for layer in model.layers] == [1] * len(model.layers)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {type(layer).__module__.split(".")[0] for layer in loaded.layers} == {"keras"}
    x = images()
    np.testing.assert_array_equal(loaded(x), model(x))


def test_folded_kernels_follow_the_weights():
    model, x = network(), images()
    execution = Execution(model)

    @tf.function
    def outputs(x: tf.Tensor) -> tf.Tensor:
        with execution.weights_unchanged():
            loop = tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, execution(x, training=False)), (0, model(x)))
        return loop[1]

    for _ in range(2):
        assert error(outputs(x), model(x, training=False)) < 1e-5
        randomized(model)


def test_the_attack_has_one_convolution_for_each_pair_and_no_batchnorm():
    model = network()
    execution = Execution(model)
    graph = tf.function(lambda x: execution(x, training=False)).get_concrete_function(images()).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert "FusedBatchNormV3" not in kinds
    assert kinds.count("BiasAdd") == 4  # the three convolutions' and the Dense layer's


@pytest.mark.parametrize(("kernel_size", "height"), [(7, 14), (7, 15), (4, 9), ((3, 5), 8)])
def test_a_stem_with_stride_two_is_computed_on_blocks(kernel_size, height):
    inputs = keras.Input((height, 10, 3))
    x = keras.layers.Conv2D(4, kernel_size, strides=2, use_bias=False)(inputs)
    model = randomized(keras.Model(inputs, keras.layers.BatchNormalization()(x)))
    x, execution = tf.constant(RNG.random((2, height, 10, 3), np.float32)), Execution(model)
    results = []
    for run in (execution, model):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = run(x, training=False)
        results.append((outputs, *tape.gradient(outputs, [x, model.layers[1].kernel.value], outputs)))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) < 1e-5
    graph = tf.function(lambda x: execution(x, training=False)).get_concrete_function(x).graph
    (conv,) = [operation for operation in graph.get_operations() if operation.type == "Conv2D"]
    assert conv.get_attr("strides") == [1, 1, 1, 1] and conv.inputs[0].shape[-1] == 12


def test_a_stem_that_was_first_called_on_images_of_another_size():
    conv, norm = keras.layers.Conv2D(4, 3, strides=2), keras.layers.BatchNormalization()
    for size in (12, None):
        inputs = keras.Input((size, size, 3))
        model = keras.Model(inputs, norm(conv(inputs)))
    execution, x = Execution(model), tf.constant(RNG.random((2, 9, 10, 3), np.float32))
    of_any_size = [tf.TensorSpec((None, None, None, 3))]
    outputs = tf.function(lambda x: execution(x, training=False), input_signature=of_any_size)(x)
    assert error(outputs, model(x, training=False)) < 1e-5


@pytest.mark.parametrize("form", ["sequential", "nested", "sequential in functional", "shared", "axis", "masked"])
def test_other_forms_of_models_give_the_answers_of_keras(form):
    layers = keras.layers
    block = [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
    inputs = keras.Input((8, 8, 3))
    if form == "sequential":
        model = keras.Sequential([inputs, *block, layers.Flatten()])
    elif form == "nested":
        x = inputs
        for layer in block:
            x = layer(x)
        outer = keras.Input((8, 8, 3))
        model = keras.Model(outer, layers.Flatten()(keras.Model(inputs, x, name="inner")(outer)))
    elif form == "sequential in functional":
        model = keras.Model(inputs, layers.Flatten()(keras.Sequential(block)(inputs)))
    elif form == "shared":
        conv, norm = layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()
        model = keras.Model(inputs, layers.Flatten()(norm(conv(norm(conv(inputs))))))
    elif form == "axis":
        model = keras.Model(inputs, layers.Flatten()(layers.BatchNormalization(axis=1)(inputs)))
    else:
        x = layers.Masking()(layers.Reshape((8, 24))(inputs))
        model = keras.Model(inputs, layers.BatchNormalization()(x))
    start = [RNG.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()]
    model.set_weights(start)
    execution, x = Execution(model), images()
    for training in (False, True):
        expected = model(x, training=training)
        statistics = model.get_weights()
        model.set_weights(start)
        assert error(execution(x, training=training), expected) < 1e-5
        for ours, theirs in zip(model.get_weights(), statistics, strict=True):
            assert error(ours, theirs) < 1e-6
        model.set_weights(start)


def test_a_subclassed_model_and_layers_with_own_rules_run_as_they_are():
    class Doubled(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2.0 * super().call(inputs, training=training, mask=mask)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = keras.layers.Conv2D(2, 3), Doubled()

        def call(self, inputs, training=None):
            return self.norm(self.conv(inputs), training=training)

    model, x = Own(), images()
    model(x)
    np.testing.assert_array_equal(Execution(model)(x, training=False), model(x, training=False))
    inputs = keras.Input((8, 8, 3))
    functional = keras.Model(inputs, Doubled()(keras.layers.Conv2D(2, 3)(inputs)))
    for training in (False, True):
        ours = Execution(functional)(x, training=training)
        np.testing.assert_array_equal(ours, functional(x, training=training))


def test_losses_of_layers_and_dropout_are_those_of_the_classifier():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, kernel_regularizer="l2", activity_regularizer="l2")(inputs)
    model = keras.Model(inputs, keras.layers.Dropout(0.5, seed=1)(keras.layers.BatchNormalization()(x)))
    execution, x = Execution(model), images()
    model(x, training=True)
    expected = [float(loss) for loss in model.losses]
    for _ in range(3):
        outputs = execution(x, training=True)
    assert [float(loss) for loss in model.losses] == pytest.approx(expected)
    assert 0.3 < float(tf.reduce_mean(tf.cast(outputs == 0, tf.float32))) < 0.7


def test_frozen_stages_of_an_architecture():
    model = randomized(build_classifier("resnet8", 5, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3))
    freeze(model, mode="partial", through="stage2")
    start, x = model.get_weights(), images()
    expected = model(x, training=True)
    statistics = model.get_weights()
    model.set_weights(start)
    assert error(Execution(model)(x, training=True), expected) < 1e-5
    for ours, theirs in zip(model.get_weights(), statistics, strict=True):
        assert error(ours, theirs) < 1e-6
