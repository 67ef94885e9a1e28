"""The small network of `fixtures/pgd.npz` in Keras, and the inputs of its cases.

The file holds results of the PyTorch reference implementation (robustness 1.2.1). For each case these are the
adversarial examples for images 0 and 7 of a batch of 8, channels first, and the losses of all 8 at each iterate.
"""

import pathlib

import keras
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "pgd.npz"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
STORED_IMAGES = (0, 7)


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def build_smallcnn() -> keras.Model:
    """Returns a convolution, ReLU, 8x8 mean pooling and a linear layer, with the reference's weights."""
    images = keras.Input((32, 32, 3), name="images")
    x = keras.ops.clip(images, 0, 1)
    x = keras.layers.Normalization(mean=MEAN, variance=np.square(STD), axis=-1)(x)
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1")(x)
    x = keras.layers.AveragePooling2D(8)(x)
    x = keras.layers.Flatten()(keras.layers.Permute((3, 1, 2))(x))  # the reference flattens channels first
    classifier = keras.Model(images, keras.layers.Dense(10, name="fc")(x))
    arrays = golden()
    kernel = arrays["weights/conv1.weight"].transpose(2, 3, 1, 0)
    classifier.get_layer("conv1").set_weights([kernel, arrays["weights/conv1.bias"]])
    classifier.get_layer("fc").set_weights([arrays["weights/fc.weight"].T, arrays["weights/fc.bias"]])
    return classifier


def inputs() -> dict[str, np.ndarray]:
    """Returns images in [0, 1] and images_oob, partly out of bounds, (8, 32, 32, 3), and labels and targets (8,)."""
    rng = np.random.default_rng(7)
    images = np.clip(rng.uniform(-0.1, 1.1, (8, 3, 32, 32)), 0, 1).astype(np.float32)
    labels = rng.integers(0, 10, 8)
    targets = (labels + rng.integers(1, 10, 8)) % 10
    images_oob = rng.uniform(-0.2, 1.2, (8, 3, 32, 32)).astype(np.float32)
    return {
        "images": images.transpose(0, 2, 3, 1),
        "labels": labels,
        "targets": targets,
        "images_oob": images_oob.transpose(0, 2, 3, 1),
    }
