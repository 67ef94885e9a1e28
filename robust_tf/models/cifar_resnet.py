"""ResNets for small images such as CIFAR's, with a 3x3 stem and no pooling.

* `resnet18` is the CIFAR network of the reference library. All kernels are initialized with PyTorch's default.
* `resnet_6n` is the family of He et al. 2015 (arXiv 1512.03385), section 4.2. Initialization: Kaiming-normal, fan_out.
* `wide_resnet` is the pre-activation network of Zagoruyko and Komodakis 2016 (arXiv 1605.07146). Initialization:
  Kaiming-normal, fan_out. With 28 layers and width 10 it is common in adversarial training. `wide_reference_module`
  returns the module names of the PyTorch checkpoints of this network.
"""

import keras

from robust_tf.models import resnet
from robust_tf.models.layers import Layers, mean_features, residual_blocks, torch_default

REFERENCE = Layers(kernel_start=torch_default)
KAIMING = Layers()


def resnet18(x: keras.KerasTensor) -> keras.KerasTensor:
    """Returns the features of the reference's ResNet-18 for CIFAR, (batch, 512).

    Args:
        x: Normalized images (batch, height, width, 3).
    """
    x = REFERENCE.conv_bn_relu(x, 64, 3, prefix="stem")
    return mean_features(resnet.basic_stages(x, layers=REFERENCE))


def resnet_6n(x: keras.KerasTensor, *, blocks: int, width: int = 16) -> keras.KerasTensor:
    """Returns the features of a ResNet with 6 * `blocks` + 2 layers, (batch, 4 * width).

    The shortcuts have no weights. Where the shape changes, they take every second pixel and fill the new channels with
    zeros (option A of the paper).

    Args:
        x: Normalized images (batch, height, width, 3).
        blocks: Number of residual blocks in each of the three stages; 3 gives ResNet-20.
        width: Number of channels of the first stage. It doubles from stage to stage.
    """
    x = KAIMING.conv_bn_relu(x, width, 3, prefix="stem")
    for stage, prefix, strides in residual_blocks((blocks, blocks, blocks)):
        filters = width * 2 ** (stage - 1)
        residual = KAIMING.conv_bn_relu(x, filters, 3, prefix=prefix, index="1", strides=strides)
        residual = KAIMING.conv_bn(residual, filters, 3, prefix=prefix, index="2")
        if strides == 2:
            x = keras.layers.MaxPooling2D(1, 2, name=f"{prefix}_shortcut_subsample")(x)
            # With "channels_first" the layer pads the last axis, which holds the channels here.
            new_channels = ((0, 0), (0, filters - x.shape[-1]))
            x = keras.layers.ZeroPadding2D(new_channels, "channels_first", name=f"{prefix}_shortcut_channels")(x)
        x = keras.layers.Add(name=f"{prefix}_add")([x, residual])
        x = KAIMING.relu(x, name=f"{prefix}_relu")
    return mean_features(x)


def wide_resnet(x: keras.KerasTensor, *, blocks: int, width: int) -> keras.KerasTensor:
    """Returns the features of a wide ResNet with 6 * `blocks` + 4 layers, (batch, 64 * width).

    Args:
        x: Normalized images (batch, height, width, 3).
        blocks: Number of residual blocks in each of the three stages.
        width: Factor on the channels 16, 32 and 64 of the three stages.
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
    """Returns the reference's module for a layer of `resnet18`. `resnet_6n` uses the same names.

    Args:
        layer: Name of a layer with weights.
    """
    return resnet.reference_module(layer, shortcut="shortcut", head="linear")


def wide_reference_module(layer: str) -> str:
    """Returns the module of the PyTorch implementations for a layer of `wide_resnet`.

    Args:
        layer: Name of a layer with weights.
    """
    outside = {"stem_conv": "conv1", "head_bn": "bn1", "logits": "fc"}
    if layer in outside:
        return outside[layer]
    stage, block, part = layer.split("_", 2)
    part = {"shortcut_conv": "convShortcut"}.get(part, part)
    return f"block{stage.removeprefix('stage')}.layer.{int(block.removeprefix('block')) - 1}.{part}"
