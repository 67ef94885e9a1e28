"""The small BatchNorm network of `fixtures/train_step.npz` in Keras, and its weights under PyTorch's names.

The file holds two epochs of three SGD steps of the PyTorch reference implementation (robustness 1.2.1), standard and
adversarial: "initial/<key>", and "<mode>/epoch<e>/<key>", "<mode>/epoch<e>/momentum/<key>" after each epoch.
"""

import pathlib

import keras
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "train_step.npz"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
LEARNING_RATES = (0.1, 0.01)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4

PYTORCH_NAMES = {
    "stem_conv/kernel": "conv1.weight",
    "stem_bn/gamma": "bn1.weight",
    "stem_bn/beta": "bn1.bias",
    "stem_bn/moving_mean": "bn1.running_mean",
    "stem_bn/moving_variance": "bn1.running_var",
    "stage1_conv/kernel": "conv2.weight",
    "stage1_bn/gamma": "bn2.weight",
    "stage1_bn/beta": "bn2.bias",
    "stage1_bn/moving_mean": "bn2.running_mean",
    "stage1_bn/moving_variance": "bn2.running_var",
    "logits/kernel": "fc.weight",
    "logits/bias": "fc.bias",
}


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def build_smallbn() -> keras.Model:
    """The network with the initial weights of the golden run."""
    layers = keras.layers
    images = keras.Input((32, 32, 3), name="images")
    x = keras.ops.clip(images, 0, 1)
    x = layers.Normalization(mean=MEAN, variance=np.square(STD), axis=-1, name="normalization", dtype="float32")(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem_conv")(x)
    x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="stem_bn")(x)
    x = layers.ReLU(name="stem_relu")(x)
    x = layers.ZeroPadding2D(1, name="stem_pad")(x)  # zeros cannot exceed the output of a ReLU
    x = layers.MaxPooling2D(3, 2, name="stem_pool")(x)
    x = layers.ZeroPadding2D(1, name="stage1_pad")(x)
    x = layers.Conv2D(16, 3, 2, use_bias=False, name="stage1_conv")(x)
    x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="stage1_bn")(x)
    x = layers.ReLU(name="stage1_relu")(x)
    features = layers.GlobalAveragePooling2D(name="features")(x)
    logits = layers.Dense(10, name="logits", dtype="float32")(features)
    classifier = keras.Model(images, logits, name="smallbn")
    arrays = golden()
    for weight in classifier.weights:
        weight.assign(keras_layout(arrays[f"initial/{PYTORCH_NAMES[weight.path]}"]))
    return classifier


def keras_layout(array: np.ndarray) -> np.ndarray:
    """(out, in, height, width) -> (height, width, in, out); (out, in) -> (in, out)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def golden_batches() -> tuple[np.ndarray, np.ndarray]:
    """Images (epoch, step, batch, height, width, channels) in [0, 1] and labels (epoch, step, batch)."""
    rng = np.random.default_rng(7 + 500)
    images = rng.uniform(0, 1, (2, 3, 16, 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 10, (2, 3, 16))
    return images.transpose(0, 1, 2, 4, 5, 3), labels
