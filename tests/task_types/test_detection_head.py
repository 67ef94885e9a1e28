"""The network of a detector: outputs, anchors, sizes, precision, seeds and errors."""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.models import build_classifier
from robust_tf.tasks.detection import anchors_for, anchors_of, build_detector, levels_of
from robust_tf.tasks.detection.head import _enlarged, _NewLayers
from robust_tf.transfer import with_dtype_policy


def build(architecture: str = "resnet8", image_size: int = 32) -> keras.Model:
    return build_classifier(architecture, 5, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize(
    ("architecture", "image_size", "levels"),
    [
        ("resnet8", 32, {2: 8, 3: 4, 4: 2, 5: 1}),
        ("resnet8", 50, {2: 13, 3: 7, 4: 4, 5: 2, 6: 1}),
        ("resnet18", 100, {3: 13, 4: 7, 5: 4, 6: 2, 7: 1}),
        ("resnet18", 32, {3: 4, 4: 2, 5: 1}),
        pytest.param("densenet161", 100, {3: 12, 4: 6, 5: 3, 6: 2, 7: 1}, marks=pytest.mark.slow),
        pytest.param("vgg16_bn", 100, {3: 12, 4: 6, 5: 3, 6: 2, 7: 1}, marks=pytest.mark.slow),
        pytest.param("vgg16_bn", 90, {3: 11, 4: 5, 5: 2, 6: 1}, marks=pytest.mark.slow),
    ],
)
def test_outputs(architecture, image_size, levels):
    classifier = build(architecture, image_size)
    detector = build_detector(classifier, 7, seed=0, channels=16, tower_depth=1)
    assert detector.name == architecture
    assert levels_of(detector) == levels
    count = 9 * sum(size**2 for size in levels.values())
    assert anchors_for(detector).shape == (count, 4)
    outputs = detector(np.full((2, image_size, image_size, 3), 0.4, np.float32))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"boxes": (2, count, 4), "classes": (2, count, 7)}
    assert all(x.dtype == "float32" and np.isfinite(x).all() for x in outputs.values())
    new = [layer for layer in detector.layers if layer not in classifier.layers]
    assert all(layer.name.startswith("head_") for layer in new)
    assert all(type(layer).__module__.startswith("keras.") for layer in detector.layers)
    assert classifier.layers[3] is detector.layers[3] and classifier.layers[3].name.startswith("stem_")


def test_image_size_400_has_odd_maps():
    assert levels_of(build_detector(build("resnet18", 400), 2, seed=0, channels=8, tower_depth=0)) == {
        3: 50,
        4: 25,
        5: 13,
        6: 7,
        7: 4,
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3, [[1, 1, 2], [1, 1, 2], [3, 3, 4]]),
        (4, [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]),
        (5, [[1, 1, 2, 2, 0], [1, 1, 2, 2, 0], [3, 3, 4, 4, 0], [3, 3, 4, 4, 0], [0, 0, 0, 0, 0]]),
    ],
)
def test_an_enlarged_map_keeps_its_top_left_corner(size, expected):
    coarse, fine = keras.Input((2, 2, 1)), keras.Input((size, size, 1))
    enlarged = _enlarged(coarse, fine, 3, _NewLayers(8, policy="float32", seed=0))
    model = keras.Model(coarse, enlarged)
    np.testing.assert_array_equal(model(np.array([1, 2, 3, 4], np.float32).reshape(1, 2, 2, 1))[0, :, :, 0], expected)


def test_initial_predictions():
    """Every class has the probability 0.01, and every box is about its anchor."""
    outputs = build_detector(build(), 3, seed=0)(np.random.default_rng(0).random((2, 32, 32, 3), np.float32))
    np.testing.assert_allclose(tf.sigmoid(outputs["classes"]), 0.01, atol=0.02)
    assert np.mean(tf.sigmoid(outputs["classes"])) == pytest.approx(0.01, rel=0.2)
    assert np.abs(outputs["boxes"]).max() < 2
    bias = build_detector(build(), 3, seed=0).get_layer("head_classes_conv").bias
    np.testing.assert_allclose(bias, -math.log(99), rtol=1e-6)


