"""Small examples of all forms that a user's Keras classifier may have, for tests of all programs."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

SIZE = 8
layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a classifier.

    Attributes:
        build: Function that builds the model.
        probabilities: Function that converts the outputs of the model into class probabilities.
        num_classes: Number of classes.
        refusal: Part of the message with which every program refuses the form, or "" if programs accept it.
        tolerance: Tolerance of the served probabilities.
    """

    build: Callable[[], keras.Model]
    probabilities: Callable[[np.ndarray], np.ndarray] = lambda outputs: softmax(outputs)
    num_classes: int = 3
    refusal: str = ""
    tolerance: float = 1e-5


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def of_two(probability: np.ndarray) -> np.ndarray:
    return np.concatenate([1 - probability, probability], axis=1)


def image_input(**options) -> keras.KerasTensor:
    return keras.Input((SIZE, SIZE, 3), **options)


def backbone(images: keras.KerasTensor) -> keras.KerasTensor:
    return layers.Dense(6, activation="relu")(layers.Flatten()(layers.Conv2D(4, 3, strides=2)(images)))


def functional(units: int = 3, activation: str | None = None) -> keras.Model:
    images = image_input()
    return keras.Model(images, layers.Dense(units, activation=activation)(backbone(images)))


def sequential() -> keras.Model:
    return keras.Sequential(
        [image_input(), layers.Conv2D(4, 3, strides=2), layers.BatchNormalization(), layers.Flatten(), layers.Dense(3)]
    )


def nested() -> keras.Model:
    """Has duplicate names, a Functional backbone in inference mode, and a softmax inside the last model."""
    inside = image_input()
    convolutions = keras.Model(inside, layers.Conv2D(4, 3, strides=2, name="same")(inside), name="convolutions")
    base = keras.Sequential([image_input(), convolutions, layers.BatchNormalization()], name="base")
    head = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax", name="same")], name="head")
    images = image_input()
    features = layers.GlobalAveragePooling2D()(keras.ops.relu(base(images, training=False)))
    return keras.Model(images, head(features))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.convolution = layers.Conv2D(4, 3, strides=2)
        self.head = keras.Sequential([layers.Flatten(), layers.Dense(3, activation="softmax")])

    def call(self, images, training=None):
        return self.head(keras.ops.relu(self.convolution(images)))


@keras.saving.register_keras_serializable("tests")
class NeedsNumbers(Subclassed):
    """A model whose `call` fails on a symbolic input."""

    def call(self, images, training=None):
        return super().call(keras.ops.convert_to_tensor(np.asarray(images)))


def called(model: keras.Model) -> keras.Model:
    model(np.zeros((1, SIZE, SIZE, 3), np.float32))
    return model


def adapted_normalization() -> keras.Model:
    """Its statistics are weights from which the layer derives the values that it uses."""
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).random((32, SIZE, SIZE, 3)).astype(np.float32))
    images = image_input()
    return keras.Model(images, layers.Softmax()(layers.Dense(3)(backbone(normalization(images)))))


def int8() -> keras.Model:
    model = functional()
    model.quantize("int8")
    return model


def lora() -> keras.Model:
    model = functional()
    for layer in model.layers:
        if isinstance(layer, layers.Dense | layers.Conv2D):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(keras.random.normal(layer.lora_kernel_b.shape, seed=1))
    return model


def half_precision() -> keras.Model:
    images = image_input()
    logits = layers.Dense(3, dtype="mixed_bfloat16")(backbone(images))
    return keras.Model(images, layers.Activation("softmax", dtype="float32")(logits))


def convolution_head() -> keras.Model:
    """Has no Dense layer, and a layer with a reserved name."""
    images = image_input()
    x = layers.Conv2D(4, 3, strides=2, activation="relu", name="features")(images)
    return keras.Model(images, keras.ops.softmax(layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1)(x))))


def dict_input() -> keras.Model:
    images = image_input()
    return keras.Model({"image": images}, {"scores": layers.Dense(3)(backbone(images))})


def two_outputs(first: str, second: str) -> keras.Model:
    images = image_input()
    x = backbone(images)
    return keras.Model(images, {first: layers.Dense(3, name=first)(x), second: layers.Dense(2, name=second)(x)})


def channels_first() -> keras.Model:
    images = keras.Input((3, SIZE, SIZE))
    x = layers.Conv2D(4, 3, data_format="channels_first")(images)
    return keras.Model(images, layers.Dense(3)(layers.Flatten()(x)))


FORMS = {
    "functional": Form(functional),
    "sequential": Form(sequential),
    "sequential built by its first call": Form(
        lambda: called(keras.Sequential([layers.Flatten(), layers.Dense(3, activation="softmax")])), np.asarray
    ),
    "nested": Form(nested, np.asarray),
    "subclassed": Form(lambda: called(Subclassed()), np.asarray),
    "softmax": Form(lambda: functional(activation="softmax"), np.asarray),
    "softmax in half precision": Form(half_precision, np.asarray, tolerance=5e-2),
    "adapted normalization": Form(adapted_normalization, np.asarray),
    "convolution head": Form(convolution_head, np.asarray),
    "sigmoid": Form(lambda: functional(1, "sigmoid"), of_two, 2),
    "one logit": Form(lambda: functional(1), lambda outputs: of_two(1 / (1 + np.exp(-outputs))), 2),
    "dict input": Form(dict_input, lambda outputs: softmax(outputs["scores"])),
    "output called logits": Form(
        lambda: two_outputs("logits", "depth"), lambda outputs: softmax(np.asarray(outputs["logits"]))
    ),
    "int8": Form(int8),
    "lora": Form(lora),
    "two outputs": Form(lambda: two_outputs("animal", "color"), refusal=r"2: 'animal', 'color'\. Keep one"),
    "two inputs": Form(
        lambda: keras.Model(
            {"a": (a := image_input()), "b": (b := keras.Input((2,)))},
            layers.Dense(3)(layers.Concatenate()([layers.Flatten()(a), b])),
        ),
        refusal="2: 'a', 'b'",
    ),
    "sigmoid of each label": Form(lambda: functional(3, "sigmoid"), refusal="whose 3 sigmoid outputs are independent"),
    "one tanh": Form(lambda: functional(1, "tanh"), refusal="ends in tanh"),
    "map of classes": Form(
        lambda: keras.Model((i := image_input()), layers.Conv2D(3, 1)(i)), refusal=r"\(None, 8, 8, 3\) from"
    ),
    "integer images": Form(
        lambda: keras.Model((i := image_input(dtype="uint8")), layers.Dense(3)(layers.Flatten()(i))),
        refusal="an input of type uint8",
    ),
    "channels_first": Form(channels_first, refusal=r"\(None, 3, 8, 8\) in .*channels first"),
    "subclassed, not symbolic": Form(
        lambda: called(NeedsNumbers()), refusal="NeedsNumbers: .*Use only keras.layers and keras.ops"
    ),
}
