"""Copies of a classifier for another task: a fresh head, other normalisation, image size or precision."""

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
    """A classifier with a fresh head on the backbone of this one.

    The backbone is shared, not copied: training one classifier changes the other.

    Args:
        classifier: as of `plain_classifier`; the head goes on its `features_layer`.
        num_classes: number of logits, at least 2.
        hidden_layers: number of layers Dense(feature_dim) with ReLU before the logits, called "head_hidden1", ...
        initializer: "pytorch": kernels and biases uniform within 1 / sqrt(fan_in), as PyTorch's Linear starts;
            "keras": Glorot-uniform kernels and biases of zero; "zeros": logits of zero, and hidden layers as in
            "pytorch", since a hidden layer of zeros would never learn.
        seed: the head starts from the same weights for the same seed.

    Returns:
        A functional model of the same name, from the same input to logits (batch, num_classes) in float32.

    Raises:
        UserError: an unknown initializer, or a number outside its range.
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
            **start(feature_dim, rng),
        )(x)
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits", **_STARTS[initializer](feature_dim, rng))
    return keras.Model(classifier.inputs[0], logits(x), name=classifier.name)


def with_normalization(classifier: keras.Model, mean: Sequence[float], std: Sequence[float]) -> keras.Model:
    """A copy of the classifier, with the same weights, that normalises its images differently.

    Args:
        classifier: a functional model with a layer called "normalization".
        mean: of the three channels, in [0, 1] pixel units.
        std: standard deviation of the three channels, above 0.

    Raises:
        UserError: no layer "normalization", or numbers that are not three or out of range.
    """
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise UserError(
            "`mean` and `std` hold one number for each of the three channels, those of `std` above 0. "
            f"Received: mean={tuple(mean)}, std={tuple(std)}."
        )
    _check_has_normalization(classifier)
    variance = [value**2 for value in std]
    changed = {"mean": list(mean), "variance": variance}
    return _copy(classifier, lambda layer: changed if layer.name == "normalization" else {})


def with_image_size(classifier: keras.Model, image_size: int) -> keras.Model:
    """A copy of the classifier, with the same weights, for square images of another size.

    Args:
        classifier: as of `plain_classifier`.
        image_size: height and width, in pixels.

    Raises:
        UserError: the network does not allow this size, or its weights belong to the size that it was built for.
    """
    shape = (None, image_size, image_size, classifier.input_shape[-1])
    try:
        return _copy(classifier, lambda layer: {"batch_shape": shape} if _is_input(layer) else {})
    except ValueError as error:
        raise UserError(
            f"The weights of {classifier.name!r} do not fit images of this size. Received: image_size={image_size}, "
            f"built for {classifier.input_shape[1]}. Resize the images instead, or take another size or architecture."
        ) from error


def with_dtype_policy(classifier: keras.Model, policy: str) -> keras.Model:
    """A copy of the classifier, with the same weights, that computes in another precision.

    The layers "normalization" and "logits" stay in float32, as they are in a new classifier. The loss scaling that
    "mixed_float16" needs comes from the global policy (`keras.config.set_dtype_policy`) at the time when the model
    that is compiled is made.

    Args:
        classifier: as of `plain_classifier`. Its quantized layers stay as they are.
        policy: "float32", "mixed_bfloat16" or "mixed_float16"; the weights are float32 under each of them.

    Raises:
        UserError: another policy.
    """
    if policy not in DTYPE_POLICIES:
        raise unknown_name("dtype policy", policy, DTYPE_POLICIES)

    def changes(layer: keras.layers.Layer) -> dict[str, Any]:
        if _is_input(layer) or layer.quantization_mode is not None:
            return {}
        return {"dtype": "float32" if layer.name in ALWAYS_FLOAT32 else policy}

    return _copy(classifier, changes)


def _copy(classifier: keras.Model, changes: Callable[[keras.layers.Layer], dict[str, Any]]) -> keras.Model:
    """A copy with the same weights and the same ones frozen; `changes` gives the changed options of a layer."""
    if isinstance(classifier, keras.Sequential):  # its layers have no connections to keep
        raise UserError(
            f"The classifier must be a functional model. Received: {classifier.name!r}, a Sequential one. Pass it "
            "through robust_tf.models.plain_classifier, or build it with keras.Model(inputs, outputs)."
        )
    config = classifier.get_config()
    layers = {layer.name: layer for layer in classifier.layers}  # operations such as a sum have nothing to change
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
            "Another normalization needs a classifier with a layer called 'normalization'. Received one with the "
            f"layers {shortened(names)}. Keep the classifier's own: --normalization=source."
        )


def _pytorch_start(fan_in: int, rng: random.Random) -> dict[str, Any]:
    bound = 1 / math.sqrt(fan_in)
    return {
        f"{name}_initializer": keras.initializers.RandomUniform(-bound, bound, seed=rng.getrandbits(31))
        for name in ("kernel", "bias")
    }


def _keras_start(fan_in: int, rng: random.Random) -> dict[str, Any]:
    return {"kernel_initializer": keras.initializers.GlorotUniform(seed=rng.getrandbits(31))}


def _zero_start(fan_in: int, rng: random.Random) -> dict[str, Any]:
    return {"kernel_initializer": "zeros"}


_STARTS: dict[HeadInitializer, Callable[[int, random.Random], dict[str, Any]]] = {
    "pytorch": _pytorch_start,
    "keras": _keras_start,
    "zeros": _zero_start,
}
