"""Weights that are not copied are the same in memory and in the file."""

import keras
import numpy as np
import tensorflow as tf

from robust_tf.models import build_classifier, load_classifier, save_classifier
from robust_tf.models.large_weights import UntouchedZeros, tensor_over, untouched_zeros
from robust_tf.models.layers import without_initial_values

STATISTICS = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def test_a_tensor_shares_the_memory_of_the_array():
    array = untouched_zeros((3, 5, 7))
    assert array.shape == (3, 5, 7) and array.dtype == np.float32 and not array.any()
    array[...] = np.arange(105).reshape(3, 5, 7)
    tensor = tensor_over(array)
    np.testing.assert_array_equal(tensor, array)
    assert np.shares_memory(np.asarray(memoryview(tensor)), array)


def test_zeros_of_any_type():
    zeros = UntouchedZeros(keras.initializers.RandomNormal())
    assert zeros((2, 3)).dtype == tf.float32
    half = zeros((2, 3), dtype="float16")
    assert half.dtype == tf.float16 and not np.any(half)


def test_the_configuration_equals_that_of_a_network_with_initial_values():
    usual = build_classifier("resnet20", 4, **STATISTICS)
    empty = without_initial_values(lambda: build_classifier("resnet20", 4, **STATISTICS))
    for ours, theirs in zip(empty.layers, usual.layers, strict=True):
        if theirs.weights:
            assert ours.get_config() == theirs.get_config()
    assert not np.any(empty.get_layer("stem_conv").kernel) and np.any(usual.get_layer("stem_conv").kernel)


def test_a_saved_classifier_equals_the_one_that_keras_saves(tmp_path):
    classifier = build_classifier("resnet20", 4, **STATISTICS)
    save_classifier(classifier, tmp_path / "ours.keras")
    classifier.save(tmp_path / "keras.keras")  # afterwards Keras saves in its usual way
    ours, theirs = load_classifier(tmp_path / "ours.keras"), keras.saving.load_model(tmp_path / "keras.keras")
    for one, other, weight in zip(ours.weights, theirs.weights, classifier.weights, strict=True):
        np.testing.assert_array_equal(one, weight, err_msg=weight.path)
        np.testing.assert_array_equal(other, weight, err_msg=weight.path)
    assert not any("save_own_variables" in vars(layer) for layer in classifier.layers)


def test_weights_of_other_types_are_saved_too(tmp_path):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3, dtype="bfloat16")(inputs))
    save_classifier(model, tmp_path / "half.keras")
    for ours, theirs in zip(keras.saving.load_model(tmp_path / "half.keras").weights, model.weights, strict=True):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, theirs)
