"""The pieces that all families share: the reference's convolution, BatchNorm, pooling and ways to start weights."""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np

from robust_tf.models.large_weights import UntouchedZeros

# Gives the initializer of a weight from the fan-in and fan-out of its layer in PyTorch's counting: (input channels /
# groups) x kernel area, and output channels x kernel area. Keras counts depthwise kernels the other way round, so the
# standard deviation is worked out here and not left to keras.initializers.VarianceScaling.
Start = Callable[[int, int], keras.initializers.Initializer]


_WITHOUT_VALUES = contextvars.ContextVar("without_values", default=False)


def without_initial_values(build: Callable[[], keras.Model]) -> keras.Model:
    """The network that `build` makes, but full of zeros: for weights that a checkpoint replaces at once.

    TensorFlow draws a random kernel with two copies of it, and keeps that memory; these zeros take none. The layers'
    configuration is that of a network with initial values.
    """
    token = _WITHOUT_VALUES.set(True)
    try:
        model = build()
    finally:
        _WITHOUT_VALUES.reset(token)
    for layer in model.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, UntouchedZeros):
                setattr(layer, name, value.instead_of)
    return model


def _unless_without_values(start: Start) -> Start:
    @functools.wraps(start)
    def chosen(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
        usual = start(fan_in, fan_out)
        return UntouchedZeros(usual) if _WITHOUT_VALUES.get() else usual

    return chosen


@_unless_without_values
def kaiming_fan_in(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Normal with variance 2 / fan_in. Source: He et al. 2015 (arXiv 1502.01852), section 2.2."""
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / fan_in))


@_unless_without_values
def kaiming_fan_out(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Normal with variance 2 / fan_out. Source: He et al. 2015 (arXiv 1502.01852), section 2.2."""
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / fan_out))


@_unless_without_values
def torch_default(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Uniform within 1 / sqrt(fan_in): where PyTorch's convolution and linear layers start, kernel and bias."""
    bound = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-bound, bound)


@_unless_without_values
def uniform_fan_out(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Uniform with variance 1 / fan_out, for the head of MNASNet."""
    bound = math.sqrt(3 / fan_out)
    return keras.initializers.RandomUniform(-bound, bound)


@_unless_without_values
def normal_001(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Normal with standard deviation 0.01, for the linear layers of VGG and MobileNetV2."""
    return keras.initializers.RandomNormal(stddev=0.01)


def zeros(fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Zeros, for biases."""
    return keras.initializers.Zeros()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Makes the layers of one family, which differ in how kernels start, in the activation and in BatchNorm's pace.

    Every method takes the tensor (batch, height, width, channels) first and names the layer as it is told.
    """

    kernel_start: Start = kaiming_fan_out
    relu_maximum: float | None = None
    batch_norm_momentum: float = 0.9  # PyTorch's default 0.1 in Keras terms

    def conv(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel_size: int,
        *,
        name: str,
        strides: int = 1,
        groups: int = 1,
        use_bias: bool = False,
    ) -> keras.KerasTensor:
        """Convolution padded by kernel_size // 2 on every side, with a bias of zeros when there is one.

        At strides > 1 Keras's "same" would pad one side only, and all following pixels would be shifted against the
        reference. At strides 1 "same" is the symmetric padding already, and needs no layer of its own.

        With groups > 1 there are as many filters as channels, and no bias.
        """
        if strides > 1 and kernel_size > 1:
            x = keras.layers.ZeroPadding2D(kernel_size // 2, name=f"{name}_pad")(x)
        padding = "same" if strides == 1 else "valid"
        fan_in = x.shape[-1] // groups * kernel_size**2
        start = self.kernel_start(fan_in, filters * kernel_size**2)
        if groups == 1:
            return keras.layers.Conv2D(
                filters, kernel_size, strides, padding, use_bias=use_bias, kernel_initializer=start, name=name
            )(x)

        # The gradient of Conv2D(groups=) takes 100 times as long on CPU as this same sum: each input to all outputs of
        # its group, where the shuffle puts the first inputs of all groups first, then the second ones, and so on.
        members = filters // groups
        if members > 1:
            x = shuffle_channels(x, groups)
        x = keras.layers.DepthwiseConv2D(
            kernel_size,
            strides,
            padding,
            depth_multiplier=members,
            use_bias=False,
            depthwise_initializer=start,
            name=name,
        )(x)
        if members > 1:
            x = keras.layers.Add(name=f"{name}_sum")(keras.ops.split(x, members, axis=-1))
        return x

    def batch_norm(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """BatchNorm with the reference's constants (Keras's own are epsilon 1e-3 and momentum 0.99)."""
        return keras.layers.BatchNormalization(momentum=self.batch_norm_momentum, epsilon=1e-5, name=name)(x)

    def relu(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """The family's activation: ReLU, or ReLU6 where `relu_maximum` is 6."""
        return keras.layers.ReLU(max_value=self.relu_maximum, name=name)(x)

    def conv_bn(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel_size: int,
        *,
        prefix: str,
        index: str = "",
        strides: int = 1,
        groups: int = 1,
    ) -> keras.KerasTensor:
        """Convolution and BatchNorm, named `<prefix>_conv<index>` and `<prefix>_bn<index>`."""
        x = self.conv(x, filters, kernel_size, name=f"{prefix}_conv{index}", strides=strides, groups=groups)
        return self.batch_norm(x, name=f"{prefix}_bn{index}")

    def conv_bn_relu(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel_size: int,
        *,
        prefix: str,
        index: str = "",
        strides: int = 1,
        groups: int = 1,
    ) -> keras.KerasTensor:
        """Like `conv_bn`, followed by the activation, `<prefix>_relu<index>`."""
        x = self.conv_bn(x, filters, kernel_size, prefix=prefix, index=index, strides=strides, groups=groups)
        return self.relu(x, name=f"{prefix}_relu{index}")


def residual_blocks(counts: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """The stage (from 1), the prefix of names and the strides of each block; later stages start by halving the image.

    Args:
        counts: blocks in each stage.
    """
    for stage, count in enumerate(counts, start=1):
        for block in range(1, count + 1):
            yield stage, f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1


def shuffle_channels(x: keras.KerasTensor, groups: int) -> keras.KerasTensor:
    """The first channel of each group, then the second one of each, and so on.

    A gather, because Reshape layers would tie the network to one image size.
    """
    order = np.arange(x.shape[-1]).reshape(groups, -1).T.ravel()
    return keras.ops.take(x, order.tolist(), axis=-1)


def max_pool_3x3(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    """3x3 maximum at strides 2, padded by 1; only after a ReLU, where the zeros of the padding never win wrongly."""
    x = keras.layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return keras.layers.MaxPooling2D(3, 2, name=name)(x)


def mean_features(x: keras.KerasTensor) -> keras.KerasTensor:
    """The mean over all positions, (batch, channels), as the layer "features"."""
    return keras.layers.GlobalAveragePooling2D(name="features")(x)
