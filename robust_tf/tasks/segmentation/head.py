"""Turns a classifier into a segmenter: the head of DeepLabV3+ on the backbone of the classifier."""

import dataclasses
import random
from typing import Any

import keras

from robust_tf.errors import UserError
from robust_tf.models.representation import features_layer
from robust_tf.tasks.pyramid import feature_maps
from robust_tf.transfer.stages import stages

LOGITS, LAST = "head_mask_logits", "head_mask"

# DeepLab dilates by 6, 12 and 18 on the maps of its training, 33 pixels a side: images of 513 pixels at stride 16.
_UNIT_DILATION, _PUBLISHED_SIZE = 6, 33

# GroupNormalization with 16 channels a group, one of the settings that Wu and He 2018 (arXiv 1803.08494) found best.
_CHANNELS_PER_GROUP = 16


def build_segmenter(classifier: keras.Model, num_classes: int, *, seed: int) -> keras.Model:
    """Returns a model that predicts the class of every pixel, with a new head on the backbone of a classifier.

    The head is the one of DeepLabV3+. Atrous spatial pyramid pooling sees the last map of the backbone at five scales:
    each pixel alone, three 3x3 convolutions with growing dilation, and the mean of the whole map. The decoder enlarges
    the result, adds a map of about four times the resolution, and predicts logits from both, which are enlarged to the
    size of the images.

    The backbone is shared, not copied, and keeps its strides, so its weights can be used as they are. The head differs
    from the paper in three ways:

    * **Dilation.** The paper's rates suit maps of 33 pixels a side. Here they are in proportion to the side of the map,
      see `dilation_rates`, because a dilated kernel that is larger than the map sees only its center.
    * **Width.** The paper's 256 channels are the maximum. A backbone with fewer channels, such as ResNet-20 with 64,
      gets a narrower head, which would otherwise cost many times as much as the backbone.
    * **Normalization.** GroupNormalization instead of BatchNormalization. Segmentation is trained with few images in a
      batch, whose statistics are noisy. GroupNormalization treats every image alone, so the head computes the same
      function in training and in inference mode, where the attacks run, also while the backbone is frozen.

    Args:
        classifier: Functional model of images (batch, height, width, channels) in [0, 1] of a fixed size, whose layer
            names start with their stage, like the architectures of this package.
        num_classes: Number of classes of the pixels, at least 2.
        seed: Seed for the initial weights.

    Returns:
        A functional model of the same name, from the same input to logits (batch, height, width, num_classes) in
        float32. Its last two layers are "head_mask_logits" and "head_mask". All its layers are Keras's own, so it can
        be loaded without this package.

    Raises:
        UserError: There are fewer than 2 classes, the size of the images is open, or no stage has a map.

    Source: Chen et al. 2018, arXiv 1802.02611, sections 3.1 and 3.2.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> classifier = build_classifier("resnet8", 10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> segmenter = build_segmenter(classifier, 3, seed=0)
        >>> segmenter.output_shape
        (None, 32, 32, 3)
        >>> [layer.name for layer in segmenter.layers[-2:]]
        ['head_mask_logits', 'head_mask']
    """
    if num_classes < 2:
        raise UserError(f"A segmenter needs at least 2 classes. Received: num_classes={num_classes}.")
    images = classifier.inputs[0]
    height, width = images.shape[1:3]
    if height is None or width is None:
        raise UserError(
            f"A segmenter needs images of a fixed size. Received: a classifier of images of shape {images.shape}. Copy "
            "it with robust_tf.transfer.with_image_size first."
        )
    deep, fine = _deep_and_fine(classifier)
    channels, dtype = deep.shape[-1], features_layer(classifier).dtype_policy
    most = min(256, max(64, channels - channels % _CHANNELS_PER_GROUP))
    head = _Head(most, dtype, random.Random(seed))

    x = head.pyramid(deep)
    x = _resize(x, fine.shape[1:3], name="head_enlarged", dtype=dtype)
    # 48 of 256 channels in the paper: the fine map must not outweigh the deep one.
    few = max(_CHANNELS_PER_GROUP, most * 3 // 16 // _CHANNELS_PER_GROUP * _CHANNELS_PER_GROUP)
    details = head.conv(fine, 1, prefix="head_fine", filters=few)
    x = keras.layers.Concatenate(dtype=dtype, name="head_concat")([x, details])
    for index in (1, 2):
        x = head.conv(x, 3, prefix=f"head_decoder{index}")
    # Not a much smaller deviation such as 0.01. The layers below would get almost no gradient, and small segmenters
    # would make no progress for hundreds of steps.
    start = keras.initializers.GlorotUniform(seed=head.next_seed())
    x = keras.layers.Conv2D(num_classes, 1, kernel_initializer=start, dtype="float32", name=LOGITS)(x)
    x = _resize(x, (height, width), name=LAST, dtype="float32")
    return keras.Model(images, x, name=classifier.name)


def dilation_rates(size: int) -> tuple[int, int, int]:
    """Returns the dilation of the three 3x3 convolutions for a map of this size.

    The rates are in proportion to the side, and on the paper's 33 pixels they are the paper's 6, 12 and 18. They are at
    least 1, 2 and 3, so that the three convolutions differ, but below the side, so that each of them sees more than the
    center of its kernel.

    Args:
        size: Height or width of the map, whichever is smaller, in pixels.

    Example:
        >>> {size: dilation_rates(size) for size in (2, 8, 16, 33, 64)}
        {2: (1, 1, 1), 8: (1, 2, 3), 16: (3, 6, 9), 33: (6, 12, 18), 64: (12, 24, 36)}
    """
    unit = max(1, round(_UNIT_DILATION * size / _PUBLISHED_SIZE))
    first, second, third = (max(1, min(factor * unit, size - 1)) for factor in (1, 2, 3))
    return first, second, third


@dataclasses.dataclass(frozen=True)
class _Head:
    """Creates the layers of the head.

    Attributes:
        filters: Number of channels of most convolutions.
        dtype: Dtype policy of the layers.
        rng: Source of the seeds for the initial weights.
    """

    filters: int
    dtype: Any
    rng: random.Random

    def next_seed(self) -> int:
        return self.rng.getrandbits(31)

    def conv(
        self, x: keras.KerasTensor, kernel_size: int, *, prefix: str, dilation: int = 1, filters: int | None = None
    ) -> keras.KerasTensor:
        """Applies a convolution, GroupNormalization and ReLU."""
        filters = filters or self.filters
        x = keras.layers.Conv2D(
            filters,
            kernel_size,
            padding="same",
            dilation_rate=dilation,
            use_bias=False,  # the normalization adds one
            kernel_initializer=keras.initializers.HeNormal(seed=self.next_seed()),
            dtype=self.dtype,
            name=f"{prefix}_conv",
        )(x)
        groups = filters // _CHANNELS_PER_GROUP
        x = keras.layers.GroupNormalization(groups, epsilon=1e-5, dtype=self.dtype, name=f"{prefix}_norm")(x)
        return keras.layers.ReLU(dtype=self.dtype, name=f"{prefix}_relu")(x)

    def pyramid(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Applies atrous spatial pyramid pooling, (batch, height, width, filters)."""
        height, width = x.shape[1:3]
        branches = [self.conv(x, 1, prefix="head_pyramid1")]
        for index, rate in enumerate(dilation_rates(min(height, width)), start=2):
            branches.append(self.conv(x, 3, prefix=f"head_pyramid{index}", dilation=rate))
        mean = keras.layers.GlobalAveragePooling2D(
            data_format="channels_last", keepdims=True, dtype=self.dtype, name="head_pyramid5_pool"
        )(x)
        mean = self.conv(mean, 1, prefix="head_pyramid5")
        branches.append(
            keras.layers.UpSampling2D(
                (height, width), data_format="channels_last", dtype=self.dtype, name="head_pyramid5_repeat"
            )(mean)
        )
        x = keras.layers.Concatenate(dtype=self.dtype, name="head_pyramid_concat")(branches)
        return self.conv(x, 1, prefix="head_pyramid")


def _resize(x: keras.KerasTensor, size: tuple[int, int], *, name: str, dtype: Any) -> keras.KerasTensor:
    return keras.layers.Resizing(*size, interpolation="bilinear", data_format="channels_last", dtype=dtype, name=name)(
        x
    )


def _deep_and_fine(classifier: keras.Model) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Returns the last map of the backbone, and one of about four times its size."""
    maps = list(feature_maps(classifier).values())
    if not maps:
        raise UserError(
            "A segmenter needs a backbone with feature maps (batch, height, width, channels). Received: "
            f"{classifier.name!r} with the stages {', '.join(stages(classifier)) or 'none'}. Use a classifier of one "
            "of the architectures in robust_tf.models.ARCHITECTURES."
        )
    deep = maps[-1]
    wanted = 4 * deep.shape[1]
    # If two are equally far away, the finer one has more of the details that the decoder is for.
    return deep, min(maps, key=lambda tensor: (abs(tensor.shape[1] - wanted), -tensor.shape[1]))
