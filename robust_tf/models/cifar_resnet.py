"""ResNets for small images (CIFAR and the like): a 3x3 stem without pooling.

`resnet18` is the reference library's CIFAR network: all kernels start as PyTorch's convolutions do by default.
`resnet_6n` is the family of He et al. 2015 (arXiv 1512.03385), section 4.2, Kaiming-normal over fan_out.
`wide_resnet` is the pre-activation network of Zagoruyko and Komodakis 2016 (arXiv 1605.07146), Kaiming-normal over
fan_out too; the wide_resnet28_10 of adversarial training, with the module names that its PyTorch checkpoints use.
"""

import keras

from robust_tf.models import resnet
from robust_tf.models.layers import Layers, mean_features, residual_blocks, torch_default

REFERENCE = Layers(kernel_start=torch_default)
KAIMING = Layers()


def resnet18(x: keras.KerasTensor) -> keras.KerasTensor:
    """The reference's ResNet-18 for CIFAR: (batch, height, width, 3) normalised images to (batch, 512) features."""
    x = REFERENCE.conv_bn_relu(x, 64, 3, prefix="stem")
    return mean_features(resnet.basic_stages(x, layers=REFERENCE))


def resnet_6n(x: keras.KerasTensor, *, blocks: int, width: int = 16) -> keras.KerasTensor:
    """ResNet with 6 x `blocks` + 2 layers: (batch, height, width, 3) normalised images to (batch, 4 x width) features.

    Shortcuts have no weights: where the shape changes, every second pixel and zeros for the new channels (option A
    of the paper).

    Args:
        x: the images.
        blocks: residual blocks in each of the three stages; 3 gives ResNet-20.
        width: channels of the first stage, doubled from stage to stage.
    """
    x = KAIMING.conv_bn_relu(x, width, 3, prefix="stem")
    for stage, prefix, strides in residual_blocks((blocks, blocks, blocks)):
        filters = width * 2 ** (stage - 1)
        residual = KAIMING.conv_bn_relu(x, filters, 3, prefix=prefix, index="1", strides=strides)
        residual = KAIMING.conv_bn(residual, filters, 3, prefix=prefix, index="2")
        if strides == 2:
            x = keras.layers.MaxPooling2D(1, 2, name=f"{prefix}_shortcut_subsample")(x)
            # Read as channels-first, the last axis is a side of the image, which this layer can pad.
            new_channels = ((0, 0), (0, filters - x.shape[-1]))
            x = keras.layers.ZeroPadding2D(new_channels, "channels_first", name=f"{prefix}_shortcut_channels")(x)
        x = keras.layers.Add(name=f"{prefix}_add")([x, residual])
        x = KAIMING.relu(x, name=f"{prefix}_relu")
    return mean_features(x)


def wide_resnet(x: keras.KerasTensor, *, blocks: int, width: int) -> keras.KerasTensor:
    """Wide ResNet with 6 x `blocks` + 4 layers: normalised images to (batch, 64 x width) features.

    Args:
        x: the images, (batch, height, width, 3).
        blocks: residual blocks in each of the three stages.
        width: the factor on the channels 16, 32 and 64.
    """
    x = KAIMING.conv(x, 16, 3, name="stem_conv")
    for stage, prefix, strides in residual_blocks((blocks, blocks, blocks)):
        x = _preactivation_block(x, 16 * width * 2 ** (stage - 1), prefix=prefix, strides=strides)
    x = KAIMING.relu(KAIMING.batch_norm(x, name="head_bn"), name="head_relu")
    return mean_features(x)


def _preactivation_block(x: keras.KerasTensor, filters: int, *, prefix: str, strides: int) -> keras.KerasTensor:
    activated = KAIMING.relu(KAIMING.batch_norm(x, name=f"{prefix}_bn1"), name=f"{prefix}_relu1")
    residual = KAIMING.conv(activated, filters, 3, name=f"{prefix}_conv1", strides=strides)
    residual = KAIMING.relu(KAIMING.batch_norm(residual, name=f"{prefix}_bn2"), name=f"{prefix}_relu2")
    residual = KAIMING.conv(residual, filters, 3, name=f"{prefix}_conv2")
    if x.shape != residual.shape:
        x = KAIMING.conv(activated, filters, 1, name=f"{prefix}_shortcut_conv", strides=strides)
    return keras.layers.Add(name=f"{prefix}_add")([x, residual])


def reference_module(layer: str) -> str:
    """The reference's module for one of our layers of `resnet18`; `resnet_6n` is written out the same way."""
    return resnet.reference_module(layer, shortcut="shortcut", head="linear")


def wide_reference_module(layer: str) -> str:
    """The module of the PyTorch implementations for one of our layers of `wide_resnet`."""
    outside = {"stem_conv": "conv1", "head_bn": "bn1", "logits": "fc"}
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_", 2)
    part = {"shortcut_conv": "convShortcut"}.get(part, part)
    return f"block{stage.removeprefix('stage')}.layer.{int(block.removeprefix('block')) - 1}.{part}"
