"""The network of a detector: RetinaNet's feature pyramid and towers on the backbone of a classifier.

keras-cv has a RetinaNet too, but it is not used here. It is a class with layers of keras-cv, so a saved model can be
loaded only where keras-cv is installed, and keras-cv is no longer developed: 0.9 is its last release, and some of its
backbones cannot be built with Keras 3.15. A detector of this package is a Functional model of Keras's own layers. It
can be loaded in safe mode and exported without any other package, the attacks and trainers of this package take it like
any classifier, and its backbone can be any architecture of this package.
"""

import math
import random
from collections.abc import Callable

import keras

from robust_tf.errors import UserError
from robust_tf.models.representation import features_layer
from robust_tf.tasks.detection.anchors import PER_POSITION, level_name
from robust_tf.tasks.pyramid import pyramid_of

MOST_LEVELS = 5
# Probability of an object at each anchor before the training. Without this prior the many background anchors would
# dominate the first steps (arXiv 1708.02002, section 4.1).
PRIOR = 0.01
_CHANNELS_PER_GROUP = 8
_LARGE_BACKBONE = 512  # number of features
_Block = Callable[[keras.KerasTensor], keras.KerasTensor]


def build_detector(
    classifier: keras.Model, num_classes: int, *, seed: int, channels: int | None = None, tower_depth: int | None = None
) -> keras.Model:
    """Returns a RetinaNet detector on the backbone of a classifier.

    The backbone is shared, not copied, so training the detector changes the classifier. A feature pyramid combines the
    backbone's feature maps, adds coarser levels until there are 5 or the map is a single position, and two towers of
    convolutions, which all levels share, predict a class and a box for each anchor.

    The towers use GroupNormalization, which the original does not have. It makes training from few steps stable without
    a long warmup, and unlike BatchNorm it does not depend on the size of the batch, which is small for detectors, or on
    the other images of the batch, which an attack must not mix.

    Args:
        classifier: Functional model of square images (batch, size, size, 3) in [0, 1] whose layer names start with
            their stage, like the architectures of this package.
        num_classes: Number of classes of objects, at least 1.
        seed: Seed for the initial weights of the new layers.
        channels: Number of channels of the pyramid and of the towers, a multiple of 8. None means 256, as in the paper,
            for a backbone with at least 512 features, and 64 for a smaller one.
        tower_depth: Number of convolutions in each tower before the output, at least 0. None means 4, as in the paper,
            for a backbone with at least 512 features, and 2 for a smaller one.

    Returns:
        A Functional model of the same name, from the same input to a dict: "boxes" (batch, A, 4), the offsets of
        `boxes.encode` for each anchor of `anchors.anchors_for(detector)`, and "classes" (batch, A, num_classes), logits
        for independent sigmoids. Both are float32. The other new layers have the dtype policy of the backbone, and the
        names of all new layers begin with "head_".

    Raises:
        UserError: A number is out of range, the images have no fixed square size, or the classifier has no feature
            pyramid.

    Sources: Lin et al. 2017, arXiv 1708.02002 (RetinaNet) and arXiv 1612.03144 (feature pyramid); Wu and He 2018, arXiv
    1803.08494 (GroupNormalization).

    Example:
        >>> from robust_tf.models import build_classifier
        >>> classifier = build_classifier("resnet8", 10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> detector = build_detector(classifier, 3, seed=0)
        >>> {name: detector.output[name].shape for name in ("boxes", "classes")}
        {'boxes': (None, 765, 4), 'classes': (None, 765, 3)}
    """
    _check(classifier, num_classes=num_classes, channels=channels, tower_depth=tower_depth)
    pyramid = pyramid_of(classifier)
    features = features_layer(classifier)
    is_large = features.output.shape[-1] >= _LARGE_BACKBONE
    channels = channels or (256 if is_large else 64)
    if tower_depth is None:
        tower_depth = 4 if is_large else 2
    new = _NewLayers(channels, policy=features.dtype_policy, seed=seed)
    maps = _coarser_levels(_feature_pyramid(pyramid, new), new)
    # The initial offsets are close to 0, so that every box starts as its anchor.
    outputs = {
        "boxes": new.predictor("boxes", 4, tower_depth=tower_depth, bias=0.0),
        "classes": new.predictor("classes", num_classes, tower_depth=tower_depth, bias=-math.log((1 - PRIOR) / PRIOR)),
    }
    widths = {"boxes": 4, "classes": num_classes}
    return keras.Model(
        classifier.inputs[0],
        {name: _of_all_levels(name, maps, predict, widths[name]) for name, predict in outputs.items()},
        name=classifier.name,
    )


def _check(classifier: keras.Model, *, num_classes: int, channels: int | None, tower_depth: int | None) -> None:
    if num_classes < 1:
        raise UserError(f"A detector needs at least 1 class. Received: num_classes={num_classes}.")
    if channels is not None and (channels < 1 or channels % _CHANNELS_PER_GROUP):
        raise UserError(
            f"`channels` must be a multiple of {_CHANNELS_PER_GROUP}, since the normalization takes groups of "
            f"{_CHANNELS_PER_GROUP} channels. Received: channels={channels}. Use 64 or 256, for example."
        )
    if tower_depth is not None and tower_depth < 0:
        raise UserError(f"`tower_depth` must be at least 0. Received: tower_depth={tower_depth}.")
    height, width = classifier.input_shape[1:3]
    if height is None or height != width:
        raise UserError(
            "The anchors of a detector need square images of a fixed size. Received: a classifier of images of "
            f"{height} x {width} pixels. Build it with an image size, or use robust_tf.transfer.with_image_size."
        )


