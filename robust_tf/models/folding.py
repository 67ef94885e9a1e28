"""Folding of BatchNorm into the convolution before it, for faster inference."""

import collections
import functools
from typing import Any

import keras
import numpy as np

from robust_tf.models.plain import copy_weights

_CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)


def fold_batch_norm(classifier: keras.Model) -> keras.Model:
    """Returns a model that computes the same function in inference with fewer operations.

    A convolution followed by BatchNorm, (x * kernel - mean) / std, equals one convolution with a bias. TensorFlow can
    run convolution, bias and ReLU as one operation, while BatchNorm needs two more passes over the activations. The
    outputs differ by rounding errors only.

    Args:
        classifier: Classifier to fold. It is not changed.

    Returns:
        A new model with copies of the weights. It must not be trained, because it has no statistics to update. Layers
        that compute in half precision are not folded, because that would round the folded kernels. If there is nothing
        to fold, the classifier itself is returned.
    """
    folded = batch_norm_after_convolution(classifier)
    if not folded:
        return classifier
    layers = {layer.name: layer for layer in classifier.layers}
    norms = set(folded.values())

    @functools.cache  # so that a layer that is called twice stays one layer
    def clone(layer: keras.Operation) -> keras.Operation:
        config = layer.get_config()
        return type(layer).from_config({**config, "use_bias": True} if layer.name in folded else config)

    def call(layer: keras.Operation, x: Any, *others: Any, **options: Any) -> Any:
        return x if layer.name in norms else layer(x, *others, **options)

    result = keras.models.clone_model(classifier, clone_function=clone, call_function=call)
    for layer in result.layers:
        if layer.name in folded:
            layer.set_weights(_folded_weights(layers[layer.name], layers[folded[layer.name]]))
        elif layer.weights:
            copy_weights(layers[layer.name], layer)
    result.trainable = False
    return result


def batch_norm_after_convolution(model: keras.Model, *, dtypes: tuple[str, ...] = ("float32",)) -> dict[str, str]:
    """Returns the convolutions of a model whose only use is in a BatchNorm, which can be folded into them.

    Args:
        model: Built model. Only Functional models are searched, and only at their own level, not in nested models.
        dtypes: Compute dtypes of the convolution and the BatchNorm that count.

    Returns:
        Name of the BatchNorm by the name of its convolution.
    """
    if not hasattr(model, "operations"):  # not a Functional model
        return {}
    layers = {layer.name: layer for layer in model.layers}
    consumers = collections.defaultdict(list)
    config = model.get_config()
    for layer in config["layers"]:
        for name in _inputs(layer["inbound_nodes"]):
            consumers[name].append(layer["name"])
    outputs = set(keras.tree.flatten(config["output_layers"]))  # names, and numbers that no layer is called by
    pairs = {}
    conv: Any  # None for operations that are not layers, such as a sum
    norm: Any
    for name, (first, *others) in consumers.items():
        conv, norm = layers.get(name), layers.get(first)
        # Subclasses may compute something else.
        if others or type(conv) not in _CONVOLUTIONS or type(norm) is not keras.layers.BatchNormalization:
            continue
        if name in outputs or norm.compute_dtype not in dtypes or norm.axis not in _channel_axes(conv):
            continue
        if _is_foldable(conv, dtypes):
            pairs[name] = first
    # A layer that is called several times cannot be folded.
    calls = collections.Counter(consumer for found in consumers.values() for consumer in found)
    return {conv: norm for conv, norm in pairs.items() if calls[norm] == calls[conv] == 1}


def _is_foldable(conv: keras.layers.Layer, dtypes: tuple[str, ...]) -> bool:
    own_kernel = conv.quantization_mode is None and not getattr(conv, "lora_enabled", False)
    return own_kernel and conv.compute_dtype in dtypes and conv.activation is keras.activations.linear


def _channel_axes(conv: keras.layers.Layer) -> tuple[int, ...]:
    return (-1, 3) if conv.data_format == "channels_last" else (1, -3)


def _inputs(nodes: Any) -> list[str]:
    """Returns the names of the layers whose outputs are inputs of a layer, from its serialized calls."""
    if isinstance(nodes, dict):
        if nodes.get("class_name") == "__keras_tensor__":
            return [nodes["config"]["keras_history"][0]]
        return [name for value in nodes.values() for name in _inputs(value)]
    if isinstance(nodes, (list, tuple)):
        return [name for value in nodes for name in _inputs(value)]
    return []


def _folded_weights(conv: keras.layers.Layer, norm: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias of the convolution that replaces both layers."""
    kernel = np.asarray(conv.kernel)
    bias = np.asarray(conv.bias) if conv.use_bias else np.zeros(norm.moving_mean.shape, np.float32)
    scale = 1.0 / np.sqrt(np.asarray(norm.moving_variance, np.float64) + norm.epsilon)
    if norm.scale:
        scale = scale * np.asarray(norm.gamma)
    shift = (bias - np.asarray(norm.moving_mean)) * scale
    if norm.center:
        shift = shift + np.asarray(norm.beta)
    per_output = scale.reshape(kernel.shape[-2:]) if isinstance(conv, keras.layers.DepthwiseConv2D) else scale
    return (kernel * per_output).astype(np.float32), shift.astype(np.float32)
