"""MobileNetV2, and the inverted residual block that it shares with MNASNet.

Initialization: Kaiming-normal with fan_out for convolutions; normal with standard deviation 0.01 for the kernel of the
head, zeros for its bias. Source: Sandler et al. 2018 (arXiv 1801.04381).
"""

import keras

from robust_tf.models.layers import Layers

LAYERS = Layers(relu_maximum=6.0)
# (expansion, channels, blocks, strides of the first block) of each stage
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def inverted_residual(
    x: keras.KerasTensor,
    filters: int,
    *,
    prefix: str,
    expansion: int,
    layers: Layers,
    kernel_size: int = 3,
    strides: int = 1,
) -> keras.KerasTensor:
    """Applies an inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection.

    The input is added to the result if the shapes agree.

    Args:
        x: Input (batch, height, width, channels).
        filters: Number of output channels.
        prefix: Beginning of the names of the layers.
        expansion: Factor on the number of channels in the expansion, which is left out if the factor is 1.
        layers: Layers of the family.
        kernel_size: Height and width of the kernel of the depthwise convolution.
        strides: Strides of the depthwise convolution.
    """
    width = x.shape[-1] * expansion
    y = x if expansion == 1 else layers.conv_bn_relu(x, width, 1, prefix=prefix, index="1")
    y = layers.conv_bn_relu(y, width, kernel_size, prefix=prefix, index="2", strides=strides, groups=width)
    y = layers.conv_bn(y, filters, 1, prefix=prefix, index="3")
    if strides == 1 and x.shape[-1] == filters:
        y = keras.layers.Add(name=f"{prefix}_add")([x, y])
    return y


def mobilenet_v2(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of MobileNetV2 with width 1, (batch, 1280).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    x = LAYERS.conv_bn_relu(x, 32, 3, prefix="stem", strides=2)
    for stage, (expansion, filters, blocks, stage_strides) in enumerate(STAGES, start=1):
        for block in range(1, blocks + 1):
            strides = stage_strides if block == 1 else 1
            prefix = f"stage{stage}_block{block}"
            x = inverted_residual(x, filters, prefix=prefix, expansion=expansion, layers=LAYERS, strides=strides)
    return pooled_head(LAYERS.conv_bn_relu(x, 1280, 1, prefix="head"))


def pooled_head(x: keras.KerasTensor) -> keras.KerasTensor:
    """Applies the mean over all positions, then dropout with rate 0.2 as the layer "features".

    Args:
        x: Input (batch, height, width, channels).
    """
    x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
    return keras.layers.Dropout(0.2, name="features")(x)


def reference_module(layer: str) -> str:
    """Returns the reference's module for a layer. The reference numbers the blocks of all stages consecutively.

    Args:
        layer: Name of a layer with weights.
    """
    outside = {
        "stem_conv": "features.0.0",
        "stem_bn": "features.0.1",
        "head_conv": "features.18.0",
        "head_bn": "features.18.1",
        "logits": "classifier.1",
    }
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_")
    number = int(stage.removeprefix("stage"))
    index = int(block.removeprefix("block")) + sum(blocks for _, _, blocks, _ in STAGES[: number - 1])
    parts = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]
    places = ["0.0", "0.1", "1.0", "1.1", "2", "3"]
    if number == 1:  # no expansion: the block starts with the depthwise convolution
        parts, places = parts[2:], ["0.0", "0.1", "1", "2"]
    return f"features.{index}.conv.{places[parts.index(part)]}"
