"""A faster way to run a classifier in training and in attacks, with the same layers and weights."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from robust_tf.models.folding import batch_norm_after_convolution
from robust_tf.models.image_steps import blocks_of_pixels, clipped, is_clip, is_normalization, normalized
from robust_tf.models.weight_gradient import convolved, has_fast_weight_gradient

_DTYPES = ("float32", "bfloat16", "float16")
_IMAGE_CHANNELS = 4  # the most channels that count as those of an image


class Execution:
    """Runs a classifier with fewer passes over its activations, in training mode and in inference mode.

    Keras computes BatchNorm from about ten operations in float32, and each of them reads or writes all activations. The
    same values are computed here in a faster way:

    - In training mode one operation, `FusedBatchNormV3`, replaces those of a BatchNorm. It takes activations in half
      precision and computes the statistics in float32.
    - In inference mode, as in an attack, a BatchNorm that follows a convolution is folded into it: the kernel is
      multiplied by gamma / std, and the bias is changed to match. This is done with the current weights, in float32, at
      every call, so the folded kernel follows the training and passes gradients on to the weights.
    - A folded convolution of an image with stride 2, as in the stem of a ResNet, is computed on blocks of 2 x 2 pixels,
      as a convolution of four times as many channels with stride 1. The gradient of the image, which only an attack
      needs, is faster that way (see tests/bench/README.md).
    - Images are clipped and normalized in rows, without broadcasts over their few channels.

    The classifier is not changed. It stays an ordinary Keras model, and its file can be loaded without this package,
    because only the calls of its layers are replaced here. Layers for which there is no faster way, and models that
    are not graphs of layers, run as in Keras. The outputs differ from Keras's by rounding errors only.

    Args:
        classifier: Built Keras model.
        unbiased: Whether the moving variances of the layers in `fused_layers` follow the unbiased variance of the
            batch, as in PyTorch, instead of the biased one, as in Keras. Layers whose input size is unknown always
            follow the biased one.
        fused: Whether one operation computes BatchNorm in training mode, and images are normalized in rows. XLA fuses
            Keras's operations by itself, and the one operation was not found to be faster there (see
            tests/bench/README.md).

    Example:
        >>> import keras, numpy
        >>> from robust_tf.models import Execution
        >>> layers = keras.layers
        >>> classifier = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization()])
        >>> execution = Execution(classifier)
        >>> images = numpy.random.default_rng(0).random((2, 8, 8, 3), numpy.float32)
        >>> numpy.allclose(execution(images, training=False), classifier(images, training=False), atol=1e-5)
        True
    """

    def __init__(self, classifier: keras.Model, *, unbiased: bool = False, fused: bool = True) -> None:
        self._classifier, self._unbiased, self._is_fused = classifier, unbiased, fused
        # Each replica has its own thread, and must use the tensors that are on its device.
        self._kept = threading.local()
        self._foldings: dict[str, _FoldedConvolution] = {}
        self._fused: dict[int, keras.layers.BatchNormalization] = {}

    def __call__(self, inputs: Any, *, training: bool) -> Any:
        """Returns the outputs of the classifier.

        Args:
            inputs: Inputs of the classifier.
            training: Whether the layers run in training mode, as in Keras.
        """
        model = self._in_training if training else self._in_inference
        return model(inputs, training=training)

    def prepare(self) -> None:
        """Prepares both modes now, instead of in the first call. Replicas need this before they run in parallel."""
        _ = self._in_training, self._in_inference

    @property
    def fused_layers(self) -> list[keras.layers.BatchNormalization]:
        """The BatchNorm layers that one operation computes in training mode, and whose rule is `unbiased`."""
        self.prepare()
        return [layer for layer in self._fused.values() if not _is_synchronized(layer)]

    @contextlib.contextmanager
    def weights_unchanged(self) -> Iterator[None]:
        """Returns a context in which all kernels are folded once, at its start, because no weight changes within it.

        Use it around an attack. Otherwise each step of the attack folds the kernels again.
        """
        self.prepare()
        before = getattr(self._kept, "folded", None)
        self._kept.folded = {name: layer.folded() for name, layer in self._foldings.items()}
        try:
            yield
        finally:
            self._kept.folded = before

    @functools.cached_property
    def _in_training(self) -> keras.Model:
        return self._copy(self._classifier, folded=False) if self._is_fused else self._classifier

    @functools.cached_property
    def _in_inference(self) -> keras.Model:
        return self._copy(self._classifier, folded=True)

    def _copy(self, model: keras.Model, *, folded: bool, path: str = "") -> keras.Model:
        """Returns a model that calls the layers of `model` in the same order through wrappers, or `model` itself."""
        graph = _graph_of(model)
        if graph is None:
            return model
        pairs = _pairs(graph) if folded else {}
        layers = {layer.name: layer for layer in graph.layers}
        norms = set(pairs.values())

        @functools.cache  # so that a layer that is called twice stays one layer
        def wrapper(operation: Any) -> Any:
            if not isinstance(operation, keras.layers.Layer):
                return _Clip(operation) if self._is_fused and is_clip(operation) else operation
            if isinstance(operation, keras.Model):
                return self._copy(operation, folded=folded, path=f"{path}{operation.name}/")
            if operation.name in pairs:
                name = path + operation.name
                layer = _FoldedConvolution(operation, layers[pairs[operation.name]], lambda: self._kept_for(name))
                self._foldings[name] = layer
                return layer
            return self._wrapped(operation, folded=folded)

        def call(layer: Any, x: Any, *others: Any, **options: Any) -> Any:
            return x if layer.name in norms else layer(x, *others, **options)

        return keras.models.clone_model(graph, clone_function=wrapper, call_function=call)

    def _wrapped(self, layer: keras.layers.Layer, *, folded: bool) -> keras.layers.Layer:
        if self._is_fused and is_normalization(layer):
            return _Normalization(layer)
        if self._is_fused and not folded and has_fast_weight_gradient(layer):
            return _Convolution(layer)
        if not (self._is_fused and _is_fusable(layer)):
            return _Shared(layer)
        fused = _FusedBatchNorm(layer, unbiased=self._unbiased and _has_known_size(layer))
        self._fused[id(layer)] = layer
        return fused

    def _kept_for(self, name: str) -> tuple[tf.Tensor, tf.Tensor] | None:
        return (getattr(self._kept, "folded", None) or {}).get(name)


class _Wrapper(keras.layers.Layer):
    """Base class of layers that stand in for another layer, or operation, and share its variables."""

    def __init__(self, layer: Any) -> None:
        # Neither inputs nor variables are cast here. The other layer casts them as its own dtype policy says.
        super().__init__(name=layer.name, dtype="float32", autocast=False)
        self.layer = layer
        self.built = True

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Does not call the other layer, since that would add a node to the graph of the classifier.
        kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)


class _Shared(_Wrapper):
    """Calls another layer as it is."""

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        if self.layer._call_has_training_arg:
            kwargs["training"] = training
        return self.layer(*args, **kwargs)


class _Clip(_Wrapper):
    """Calls `keras.ops.clip`, whose gradient is computed in a faster way."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return clipped(self.layer, x)


