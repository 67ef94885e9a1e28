"""Compares the speed of our ResNets with `keras.applications.ResNet50`, for inference and for a training step.

    python -m tests.bench.architectures [--quick]

All models run on the same images in one process. Ours also clip and normalize the images, which the model of
keras.applications does not. "As exported" means with BatchNorm folded into the convolutions, as in the SavedModels that
`robust_tf.export` writes.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import functools  # noqa: E402
from collections.abc import Callable  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.models import build_classifier  # noqa: E402
from robust_tf.models.folding import fold_batch_norm  # noqa: E402
from tests.bench.timing import interleaved, peak_memory  # noqa: E402

NUM_CLASSES = 1000
BASELINE = "keras.applications.ResNet50"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Use tiny images and 2 repeats, only to see that it runs.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch_size, arguments.image_size, arguments.repeats = 2, 32, 2

    shape = (arguments.image_size, arguments.image_size, 3)
    rng = np.random.default_rng(0)
    images = tf.constant(rng.random((arguments.batch_size, *shape)), tf.float32)
    labels = tf.constant(rng.integers(0, NUM_CLASSES, arguments.batch_size), tf.int32)
    classifiers = {
        BASELINE: keras.applications.ResNet50(
            weights=None, input_shape=shape, classes=NUM_CLASSES, classifier_activation=None
        ),
        "resnet50": _ours("resnet50", arguments.image_size),
        "resnet18": _ours("resnet18", arguments.image_size),
    }
    exported = {f"{name}, as exported": fold_batch_norm(classifiers[name]) for name in ("resnet50", "resnet18")}
    for title, case in (("inference", _inference), ("training step", _training)):
        compared = classifiers | exported if case is _inference else classifiers
        cases = {name: case(classifier, images, labels) for name, classifier in compared.items()}
        timings = interleaved(cases, repeats=arguments.repeats, warmup=2)
        print(f"\n{title}, batch {arguments.batch_size}, {shape[0]}x{shape[1]}, median of {arguments.repeats}")
        print(f"{'':30}{'s/step':>10}{'images/s':>10}{'ratio':>8}{'first s':>10}")
        for name, timing in timings.items():
            ratio = timings[BASELINE].median / timing.median
            speed = arguments.batch_size / timing.median
            print(f"{name:30}{timing.median:10.4f}{speed:10.1f}{ratio:8.2f}{timing.first:10.1f}")
    print(f"\nratio: how many times as fast as {BASELINE}; peak memory {peak_memory():.0f} MiB")


def _ours(architecture: str, image_size: int) -> keras.Model:
    return build_classifier(
        architecture, NUM_CLASSES, image_size=image_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def _inference(classifier: keras.Model, images: tf.Tensor, labels: tf.Tensor) -> Callable[[], object]:
    call = tf.function(functools.partial(classifier, training=False))
    return lambda: call(images).numpy()


def _training(classifier: keras.Model, images: tf.Tensor, labels: tf.Tensor) -> Callable[[], object]:
    classifier.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return functools.partial(classifier.train_on_batch, images, labels)


if __name__ == "__main__":
    main()
