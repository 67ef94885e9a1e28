"""The feature pyramid of a classifier: the output of its backbone at several resolutions."""

import math

import keras

from robust_tf.errors import UserError
from robust_tf.transfer.stages import HEAD, stages

MINIMUM_STRIDE = 4
_ACTIVATIONS = (keras.layers.ReLU, keras.layers.Activation)
_POOLINGS = (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D)


def pyramid_of(classifier: keras.Model, *, levels: int = 3) -> dict[int, keras.KerasTensor]:
    """Returns the last feature map of each resolution in the backbone of a classifier.

    A feature map is the output at the end of a stage. A stage that ends with a pooling layer has two ends: the last
    activation before the pooling, and the output of the pooling.

    Args:
        classifier: Flat functional model whose layer names start with their stage, like the architectures of this
            package.
        levels: Largest number of feature maps; the coarsest ones are returned.

    Returns:
        The feature maps (batch, height, width, channels) by level, finest first. The level is the base-2 logarithm of
        the stride, so one position at level 3 stands for 8 x 8 pixels. ResNet-50 has the levels 3, 4 and 5. Strides
        below 4 are left out, so that the CIFAR-type networks have the level 2 alone.

    Raises:
        UserError: A layer with weights belongs to no stage, or no stage has a feature map of stride 4 or more.

    Source: Lin et al. 2017, arXiv 1612.03144, section 3 (choice of the feature maps).

    Example:
        >>> from robust_tf.models import build_classifier
        >>> classifier = build_classifier("resnet18", 10, image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> {level: tensor.shape[1:] for level, tensor in pyramid_of(classifier).items()}
        {3: (8, 8, 128), 4: (4, 4, 256), 5: (2, 2, 512)}
    """
    if levels < 1:
        raise UserError(f"A pyramid needs at least 1 level. Received: levels={levels}.")
    found = feature_maps(classifier)
    usable = [stride for stride in found if stride >= MINIMUM_STRIDE and math.log2(stride).is_integer()]
    if not usable:
        raise UserError(
            "The pyramid needs a stage with feature maps (batch, height, width, channels) of a stride of "
            f"{MINIMUM_STRIDE} pixels or more. Received: {classifier.name!r} with the stages "
            f"{', '.join(stages(classifier))} and feature maps of stride {', '.join(map(str, found)) or 'none'}. Use a "
            "classifier of one of the architectures in robust_tf.models.ARCHITECTURES."
        )
    return {int(math.log2(stride)): found[stride] for stride in usable[-levels:]}


def feature_maps(classifier: keras.Model) -> dict[int, keras.KerasTensor]:
    """Returns the last feature map of each stride in the backbone of a classifier, see `pyramid_of`.

    Args:
        classifier: Flat functional model whose layer names start with their stage.

    Returns:
        The feature maps (batch, height, width, channels) by stride, finest first.

    Raises:
        UserError: A layer with weights belongs to no stage.
    """
    strides = _strides(classifier)
    found: dict[int, keras.KerasTensor] = {}
    for stage, layers in stages(classifier).items():
        for tensor in _ends(stage, layers):
            if id(tensor) in strides:
                found[strides[id(tensor)]] = tensor  # a later stage of the same stride replaces an earlier one
    return {stride: found[stride] for stride in sorted(found)}


def _ends(stage: str, layers: list[keras.layers.Layer]) -> list[keras.KerasTensor]:
    """Returns the feature maps at the end of a stage: usually one, and two if the stage ends with a pooling layer."""
    maps = [layer for layer in layers if _is_map(layer)]
    if stage == HEAD:
        # Pooling to a fixed size, as in VGG, has no stride. The layers before it end with an activation.
        maps = [layer for layer in maps if isinstance(layer, _ACTIVATIONS)]
    if not maps:
        return []
    last = maps[-1]
    activations = [layer for layer in maps if isinstance(layer, _ACTIVATIONS)]
    if isinstance(last, _POOLINGS) and activations:
        return [activations[-1].output, last.output]
    return [last.output]


def _is_map(layer: keras.layers.Layer) -> bool:
    output = layer.output
    return isinstance(output, keras.KerasTensor) and len(output.shape) == 4


def _strides(classifier: keras.Model) -> dict[int, int]:
    """Returns the stride of each tensor of a functional model, by the identity of the tensor.

    The strides of the layers are multiplied, since the ratio of two sizes does not tell the stride of small maps: an
    image of 47 pixels may have a single position at stride 32, or at stride 64.
    """
    strides: dict[int, int] = {}
    for operation in classifier.operations:
        if isinstance(operation, keras.layers.InputLayer):
            stride = 1
        else:
            before = [strides[id(tensor)] for tensor in keras.tree.flatten(operation.input) if id(tensor) in strides]
            stride = max(before, default=1) * _stride_of(operation)
        for tensor in keras.tree.flatten(operation.output):
            strides[id(tensor)] = stride
    return strides


def _stride_of(operation: object) -> int:
    strides = getattr(operation, "strides", 1)
    return max(strides) if isinstance(strides, (tuple, list)) else int(strides or 1)
