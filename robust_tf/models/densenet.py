"""DenseNet-161.

Initialization: Kaiming-normal with fan_in for convolutions; PyTorch's default for the kernel of the head, zeros for its
bias. Source: Huang et al. 2016 (arXiv 1608.06993).
"""

import keras

from robust_tf.models.layers import Layers, kaiming_fan_in, max_pool_3x3, mean_features

LAYERS = Layers(kernel_start=kaiming_fan_in)
GROWTH = 48
BLOCKS = (6, 12, 36, 24)  # number of dense layers in each stage


def densenet161(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of DenseNet-161, (batch, 2208).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    x = LAYERS.conv_bn_relu(x, 2 * GROWTH, 7, prefix="stem", strides=2)
    x = max_pool_3x3(x, name="stem_pool")
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            y = _bn_relu_conv(x, 4 * GROWTH, 1, prefix=prefix, index="1")
            y = _bn_relu_conv(y, GROWTH, 3, prefix=prefix, index="2")
            x = keras.layers.Concatenate(name=f"{prefix}_concat")([x, y])
        if stage < len(BLOCKS):
            prefix = f"stage{stage}_transition"
            x = _bn_relu_conv(x, x.shape[-1] // 2, 1, prefix=prefix)
            x = keras.layers.AveragePooling2D(2, name=f"{prefix}_pool")(x)
    x = LAYERS.relu(LAYERS.batch_norm(x, name="head_bn"), name="head_relu")
    return mean_features(x)


def _bn_relu_conv(
    x: keras.KerasTensor, filters: int, kernel_size: int, *, prefix: str, index: str = ""
) -> keras.KerasTensor:
    x = LAYERS.batch_norm(x, name=f"{prefix}_bn{index}")
    x = LAYERS.relu(x, name=f"{prefix}_relu{index}")
    return LAYERS.conv(x, filters, kernel_size, name=f"{prefix}_conv{index}")


def reference_module(layer: str) -> str:
    """Returns the reference's module for a layer, such as features.denseblock1.denselayer2.norm1.

    Args:
        layer: Name of a layer with weights.
    """
    outside = {
        "stem_conv": "features.conv0",
        "stem_bn": "features.norm0",
        "head_bn": "features.norm5",
        "logits": "classifier",
    }
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_")
    number = stage.removeprefix("stage")
    part = part.replace("bn", "norm")
    if block == "transition":
        return f"features.transition{number}.{part}"
    return f"features.denseblock{number}.denselayer{block.removeprefix('block')}.{part}"
