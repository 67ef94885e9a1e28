"""Building blocks of all architectures: convolution, BatchNorm, pooling and initializers, all as in the reference."""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np

from robust_tf.models.large_weights import UntouchedZeros

# A function of the fan-in and the fan-out of a layer that returns the initializer of a weight. Both are as PyTorch
# defines them: (input channels / groups) * kernel area, and output channels * kernel area. Keras swaps the two for
# depthwise kernels, so the standard deviation is computed here and not by keras.initializers.VarianceScaling.
Start = Callable[[int, int], keras.initializers.Initializer]


_WITHOUT_VALUES = contextvars.ContextVar("without_values", default=False)


def without_initial_values(build: Callable[[], keras.Model]) -> keras.Model:
    """Builds a network whose weights a checkpoint will replace. They start as zeros that take no memory.

    To draw a random kernel, TensorFlow makes two copies of it and does not release the memory. The configuration of the
    layers is the same as with initial values.

    Args:
        build: Function that builds the network.
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
def kaiming_fan_in(fan_in: int, _fan_out: int) -> keras.initializers.Initializer:
    """Returns a normal initializer with variance 2 / fan_in. Source: He et al. 2015 (arXiv 1502.01852), section 2.2.

    Args:
        fan_in: Fan-in of the layer, see `Start`.
    """
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / fan_in))


@_unless_without_values
def kaiming_fan_out(_fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Returns a normal initializer with variance 2 / fan_out. Source: He et al. 2015 (arXiv 1502.01852), section 2.2.

    Args:
        fan_out: Fan-out of the layer, see `Start`.
    """
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / fan_out))


@_unless_without_values
def torch_default(fan_in: int, _fan_out: int) -> keras.initializers.Initializer:
    """Returns PyTorch's default initializer for the kernels and biases of convolutions and linear layers.

    It is uniform in [-1 / sqrt(fan_in), 1 / sqrt(fan_in)].

    Args:
        fan_in: Fan-in of the layer, see `Start`.
    """
    bound = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-bound, bound)


@_unless_without_values
def uniform_fan_out(_fan_in: int, fan_out: int) -> keras.initializers.Initializer:
    """Returns a uniform initializer with variance 1 / fan_out, for the head of MNASNet.

    Args:
        fan_out: Fan-out of the layer, see `Start`.
    """
    bound = math.sqrt(3 / fan_out)
    return keras.initializers.RandomUniform(-bound, bound)


@_unless_without_values
def normal_001(_fan_in: int, _fan_out: int) -> keras.initializers.Initializer:
    """Returns a normal initializer with standard deviation 0.01, for the linear layers of VGG and MobileNetV2."""
    return keras.initializers.RandomNormal(stddev=0.01)


def zeros(_fan_in: int, _fan_out: int) -> keras.initializers.Initializer:
    """Returns an initializer of zeros, for biases."""
    return keras.initializers.Zeros()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Creates the layers of one family of architectures.

    Every method applies a new layer to a tensor `x`, (batch, height, width, channels), and returns its output.

    Attributes:
        kernel_start: Initializer of the kernels.
        relu_maximum: Upper limit of the activation, 6 for ReLU6, or None.
        batch_norm_momentum: Momentum of BatchNorm's moving statistics, as Keras defines it.
    """

    kernel_start: Start = kaiming_fan_out
    relu_maximum: float | None = None
    batch_norm_momentum: float = 0.9  # PyTorch's default, which PyTorch writes as 0.1

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
        """Applies a convolution that is padded by kernel_size // 2 on every side.

        With strides > 1, Keras's padding "same" would pad one side only and so shift all pixels relative to the
        reference. A separate layer therefore does the padding. With strides 1, "same" is symmetric.

        Args:
            x: Input (batch, height, width, channels).
            filters: Number of output channels. With groups > 1 it must equal the number of input channels.
            kernel_size: Height and width of the kernel, an odd number.
            name: Name of the layer.
            strides: Step between two positions of the kernel.
            groups: Number of groups of channels that are convolved separately.
            use_bias: Whether to add a bias, which starts at zero. There is none with groups > 1.
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

        # On CPUs the gradient of Conv2D(groups=...) takes 100 times as long as this equivalent: a depthwise convolution
        # from each input channel to all outputs of its group, then a sum. The shuffle puts the first channels of all
        # groups first, then the second ones, and so on.
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
        """Applies BatchNorm with the reference's constants; Keras's defaults are epsilon 1e-3 and momentum 0.99.

        Args:
            x: Input (batch, height, width, channels).
            name: Name of the layer.
        """
        return keras.layers.BatchNormalization(momentum=self.batch_norm_momentum, epsilon=1e-5, name=name)(x)

    def relu(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """Applies the activation of the family: ReLU, or ReLU6 where `relu_maximum` is 6.

        Args:
            x: Input (batch, height, width, channels).
            name: Name of the layer.
        """
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
        """Applies a convolution and BatchNorm, called `<prefix>_conv<index>` and `<prefix>_bn<index>`.

        Args:
            x: Input (batch, height, width, channels).
            filters: Number of output channels.
            kernel_size: Height and width of the kernel, an odd number.
            prefix: Beginning of the names of the layers.
            index: End of the names of the layers.
            strides: Step between two positions of the kernel.
            groups: Number of groups of channels that are convolved separately.
        """
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
        """Applies `conv_bn`, then the activation, called `<prefix>_relu<index>`.

        Args:
            x: Input (batch, height, width, channels).
            filters: Number of output channels.
            kernel_size: Height and width of the kernel, an odd number.
            prefix: Beginning of the names of the layers.
            index: End of the names of the layers.
            strides: Step between two positions of the kernel.
            groups: Number of groups of channels that are convolved separately.
        """
        x = self.conv_bn(x, filters, kernel_size, prefix=prefix, index=index, strides=strides, groups=groups)
        return self.relu(x, name=f"{prefix}_relu{index}")


def residual_blocks(counts: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """Yields the stage, the prefix of the layer names, and the strides of each residual block.

    Stages are counted from 1. Every stage but the first halves the size of the image in its first block.

    Args:
        counts: Number of blocks in each stage.
    """
    for stage, count in enumerate(counts, start=1):
        for block in range(1, count + 1):
            yield stage, f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1


def shuffle_channels(x: keras.KerasTensor, groups: int) -> keras.KerasTensor:
    """Reorders the channels: the first channel of each group, then the second channel of each group, and so on.

    Args:
        x: Input (batch, height, width, channels).
        groups: Number of groups.
    """
    # `take`, because Reshape layers would fix the size of the images.
    order = np.arange(x.shape[-1]).reshape(groups, -1).T.ravel()
    return keras.ops.take(x, order.tolist(), axis=-1)


def max_pool_3x3(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    """Applies 3x3 max pooling with strides 2, padded by 1 on every side with zeros.

    The input must come from a ReLU, so that zeros in the padding cannot exceed the true maximum.

    Args:
        x: Input (batch, height, width, channels), without negative values.
        name: Name of the layer.
    """
    x = keras.layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return keras.layers.MaxPooling2D(3, 2, name=name)(x)


def mean_features(x: keras.KerasTensor) -> keras.KerasTensor:
    """Applies the mean over all positions as the layer "features"; the output is (batch, channels).

    Args:
        x: Input (batch, height, width, channels).
    """
    return keras.layers.GlobalAveragePooling2D(name="features")(x)
