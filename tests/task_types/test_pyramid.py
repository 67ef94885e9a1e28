"""The pyramid of every architecture: layers, sizes, gradients, and errors."""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.models import ARCHITECTURES, build_classifier
from robust_tf.tasks.pyramid import pyramid_of

LARGE = {"wide_resnet50_2", "wide_resnet50_4", "densenet161", "vgg16_bn", "cifar_wide_resnet28_10"}
RESNET50 = {3: "stage2_block4_relu", 4: "stage3_block6_relu", 5: "stage4_block3_relu"}
CIFAR = {2: "stage3_block3_relu"}
ENDS = {
    "resnet18": {3: "stage2_block2_relu", 4: "stage3_block2_relu", 5: "stage4_block2_relu"},
    "resnet50": RESNET50,
    "wide_resnet50_2": RESNET50,
    "wide_resnet50_4": RESNET50,
    "resnext50_32x4d": RESNET50,
    "densenet161": {3: "stage2_transition_relu", 4: "stage3_transition_relu", 5: "head_relu"},
    "mnasnet1_0": {3: "stage2_block3_add", 4: "stage4_block2_add", 5: "head_relu"},
    "mobilenet_v2": {3: "stage3_block3_add", 4: "stage5_block3_add", 5: "head_relu"},
    "shufflenet_v2_x1_0": {3: "stage1_block4_concat", 4: "stage2_block8_concat", 5: "head_relu"},
    "vgg16_bn": {3: "stage3_relu3", 4: "stage4_relu3", 5: "stage4_pool"},
    "cifar_resnet18": {2: "stage3_block2_relu", 3: "stage4_block2_relu"},
    "cifar_wide_resnet28_10": {2: "head_relu"},
    "resnet20": CIFAR,
    "resnet20_width8": CIFAR,
    "resnet8": {2: "stage3_block1_relu"},
}
SOMETIMES_ROUND_DOWN = {"densenet161", "vgg16_bn"}  # some of their pooling layers have no padding


def build(architecture: str, image_size: int) -> keras.Model:
    return build_classifier(architecture, 3, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3)


def slow(architecture: str):
    return pytest.param(architecture, marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture", [slow(name) if name in LARGE else name for name in ARCHITECTURES])
def test_levels_are_the_ends_of_stages(architecture):
    classifier = build(architecture, 47)  # at stride 32 some architectures have 1 position and others 2
    pyramid = pyramid_of(classifier)
    names = {id(layer.output): layer.name for layer in classifier.layers}
    assert {level: names[id(tensor)] for level, tensor in pyramid.items()} == ENDS[architecture]
    for level, tensor in pyramid.items():
        smaller, larger = 47 // 2**level, math.ceil(47 / 2**level)
        assert tensor.shape[1] == tensor.shape[2]
        assert tensor.shape[1] in ((smaller, larger) if architecture in SOMETIMES_ROUND_DOWN else (larger,))


@pytest.mark.parametrize("architecture", ["resnet8", "resnet18", *map(slow, sorted(set(ARCHITECTURES) - {"resnet18"}))])
def test_gradient_reaches_the_stem(architecture):
    classifier = build(architecture, 32)
    pyramid = pyramid_of(classifier)
    model = keras.Model(classifier.inputs[0], list(pyramid.values()))
    stem = next(layer for layer in classifier.layers if layer.name.startswith("stem_") and layer.weights)
    images = tf.random.stateless_uniform((2, 32, 32, 3), seed=(0, 0))
    with tf.GradientTape(persistent=True) as tape:
        maps = keras.tree.flatten(model(images, training=True))
        # Not the plain sum, which BatchNorm fixes.
        totals = [tf.reduce_sum(tf.cast(x, tf.float32) ** 2) for x in maps]
    for total in totals:
        gradient = tape.gradient(total, stem.trainable_weights[0].value)
        assert gradient is not None and np.abs(gradient).max() > 0


def test_number_of_levels():
    classifier = build("resnet18", 64)
    assert list(pyramid_of(classifier, levels=1)) == [5]
    assert list(pyramid_of(classifier, levels=9)) == [2, 3, 4, 5]
    with pytest.raises(UserError, match="Received: levels=0"):
        pyramid_of(classifier, levels=0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([keras.layers.Flatten(), keras.layers.Dense(4, name="stage1_dense")], "the stages stage1, head and feature"),
        ([keras.layers.Conv2D(4, 3, 2, name="stem_conv"), keras.layers.Flatten()], "feature maps of stride 2"),
        ([keras.layers.Conv2D(4, 3, 4, name="first"), keras.layers.Flatten()], "without such a name: first"),
    ],
)
def test_a_classifier_without_a_pyramid_is_refused(layers, message):
    classifier = keras.Sequential([keras.Input((16, 16, 3)), *layers, keras.layers.Dense(2, name="logits")])
    functional = keras.Model(classifier.inputs[0], classifier.outputs[0])
    with pytest.raises(UserError, match=re.escape(message)):
        pyramid_of(functional)