class _NewLayers:
    """Creates the layers of the head with their names, dtype policy and initial weights."""

    def __init__(self, channels: int, *, policy: object, seed: int) -> None:
        self.channels, self.policy = channels, policy
        self._rng = random.Random(seed)

    def conv(
        self, kernel_size: int, name: str, *, start: keras.initializers.Initializer | None = None, strides: int = 1
    ) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            self.channels,
            kernel_size,
            strides,
            padding="same" if strides == 1 else "valid",
            kernel_initializer=start or keras.initializers.GlorotUniform(seed=self.seed()),
            dtype=self.policy,
            name=name,
        )

    def predictor(self, output: str, width: int, *, tower_depth: int, bias: float) -> _Block:
        """Returns a function that applies a tower and the output convolution. All levels share the layers."""
        layers: list[keras.layers.Layer] = []
        groups = self.channels // _CHANNELS_PER_GROUP
        for index in range(1, tower_depth + 1):
            name = f"head_{output}_tower{index}"
            layers.append(self.conv(3, f"{name}_conv", start=keras.initializers.HeNormal(seed=self.seed())))
            # A smaller epsilon than Keras's 1e-3, which would be large for small activations.
            layers.append(keras.layers.GroupNormalization(groups, epsilon=1e-5, dtype=self.policy, name=f"{name}_norm"))
            layers.append(keras.layers.ReLU(dtype=self.policy, name=f"{name}_relu"))
        layers.append(
            keras.layers.Conv2D(
                PER_POSITION * width,
                3,
                padding="same",
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.01, seed=self.seed()),
                bias_initializer=keras.initializers.Constant(bias),
                dtype="float32",
                name=f"head_{output}_conv",
            )
        )

        def predict(x: keras.KerasTensor) -> keras.KerasTensor:
            for layer in layers:
                x = layer(x)
            return x

        return predict

    def seed(self) -> int:
        return self._rng.getrandbits(31)


def _feature_pyramid(pyramid: dict[int, keras.KerasTensor], new: _NewLayers) -> dict[int, keras.KerasTensor]:
    """Adds the upsampled coarser level to each level, then smooths each level with a convolution."""
    merged: dict[int, keras.KerasTensor] = {}
    above: keras.KerasTensor | None = None
    for level in sorted(pyramid, reverse=True):
        x = new.conv(1, f"head_lateral_p{level}")(pyramid[level])
        if above is not None:
            x = keras.layers.Add(dtype=new.policy, name=f"head_merge_p{level}")([x, _enlarged(above, x, level, new)])
        merged[level] = above = x
    return {level: new.conv(3, f"head_smooth_p{level}")(merged[level]) for level in sorted(merged)}


def _enlarged(x: keras.KerasTensor, like: keras.KerasTensor, level: int, new: _NewLayers) -> keras.KerasTensor:
    """Repeats each position and gives the map the size of `like`, which differs by less than the factor if it is odd.

    Two neighboring levels may differ by more than a factor of 2, if a stage was left out.
    """
    size = like.shape[1]
    factor = max(1, round(size / x.shape[1]))
    if factor > 1:
        x = keras.layers.UpSampling2D(factor, dtype=new.policy, name=f"head_upsample_p{level}")(x)
    surplus = x.shape[1] - size
    if surplus > 0:  # the sizes were rounded up
        x = keras.layers.Cropping2D(((0, surplus), (0, surplus)), dtype=new.policy, name=f"head_crop_p{level}")(x)
    elif surplus < 0:  # they were rounded down, as in VGG
        margin = ((0, -surplus), (0, -surplus))
        x = keras.layers.ZeroPadding2D(margin, dtype=new.policy, name=f"head_pad_p{level}")(x)
    return x


def _coarser_levels(maps: dict[int, keras.KerasTensor], new: _NewLayers) -> dict[int, keras.KerasTensor]:
    """Adds coarser levels with stride-2 convolutions, until there are enough or the map is a single position."""
    coarsest = level = max(maps)
    while len(maps) < MOST_LEVELS and maps[level].shape[1] > 1:
        x = maps[level]
        level += 1
        if level > coarsest + 1:  # the first new level follows a level without an activation, as in the paper
            x = keras.layers.ReLU(dtype=new.policy, name=f"head_coarser_p{level}_relu")(x)
        x = keras.layers.ZeroPadding2D(1, dtype=new.policy, name=f"head_coarser_p{level}_pad")(x)
        maps = maps | {level: new.conv(3, f"head_coarser_p{level}_conv", strides=2)(x)}
    return maps


def _of_all_levels(output: str, maps: dict[int, keras.KerasTensor], predict: _Block, width: int) -> keras.KerasTensor:
    """Applies a predictor to all levels and joins the anchors of all levels, (batch, A, width) float32."""
    parts = [
        keras.layers.Reshape((-1, width), dtype="float32", name=level_name(output, level))(predict(maps[level]))
        for level in sorted(maps)
    ]
    if len(parts) == 1:
        return keras.layers.Identity(dtype="float32", name=f"head_{output}")(parts[0])
    return keras.layers.Concatenate(axis=1, dtype="float32", name=f"head_{output}")(parts)
