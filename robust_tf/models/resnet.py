"""ResNets for ImageNet: basic, bottleneck, wide and grouped (ResNeXt).

Initialization: Kaiming-normal with fan_out for convolutions; scale 1 and shift 0 for BatchNorm; PyTorch's default for
the head. Source: He et al. 2015 (arXiv 1512.03385), but with the stride on the 3x3 convolution of a bottleneck;
Zagoruyko and Komodakis 2016 (arXiv 1605.07146) for wide ResNets; Xie et al. 2016 (arXiv 1611.05431) for ResNeXt.
"""

import keras

from robust_tf.models.layers import Layers, max_pool_3x3, mean_features, residual_blocks

LAYERS = Layers()


def basic_stages(x: keras.KerasTensor, *, layers: Layers) -> keras.KerasTensor:
    """Applies the four stages of ResNet-18, whose blocks have two 3x3 convolutions and a shortcut.

    Args:
        x: Output of the stem, (batch, height, width, 64).
        layers: Layers of the family.
    """
    for stage, prefix, strides in residual_blocks((2, 2, 2, 2)):
        filters = 64 * 2 ** (stage - 1)
        residual = layers.conv_bn_relu(x, filters, 3, prefix=prefix, index="1", strides=strides)
        residual = layers.conv_bn(residual, filters, 3, prefix=prefix, index="2")
        x = _add_shortcut(x, residual, prefix=prefix, strides=strides, layers=layers)
    return x


def _bottleneck_block(
    x: keras.KerasTensor, filters: int, *, prefix: str, strides: int, width: int, groups: int
) -> keras.KerasTensor:
    """Applies a 1x1, a 3x3 and a 1x1 convolution with a shortcut.

    Args:
        x: Input (batch, height, width, channels).
        filters: Number of output channels.
        prefix: Beginning of the names of the layers.
        strides: Strides of the 3x3 convolution and of the shortcut.
        width: Number of channels of the 3x3 convolution.
        groups: Number of groups of the 3x3 convolution.
    """
    residual = LAYERS.conv_bn_relu(x, width, 1, prefix=prefix, index="1")
    residual = LAYERS.conv_bn_relu(residual, width, 3, prefix=prefix, index="2", strides=strides, groups=groups)
    residual = LAYERS.conv_bn(residual, filters, 1, prefix=prefix, index="3")
    return _add_shortcut(x, residual, prefix=prefix, strides=strides, layers=LAYERS)


def _add_shortcut(
    x: keras.KerasTensor, residual: keras.KerasTensor, *, prefix: str, strides: int, layers: Layers
) -> keras.KerasTensor:
    """Returns relu(shortcut(x) + residual). The shortcut is a 1x1 convolution with BatchNorm if the shapes differ."""
    if x.shape != residual.shape:
        x = layers.conv_bn(x, residual.shape[-1], 1, prefix=f"{prefix}_shortcut", strides=strides)
    x = keras.layers.Add(name=f"{prefix}_add")([x, residual])
    return layers.relu(x, name=f"{prefix}_relu")


def resnet18(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of ResNet-18, (batch, 512).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    return mean_features(basic_stages(_stem(x), layers=LAYERS))


def resnet50(x: keras.KerasTensor, *, base_width: int = 64, groups: int = 1) -> keras.KerasTensor:
    """Returns the features of ResNet-50, of a wide ResNet-50, or of ResNeXt-50, (batch, 2048).

    Args:
        x: Normalized images (batch, height, width, 3).
        base_width: Number of channels per group of the 3x3 convolutions in the first stage. It doubles from stage to
            stage.
        groups: Number of groups of the 3x3 convolutions.
    """
    x = _stem(x)
    for stage, prefix, strides in residual_blocks((3, 4, 6, 3)):
        scale = 2 ** (stage - 1)
        width = base_width * groups * scale
        x = _bottleneck_block(x, 256 * scale, prefix=prefix, strides=strides, width=width, groups=groups)
    return mean_features(x)


def _stem(x: keras.KerasTensor) -> keras.KerasTensor:
    x = LAYERS.conv_bn_relu(x, 64, 7, prefix="stem", strides=2)
    return max_pool_3x3(x, name="stem_pool")


def reference_module(layer: str, *, shortcut: str = "downsample", head: str = "fc") -> str:
    """Returns the reference's module for a layer, such as layer1.0.conv2 for stage1_block1_conv2.

    Args:
        layer: Name of a layer with weights.
        shortcut: The reference's name of the projection in a shortcut.
        head: The reference's name of the last linear layer.
    """
    outside = {"stem_conv": "conv1", "stem_bn": "bn1", "logits": head}
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_", 2)
    part = {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}.get(part, part)
    return f"layer{stage.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}.{part}"
