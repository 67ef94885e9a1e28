"""The table of architectures, and the function that builds a classifier from it.

To add an architecture:

1. Write a function that maps normalized images (batch, height, width, 3) to features (batch, feature_dim), in a new
   file of this folder; `resnet.py` is a complete example. Take convolutions, BatchNorm and activations from a `Layers`
   object of `layers.py`. Name the layers "stem_...", "stage1_...", "stage2_...", ..., "head_...", since stages are
   frozen and given learning rates by these names. The last layer must be called "features" and have no weights.
2. Write `reference_module`, which translates the name of a layer into the name of its module in PyTorch. Checkpoints
   are converted with it.
3. Add an entry to `ARCHITECTURES`, below. Now `build_classifier` and the flag --architecture accept the name.
4. `tests/models/test_architectures.py` checks every entry of the table. Add tests for what only the new one does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import keras

from robust_tf.errors import UserError, unknown_name
from robust_tf.models import cifar_resnet, densenet, mnasnet, mobilenet, resnet, shufflenet, vgg
from robust_tf.models.layers import Start, normal_001, torch_default, uniform_fan_out, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """An entry of the table of architectures.

    Attributes:
        backbone: Function that maps normalized images (batch, size, size, 3) to the output of the layer "features".
        feature_dim: Number of features.
        parameters: Number of trainable parameters of the backbone, without the head.
        reference_module: Function that maps the name of a layer with weights to the name of the reference's module.
        reference_name: Name of the architecture in the reference's programs, or None if they do not have it.
        minimum_image_size: Smallest height and width of the images, in pixels. With smaller images, the input of some
            layer would be empty.
        head_kernel: Initializer of the head's kernel.
        head_bias: Initializer of the head's bias.

    Example:
        >>> ARCHITECTURES["resnet50"].feature_dim
        2048
    """

    backbone: Callable[[keras.KerasTensor], keras.KerasTensor]
    feature_dim: int
    parameters: int
    reference_module: Callable[[str], str]
    reference_name: str | None = None
    minimum_image_size: int = 1
    head_kernel: Start = torch_default
    head_bias: Start = torch_default


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(
        backbone=resnet.resnet18,
        feature_dim=512,
        parameters=11_176_512,
        reference_module=resnet.reference_module,
        reference_name="resnet18",
    ),
    "resnet50": Architecture(
        backbone=resnet.resnet50,
        feature_dim=2048,
        parameters=23_508_032,
        reference_module=resnet.reference_module,
        reference_name="resnet50",
    ),
    "wide_resnet50_2": Architecture(
        backbone=functools.partial(resnet.resnet50, base_width=128),
        feature_dim=2048,
        parameters=66_834_240,
        reference_module=resnet.reference_module,
        reference_name="wide_resnet50_2",
    ),
    "wide_resnet50_4": Architecture(
        backbone=functools.partial(resnet.resnet50, base_width=256),
        feature_dim=2048,
        parameters=221_390_144,
        reference_module=resnet.reference_module,
        reference_name="wide_resnet50_4",
    ),
    "resnext50_32x4d": Architecture(
        backbone=functools.partial(resnet.resnet50, base_width=4, groups=32),
        feature_dim=2048,
        parameters=22_979_904,
        reference_module=resnet.reference_module,
        reference_name="resnext50_32x4d",
    ),
    "densenet161": Architecture(
        backbone=densenet.densenet161,
        feature_dim=2208,
        parameters=26_472_000,
        reference_module=densenet.reference_module,
        reference_name="densenet",
        minimum_image_size=29,  # 8 pixels a side after the stem, halved three times
        head_bias=zeros,
    ),
    "mnasnet1_0": Architecture(
        backbone=mnasnet.mnasnet1_0,
        feature_dim=1280,
        parameters=3_102_312,
        reference_module=mnasnet.reference_module,
        reference_name="mnasnet",
        head_kernel=uniform_fan_out,
        head_bias=zeros,
    ),
    "mobilenet_v2": Architecture(
        backbone=mobilenet.mobilenet_v2,
        feature_dim=1280,
        parameters=2_223_872,
        reference_module=mobilenet.reference_module,
        reference_name="mobilenet",
        head_kernel=normal_001,
        head_bias=zeros,
    ),
    "shufflenet_v2_x1_0": Architecture(
        backbone=shufflenet.shufflenet_v2_x1_0,
        feature_dim=1024,
        parameters=1_253_604,
        reference_module=shufflenet.reference_module,
        reference_name="shufflenet",
    ),
    "vgg16_bn": Architecture(
        backbone=vgg.vgg16_bn,
        feature_dim=4096,
        parameters=134_268_992,
        reference_module=vgg.reference_module,
        reference_name="vgg16_bn",
        minimum_image_size=32,  # halved five times
        head_kernel=normal_001,
        head_bias=zeros,
    ),
    "cifar_resnet18": Architecture(
        backbone=cifar_resnet.resnet18,
        feature_dim=512,
        parameters=11_168_832,
        reference_module=cifar_resnet.reference_module,
        reference_name="resnet18",
    ),
    "cifar_wide_resnet28_10": Architecture(
        backbone=functools.partial(cifar_resnet.wide_resnet, blocks=4, width=10),
        feature_dim=640,
        parameters=36_472_784,
        reference_module=cifar_resnet.wide_reference_module,
        head_bias=zeros,
    ),
    "resnet20": Architecture(
        backbone=functools.partial(cifar_resnet.resnet_6n, blocks=3),
        feature_dim=64,
        parameters=269_072,
        reference_module=cifar_resnet.reference_module,
    ),
    "resnet20_width8": Architecture(
        backbone=functools.partial(cifar_resnet.resnet_6n, blocks=3, width=8),
        feature_dim=32,
        parameters=67_720,
        reference_module=cifar_resnet.reference_module,
    ),
    "resnet8": Architecture(
        backbone=functools.partial(cifar_resnet.resnet_6n, blocks=1),
        feature_dim=64,
        parameters=74_640,
        reference_module=cifar_resnet.reference_module,
    ),
}


def build_classifier(
    architecture: str, num_classes: int, *, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> keras.Model:
    """Builds an untrained classifier, with initial weights drawn as in the reference.

    Args:
        architecture: Name in `ARCHITECTURES`. It becomes the name of the model.
        num_classes: Number of classes, at least 2.
        image_size: Height and width of the images, in pixels.
        mean: Means of the three channels, in [0, 1] pixel units.
        std: Standard deviations of the three channels, in [0, 1] pixel units.

    Returns:
        A Functional model that maps "images", (batch, image_size, image_size, 3) float32 in [0, 1], to "logits",
        (batch, num_classes) float32. The model clips and normalizes the images itself, in float32 under every dtype
        policy.

    Raises:
        UserError: The architecture is unknown, or a number is outside its range.

    Example:
        >>> model = build_classifier("resnet8", 10, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> model.name, model.output_shape
        ('resnet8', (None, 10))
    """
    if architecture not in ARCHITECTURES:
        raise unknown_name("architecture", architecture, ARCHITECTURES)
    if keras.config.image_data_format() != "channels_last":
        raise UserError(
            "The architectures need the channels last. Received: image_data_format='channels_first' in the settings "
            "of Keras. Change it to 'channels_last' in ~/.keras/keras.json, or call "
            "keras.config.set_image_data_format('channels_last') first."
        )
    entry = ARCHITECTURES[architecture]
    if num_classes < 2:
        raise UserError(f"A classifier needs at least 2 classes. Received: num_classes={num_classes}.")
    if image_size < entry.minimum_image_size:
        raise UserError(
            f"{architecture} needs images of at least {entry.minimum_image_size} pixels a side. Received: "
            f"image_size={image_size}, architecture={architecture}. Use larger images, or another architecture."
        )
    mean, std = [float(value) for value in mean], [float(value) for value in std]
    _check_normalization(mean, std)

    images = keras.Input((image_size, image_size, 3), name="images", dtype="float32")
    x = keras.ops.clip(images, 0, 1)
    x = keras.layers.Normalization(
        axis=-1, mean=mean, variance=[value**2 for value in std], name="normalization", dtype="float32"
    )(x)
    features = entry.backbone(x)
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer=entry.head_kernel(entry.feature_dim, num_classes),
        bias_initializer=entry.head_bias(entry.feature_dim, num_classes),
        name="logits",
        dtype="float32",
    )(features)
    return keras.Model(images, logits, name=architecture)


def _check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or not all(0 <= value <= 1 for value in mean):
        raise UserError(
            f"`mean` must hold one number in [0, 1] for each of the three channels. Received: mean={tuple(mean)}. "
            "Divide means in 0..255 units by 255."
        )
    if len(std) != 3 or not all(0 < value <= 1 for value in std):
        raise UserError(
            f"`std` must hold one number in (0, 1] for each of the three channels. Received: std={tuple(std)}. "
            "Divide deviations in 0..255 units by 255."
        )
