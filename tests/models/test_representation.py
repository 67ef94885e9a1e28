"""Features are the same in transfer, in serving and in pictures."""

import keras
import numpy as np

from robust_tf.models import build_classifier, features_of, plain_classifier
from robust_tf.transfer import replace_head
from tests.model_forms import image_input

layers = keras.layers
IMAGES = np.random.default_rng(1).random((5, 8, 8, 3)).astype(np.float32)


def test_hidden_layers_belong_to_the_head():
    classifier = build_classifier("resnet8", 3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    deeper = replace_head(classifier, 4, hidden_layers=2, seed=0)
    backbone = keras.Model(classifier.input, classifier.get_layer("features").output)
    for model in (classifier, deeper):
        np.testing.assert_array_equal(features_of(model)(IMAGES), backbone(IMAGES))


def test_without_a_layer_features_they_are_the_input_of_the_last_kernel():
    images = image_input()
    hidden = layers.Dense(7)(layers.Flatten()(images))
    model = keras.Model(images, layers.BatchNormalization()(layers.Dense(2)(hidden)))
    np.testing.assert_array_equal(features_of(model)(IMAGES), keras.Model(images, hidden)(IMAGES))


def test_feature_maps_and_sequences_are_averaged():
    images = image_input()
    maps = layers.Conv2D(4, 3)(images)
    by_map = plain_classifier(keras.Model(images, layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1)(maps))))
    mean = keras.ops.mean(keras.Model(images, maps)(IMAGES), axis=(1, 2))
    np.testing.assert_allclose(features_of(by_map)(IMAGES), mean, atol=1e-6)
    tokens = layers.Reshape((36, 4))(maps)
    by_token = keras.Model(images, layers.GlobalAveragePooling1D()(layers.Dense(3)(tokens)))
    np.testing.assert_allclose(features_of(by_token)(IMAGES), mean, atol=1e-6)


def test_features_of_a_model_without_weights_are_its_logits():
    images = image_input()
    assert features_of(keras.Model(images, layers.GlobalAveragePooling2D()(images))).output_shape == (None, 3)
