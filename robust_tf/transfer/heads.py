"""Variants of a classifier for another task: a new head, another normalization, image size or precision."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras

from robust_tf.errors import UserError, unknown_name
from robust_tf.models.plain import copy_weights
from robust_tf.models.representation import features_layer
from robust_tf.transfer.stages import shortened

HeadInitializer = Literal["pytorch", "keras", "zeros"]

HEAD_INITIALIZERS: tuple[HeadInitializer, ...] = ("pytorch", "keras", "zeros")
DTYPE_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
ALWAYS_FLOAT32 = ("normalization", "logits")


def replace_head(
    classifier: keras.Model,
    num_classes: int,
    *,
    hidden_layers: int = 0,
    initializer: HeadInitializer = "pytorch",
    seed: int,
) -> keras.Model:
    """Returns a classifier with a new head on the backbone of this one.

    This is the first step of a transfer: the backbone keeps what it has learned, and the new head is for the classes of
    the new task. The backbone is shared, not copied, so training one classifier changes the other.

    Args:
        classifier: Functional model of images (batch, height, width, channels) in [0, 1], as `plain_classifier` returns
            it. The head is attached to its layer "features" or, without one, to the input of its old head.
        num_classes: Number of logits, at least 2.
        hidden_layers: Number of hidden layers before the logits, at least 0. Each is a Dense(feature_dim) with ReLU,
            called "head_hidden1", "head_hidden2", ...
        initializer: Initial weights. "pytorch" draws kernels and biases uniformly within 1 / sqrt(fan_in), like
            PyTorch's Linear. "keras" draws Glorot-uniform kernels and sets the biases to zero. "zeros" sets the weights
            of the logits to zero, but draws hidden layers like "pytorch", because zeros there would never learn.
        seed: Seed for the initial weights.

    Returns:
        A functional model of the same name, from the same input to logits (batch, num_classes) in float32.

    Raises:
        UserError: The initializer is unknown, or a number is out of range.

    Source: Salman et al. 2020, arXiv 2007.08489, section 2.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import freeze, replace_head
        >>> source = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> classifier = replace_head(source, 3, hidden_layers=1, seed=0)
        >>> classifier.output_shape
        (None, 3)
        >>> [layer.name for layer in classifier.layers[-3:]]
        ['features', 'head_hidden1', 'logits']
        >>> freeze(classifier, mode="fixed_feature")  # train the new head alone
    """
    if num_classes < 2:
        raise UserError(f"A classifier needs at least 2 classes. Received: num_classes={num_classes}.")
    if hidden_layers < 0:
        raise UserError(f"`hidden_layers` must be at least 0. Received: hidden_layers={hidden_layers}.")
    if initializer not in HEAD_INITIALIZERS:
        raise unknown_name("head initializer", initializer, HEAD_INITIALIZERS)
    features = features_layer(classifier)
    x = features.output
    feature_dim = x.shape[-1]
    rng = random.Random(seed)
    start = _pytorch_start if initializer == "zeros" else _STARTS[initializer]
    for index in range(1, hidden_layers + 1):
        x = keras.layers.Dense(
            feature_dim,
            activation="relu",
            dtype=features.dtype_policy,
            name=f"head_hidden{index}",
            **start(rng, feature_dim),
        )(x)
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits", **_STARTS[initializer](rng, feature_dim))
    return keras.Model(classifier.inputs[0], logits(x), name=classifier.name)


def with_normalization(classifier: keras.Model, mean: Sequence[float], std: Sequence[float]) -> keras.Model:
    """Returns a copy of the classifier, with the same weights, that normalizes its images differently.

    Args:
        classifier: Functional model with a layer called "normalization".
        mean: Means of the three channels, in [0, 1] pixel units.
        std: Standard deviations of the three channels, in the same unit, more than 0.

    Returns:
        The copy, which shares no weights with the classifier.

    Raises:
        UserError: There is no layer "normalization", or `mean` or `std` is not three valid numbers.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import with_normalization
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> other = with_normalization(classifier, mean=(0, 0, 0), std=(1, 1, 1))
        >>> other.get_layer("normalization").get_config()["mean"]
        [0, 0, 0]
    """
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise UserError(
            "`mean` and `std` must have one number for each of the three channels, and `std` must be more than 0. "
            f"Received: mean={tuple(mean)}, std={tuple(std)}."
        )
    _check_has_normalization(classifier)
    variance = [value**2 for value in std]
    changed = {"mean": list(mean), "variance": variance}
    return _copy(classifier, lambda layer: changed if layer.name == "normalization" else {})


def with_image_size(classifier: keras.Model, image_size: int) -> keras.Model:
    """Returns a copy of the classifier, with the same weights, for square images of another size.

    Args:
        classifier: Functional model of images (batch, height, width, channels), as `plain_classifier` returns it.
        image_size: Height and width, in pixels.

    Returns:
        The copy, which shares no weights with the classifier.

    Raises:
        UserError: The network does not allow this size, or the shape of its weights depends on the size of the images.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import with_image_size
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> with_image_size(classifier, 16).input_shape
        (None, 16, 16, 3)
    """
    shape = (None, image_size, image_size, classifier.input_shape[-1])
    try:
        return _copy(classifier, lambda layer: {"batch_shape": shape} if _is_input(layer) else {})
    except ValueError as error:
        raise UserError(
            f"The weights of {classifier.name!r} do not fit images of this size. Received: image_size={image_size}, "
            f"built for {classifier.input_shape[1]}. Resize the images instead, or use another size or architecture."
        ) from error


def with_dtype_policy(classifier: keras.Model, policy: str) -> keras.Model:
    """Returns a copy of the classifier, with the same weights, that computes in another precision.

    The layers "normalization" and "logits" stay in float32, as in a new classifier. "mixed_float16" needs loss scaling.
    Keras adds it to the model that you compile if the global policy (`keras.config.set_dtype_policy`) was
    "mixed_float16" when you created that model.

    Args:
        classifier: Functional model, as `plain_classifier` returns it. Its quantized layers stay as they are.
        policy: "float32", "mixed_bfloat16" or "mixed_float16". The weights are float32 in all three.

    Returns:
        The copy, which shares no weights with the classifier.

    Raises:
        UserError: The policy is unknown, or the classifier is a Sequential model.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.transfer import with_dtype_policy
        >>> classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> mixed = with_dtype_policy(classifier, "mixed_bfloat16")
        >>> mixed.get_layer("stem_conv").compute_dtype, mixed.get_layer("logits").compute_dtype
        ('bfloat16', 'float32')
    """
    if policy not in DTYPE_POLICIES:
        raise unknown_name("dtype policy", policy, DTYPE_POLICIES)

    def changes(layer: keras.layers.Layer) -> dict[str, Any]:
        if _is_input(layer) or layer.quantization_mode is not None:
            return {}
        return {"dtype": "float32" if layer.name in ALWAYS_FLOAT32 else policy}

    return _copy(classifier, changes)


def _copy(classifier: keras.Model, changes: Callable[[keras.layers.Layer], dict[str, Any]]) -> keras.Model:
    """Returns a copy with the same weights, which also freezes the weights that are frozen in the classifier.

    Args:
        classifier: Functional model.
        changes: Function of a layer that returns the options to change in its configuration.

    Raises:
        UserError: The classifier is a Sequential model, whose configuration lists no connections.
    """
    if isinstance(classifier, keras.Sequential):
        raise UserError(
            f"The classifier must be a functional model. Received: {classifier.name!r}, a Sequential model. Pass it "
            "through robust_tf.models.plain_classifier, or build it with keras.Model(inputs, outputs)."
        )
    config = classifier.get_config()
    layers = {layer.name: layer for layer in classifier.layers}  # without operations such as a sum
    for entry in config["layers"]:
        changed = changes(layers[entry["name"]]) if entry["name"] in layers else {}
        entry["config"] |= {key: value for key, value in changed.items() if key in entry["config"]}
    copy = type(classifier).from_config(config)
    copy_weights(classifier, copy)
    for ours, theirs in zip(copy.weights, classifier.weights, strict=True):
        ours.trainable = theirs.trainable
    return copy


def _is_input(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.InputLayer)


def _check_has_normalization(classifier: keras.Model) -> None:
    names = [layer.name for layer in classifier.layers]
    if "normalization" not in names:
        raise UserError(
            "The normalization can only be changed if the classifier has a layer called 'normalization'. Received: a "
            f"classifier with the layers {shortened(names)}. Keep its normalization (normalization=source in a job)."
        )


def _pytorch_start(rng: random.Random, fan_in: int) -> dict[str, Any]:
    bound = 1 / math.sqrt(fan_in)
    return {
        f"{name}_initializer": keras.initializers.RandomUniform(-bound, bound, seed=rng.getrandbits(31))
        for name in ("kernel", "bias")
    }


def _keras_start(rng: random.Random, *_: Any) -> dict[str, Any]:
    return {"kernel_initializer": keras.initializers.GlorotUniform(seed=rng.getrandbits(31))}


def _zero_start(*_: Any) -> dict[str, Any]:
    return {"kernel_initializer": "zeros"}


_STARTS: dict[HeadInitializer, Callable[[random.Random, int], dict[str, Any]]] = {
    "pytorch": _pytorch_start,
    "keras": _keras_start,
    "zeros": _zero_start,
}