def test_outputs_belong_to_the_anchors_of_their_place():
    """The gradient of one anchor's output with respect to the image is largest within the anchor."""
    detector = build_detector(build(image_size=64), 2, seed=0, channels=16, tower_depth=0)
    anchors = anchors_for(detector)
    images = tf.constant(np.random.default_rng(0).random((1, 64, 64, 3), np.float32))
    for index in (9 * (16 * 3 + 12), 9 * (16 * 12 + 2), 9 * 256 + 9 * (8 * 6 + 1)):
        with tf.GradientTape() as tape:
            tape.watch(images)
            output = tf.reduce_sum(detector(images)["classes"][0, index])
        slope = np.abs(tape.gradient(output, images)[0]).sum(-1)
        center = np.array([(slope.sum(1) * np.arange(64)).sum(), (slope.sum(0) * np.arange(64)).sum()]) / slope.sum()
        middle = (anchors[index, :2] + anchors[index, 2:]) / 2
        assert np.abs(center - middle).max() < 10, index


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    classifier = with_dtype_policy(build(), policy)
    detector = build_detector(classifier, 3, seed=0)
    for name in ("head_lateral_p2", "head_smooth_p2", "head_boxes_tower1_conv", "head_classes_tower2_norm"):
        assert detector.get_layer(name).compute_dtype == policy[6:], name
    for name in ("head_boxes_conv", "head_classes_conv"):
        assert detector.get_layer(name).compute_dtype == "float32", name
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    outputs = detector(images)
    full = build_detector(with_dtype_policy(classifier, "float32"), 3, seed=0)(images)
    for name, output in outputs.items():
        assert output.dtype == "float32"
        np.testing.assert_allclose(output, full[name], atol=0.1)


def test_seed():
    classifier = build()
    first, second, other = (build_detector(classifier, 3, seed=seed).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_levels_share_the_towers():
    detector = build_detector(build(), 3, seed=0, tower_depth=2)
    kernels = [layer.name for layer in detector.layers if "tower" in layer.name and "conv" in layer.name]
    assert sorted(kernels) == [f"head_{output}_tower{i}_conv" for output in ("boxes", "classes") for i in (1, 2)]


def test_default_channels_depend_on_the_backbone():
    assert build_detector(build(), 2, seed=0).get_layer("head_smooth_p2").filters == 64
    assert build_detector(build("resnet18"), 2, seed=0, tower_depth=0).get_layer("head_smooth_p3").filters == 256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_classes": 0}, "Received: num_classes=0"),
        ({"channels": 20}, "Received: channels=20"),
        ({"channels": 0}, "Received: channels=0"),
        ({"tower_depth": -1}, "Received: tower_depth=-1"),
    ],
)
def test_bad_numbers_are_refused(changed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_detector(build(), **({"num_classes": 2, "seed": 0} | changed))


def test_images_must_be_square():
    config = build().get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, 32, 48, 3)
    with pytest.raises(UserError, match="32 x 48 pixels"):
        build_detector(keras.Model.from_config(config), 2, seed=0)


def test_anchors():
    anchors = anchors_of({4: 1, 3: 2})
    assert anchors.shape == (45, 4) and anchors.dtype == np.float32
    middle, edges = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    np.testing.assert_allclose(middle[::9], [[4, 4], [4, 12], [12, 4], [12, 12], [8, 8]], atol=1e-5)
    np.testing.assert_allclose(edges[:9, 0] / edges[:9, 1], [0.5, 1, 2] * 3, rtol=1e-5)
    sizes = np.repeat([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)], 3)
    np.testing.assert_allclose(np.sqrt(edges.prod(1)), np.concatenate([np.tile(sizes, 4), 2 * sizes]), rtol=1e-5)


def test_a_classifier_has_no_levels():
    with pytest.raises(UserError, match="'resnet8', whose last layers are .*features, logits"):
        levels_of(build())
