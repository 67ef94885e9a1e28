"""MNASNet-B1 with depth multiplier 1.

Initialization: Kaiming-normal with fan_out for convolutions; uniform with variance 1 / num_classes for the kernel of
the head, zeros for its bias. As in the reference, each step replaces only 0.0003 of BatchNorm's moving statistics.
Source: Tan et al. 2019 (arXiv 1807.11626).
"""

import keras

from robust_tf.models.layers import Layers
from robust_tf.models.mobilenet import inverted_residual, pooled_head

LAYERS = Layers(batch_norm_momentum=0.9997)
# (expansion, channels, blocks, strides of the first block, kernel size) of each stage
STAGES = ((3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))


def mnasnet1_0(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of MNASNet, (batch, 1280).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    x = LAYERS.conv_bn_relu(x, 32, 3, prefix="stem", strides=2)
    x = inverted_residual(x, 16, prefix="stem_block", expansion=1, layers=LAYERS)
    for stage, (expansion, filters, blocks, stage_strides, kernel_size) in enumerate(STAGES, start=1):
        for block in range(1, blocks + 1):
            x = inverted_residual(
                x,
                filters,
                prefix=f"stage{stage}_block{block}",
                expansion=expansion,
                layers=LAYERS,
                kernel_size=kernel_size,
                strides=stage_strides if block == 1 else 1,
            )
    return pooled_head(LAYERS.conv_bn_relu(x, 1280, 1, prefix="head"))


def reference_module(layer: str) -> str:
    """Returns the reference's module for a layer. The reference numbers all modules, including activations.

    Args:
        layer: Name of a layer with weights.
    """
    outside = {
        "stem_conv": "layers.0",
        "stem_bn": "layers.1",
        "stem_block_conv2": "layers.3",
        "stem_block_bn2": "layers.4",
        "stem_block_conv3": "layers.6",
        "stem_block_bn3": "layers.7",
        "head_conv": "layers.14",
        "head_bn": "layers.15",
        "logits": "classifier.1",
    }
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_")
    place = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}[part]
    return f"layers.{int(stage.removeprefix('stage')) + 7}.{int(block.removeprefix('block')) - 1}.layers.{place}"