class _Normalization(_Wrapper):
    """Calls a Normalization, in rows of an image."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return normalized(self.layer, x)


class _Convolution(_Wrapper):
    """Calls a convolution, whose weight gradient is computed in a faster way."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return convolved(self.layer, x)


class _FusedBatchNorm(_Wrapper):
    """Calls a BatchNorm, which in training mode is one operation of TensorFlow."""

    def __init__(self, norm: keras.layers.BatchNormalization, *, unbiased: bool) -> None:
        super().__init__(norm)
        self._unbiased = unbiased

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        norm = self.layer
        if not (training and norm.trainable) or mask is not None or _is_synchronized(norm):
            return norm(inputs, training=training, mask=mask)
        x = tf.cast(inputs, norm.compute_dtype)
        mean, variance = ops.convert_to_tensor(norm.moving_mean), ops.convert_to_tensor(norm.moving_variance)
        # tf.nn.fused_batch_norm would raise epsilon to 1.001e-5.
        outputs = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=ops.convert_to_tensor(norm.gamma) if norm.scale else tf.ones_like(mean),
            offset=ops.convert_to_tensor(norm.beta) if norm.center else tf.zeros_like(mean),
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=norm.epsilon,
            is_training=True,
        )
        batch_mean, batch_variance = tf.stop_gradient(outputs.batch_mean), tf.stop_gradient(outputs.batch_variance)
        if not self._unbiased:  # the operation returns the unbiased variance
            count = tf.cast(tf.size(x) // tf.size(mean), tf.float32)
            batch_variance *= tf.maximum(count - 1.0, 1.0) / count
        norm.moving_mean.assign(mean * norm.momentum + batch_mean * (1.0 - norm.momentum))
        norm.moving_variance.assign(variance * norm.momentum + batch_variance * (1.0 - norm.momentum))
        return outputs.y


class _FoldedConvolution(_Wrapper):
    """Calls a convolution and the BatchNorm after it as one convolution with a bias, in inference mode."""

    def __init__(self, conv: keras.layers.Layer, norm: keras.layers.BatchNormalization, kept: Any) -> None:
        super().__init__(conv)
        self._norm, self._kept, self._known_size = norm, kept, False

    def compute_output_spec(self, inputs: keras.KerasTensor) -> Any:
        self._known_size = None not in inputs.shape[1:]
        return super().compute_output_spec(inputs)

    def folded(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the kernel and the bias (channels,) that replace both layers, in the compute dtype."""
        conv, norm = self.layer, self._norm
        kernel = ops.convert_to_tensor(conv.kernel)
        scale = tf.math.rsqrt(ops.convert_to_tensor(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            scale *= ops.convert_to_tensor(norm.gamma)
        bias = -ops.convert_to_tensor(norm.moving_mean)
        if conv.use_bias:
            bias += ops.convert_to_tensor(conv.bias)
        bias *= scale
        if norm.center:
            bias += ops.convert_to_tensor(norm.beta)
        if isinstance(conv, keras.layers.DepthwiseConv2D):
            scale = tf.reshape(scale, kernel.shape[-2:])
        kernel = tf.cast(kernel * scale, conv.compute_dtype)
        return _kernel_of_blocks(kernel) if self._on_blocks else kernel, tf.cast(bias, conv.compute_dtype)

    @property
    def _on_blocks(self) -> bool:
        """Whether the convolution is computed on blocks of 2 x 2 pixels."""
        conv = self.layer
        few = type(conv) is keras.layers.Conv2D and conv.groups == 1 and conv.kernel.shape[2] <= _IMAGE_CHANNELS
        plain = conv.data_format == "channels_last" and conv.padding == "valid" and conv.dilation_rate == (1, 1)
        return self._known_size and few and plain and conv.strides == (2, 2)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        conv = self.layer
        kernel, bias = self._kept() or self.folded()
        x = tf.cast(inputs, conv.compute_dtype)
        if isinstance(conv, keras.layers.DepthwiseConv2D):
            y = ops.depthwise_conv(
                x,
                kernel,
                strides=conv.strides,
                padding=conv.padding,
                dilation_rate=conv.dilation_rate,
                data_format=conv.data_format,
            )
        elif self._on_blocks:
            # The blocks that the convolution covers, which may leave out the last pixel or go one pixel beyond it.
            height, width = (
                2 * ((n - k) // 2 + (k + 1) // 2) for n, k in zip(x.shape[1:3], conv.kernel_size, strict=True)
            )
            x = x[:, :height, :width]
            x = tf.pad(x, [[0, 0], [0, height - x.shape[1]], [0, width - x.shape[2]], [0, 0]])
            y = tf.nn.conv2d(blocks_of_pixels(x), kernel, strides=1, padding="VALID")
        else:
            y = conv.convolution_op(x, kernel)
        return tf.nn.bias_add(y, bias, data_format="NHWC" if conv.data_format == "channels_last" else "NCHW")


def _kernel_of_blocks(kernel: tf.Tensor) -> tf.Tensor:
    """Returns the kernel that does on `space_to_depth(images, 2)` what a kernel with stride 2 does on the images."""
    height, width, channels, filters = kernel.shape
    kernel = tf.pad(kernel, [[0, height % 2], [0, width % 2], [0, 0], [0, 0]])
    rows, columns = (height + 1) // 2, (width + 1) // 2
    kernel = tf.transpose(tf.reshape(kernel, [rows, 2, columns, 2, channels, filters]), [0, 2, 1, 3, 4, 5])
    return tf.reshape(kernel, [rows, columns, 4 * channels, filters])


def _graph_of(model: keras.Model) -> keras.Model | None:
    """Returns a model as a Functional model of the same layers, or None if it is not built from a graph of layers."""
    sequential = isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call
    functional = hasattr(model, "operations") and type(model).call is type(_functional()).call
    if not model.built or not (sequential or functional):
        return None
    if any(isinstance(layer, (keras.layers.Masking, keras.layers.Embedding)) for layer in model.layers):
        return None  # the wrappers do not pass masks on
    try:
        return keras.Model(model.inputs, model.outputs[0]) if sequential else keras.Model(model.input, model.output)
    except (AttributeError, ValueError):  # a Sequential model without a known input shape
        return None


@functools.cache
def _functional() -> keras.Model:
    inputs = keras.Input((1,))
    return keras.Model(inputs, inputs)


def _pairs(graph: keras.Model) -> dict[str, str]:
    try:
        return batch_norm_after_convolution(graph, dtypes=_DTYPES)
    except NotImplementedError:  # a layer that cannot be saved
        return {}


def _has_known_size(layer: keras.layers.Layer) -> bool:
    try:
        return None not in layer.input.shape[1:]
    except (AttributeError, ValueError):  # the layer is used more than once
        return False


def _is_synchronized(norm: keras.layers.BatchNormalization) -> bool:
    """Whether the replicas compute the statistics of a layer together."""
    return bool(norm.synchronized) and tf.distribute.get_strategy().num_replicas_in_sync > 1


def _is_fusable(layer: keras.layers.Layer) -> bool:
    """Whether the operation of TensorFlow computes what a layer does: BatchNorm over the last of four axes."""
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.compute_dtype not in _DTYPES:
        return False
    return layer.input_spec is not None and layer.input_spec.ndim == 4 and layer.axis in (-1, 3)
