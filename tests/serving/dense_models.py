"""Small detectors and segmenters with random weights, for the tests of their exports."""

import keras
import numpy as np

from robust_tf.models import build_classifier
from robust_tf.tasks.detection import build_detector
from robust_tf.tasks.detection.anchors import PER_POSITION
from robust_tf.tasks.segmentation.head import build_segmenter

SIZE = 32
BOX_LABELS = ["cat", "dog", "Esel"]
MASK_LABELS = ["background", "road", "sky", "tree"]


def _backbone() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = build_classifier("resnet8", 5, image_size=SIZE, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):  # so that folding has something to do
            layer.moving_mean.assign(rng.normal(scale=0.1, size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2.0, size=layer.moving_variance.shape))
    return model


def small_detector() -> keras.Model:
    """Returns a detector that finds something in every image. A new one would find nothing."""
    network = build_detector(_backbone(), len(BOX_LABELS), seed=1, channels=8, tower_depth=1)
    rng = np.random.default_rng(1)
    for variable in network.weights:
        if variable.shape[-1] == PER_POSITION * len(BOX_LABELS):  # kernel and bias of the logits
            bias = len(variable.shape) == 1
            variable.assign(np.full(variable.shape, -2.0) if bias else rng.normal(scale=0.5, size=variable.shape))
    return network


def small_segmenter() -> keras.Model:
    """Returns a segmenter that finds several classes in an image."""
    network = build_segmenter(_backbone(), len(MASK_LABELS), seed=1)
    rng = np.random.default_rng(1)
    for variable in network.weights:
        if variable.path.startswith("head_") and variable.shape[-1] == len(MASK_LABELS):
            variable.assign(rng.normal(scale=0.5, size=variable.shape))
    return network
