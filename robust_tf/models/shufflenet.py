"""ShuffleNetV2 with width 1.

Initialization: PyTorch's default for all layers. Source: Ma et al. 2018 (arXiv 1807.11164).
"""

import keras

from robust_tf.models.layers import Layers, max_pool_3x3, mean_features, shuffle_channels, torch_default

LAYERS = Layers(kernel_start=torch_default)
STAGES = ((116, 4), (232, 8), (464, 4))  # (channels, blocks) of each stage


def shufflenet_v2_x1_0(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of ShuffleNetV2, (batch, 1024).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    x = LAYERS.conv_bn_relu(x, 24, 3, prefix="stem", strides=2)
    x = max_pool_3x3(x, name="stem_pool")
    for stage, (filters, blocks) in enumerate(STAGES, start=1):
        for block in range(1, blocks + 1):
            x = _block(x, filters, prefix=f"stage{stage}_block{block}", strides=2 if block == 1 else 1)
    return mean_features(LAYERS.conv_bn_relu(x, 1024, 1, prefix="head"))


def _block(x: keras.KerasTensor, filters: int, *, prefix: str, strides: int) -> keras.KerasTensor:
    """Sends one half of the channels through the long branch, the other through the short one, and interleaves them."""
    half = filters // 2
    if strides == 1:
        short, long = keras.ops.split(x, 2, axis=-1)
    else:
        short_prefix = f"{prefix}_short"
        short = LAYERS.conv_bn(x, x.shape[-1], 3, prefix=short_prefix, index="1", strides=strides, groups=x.shape[-1])
        short = LAYERS.conv_bn_relu(short, half, 1, prefix=short_prefix, index="2")
        long = x
    long = LAYERS.conv_bn_relu(long, half, 1, prefix=prefix, index="1")
    long = LAYERS.conv_bn(long, half, 3, prefix=prefix, index="2", strides=strides, groups=half)
    long = LAYERS.conv_bn_relu(long, half, 1, prefix=prefix, index="3")

    x = keras.layers.Concatenate(name=f"{prefix}_concat")([short, long])
    return shuffle_channels(x, 2)


def reference_module(layer: str) -> str:
    """Returns the reference's module for a layer. The reference calls the first stage stage2, after conv1.

    Args:
        layer: Name of a layer with weights.
    """
    outside = {
        "stem_conv": "conv1.0",
        "stem_bn": "conv1.1",
        "head_conv": "conv5.0",
        "head_bn": "conv5.1",
        "logits": "fc",
    }
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_", 2)
    place = {
        "short_conv1": "branch1.0",
        "short_bn1": "branch1.1",
        "short_conv2": "branch1.2",
        "short_bn2": "branch1.3",
        "conv1": "branch2.0",
        "bn1": "branch2.1",
        "conv2": "branch2.3",
        "bn2": "branch2.4",
        "conv3": "branch2.5",
        "bn3": "branch2.6",
    }[part]
    return f"stage{int(stage.removeprefix('stage')) + 1}.{int(block.removeprefix('block')) - 1}.{place}"
