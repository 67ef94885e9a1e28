"""Compares the speed of PGD-20 and APGD with foolbox and torchattacks: same weights, images and steps, in one process.

    python -m tests.bench.attacks [--batch_size=32] [--repeats=5] [--threads=2] [--quick]

The model is a ResNet-18 for 64x64 images and 1000 classes. The comparison needs foolbox (for its TensorFlow backend),
torch, torchvision and torchattacks; a library that cannot be imported is left out. Every image goes through all steps,
without an early stop, and the cases take turns. foolbox calls the model eagerly, as its documentation shows, and in a
second case a `tf.function` of the model. The last table shows the same attacks with an early stop.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import importlib.util  # noqa: E402
from collections.abc import Callable  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.attacks import apgd, pgd  # noqa: E402
from robust_tf.models import build_classifier, to_reference_state  # noqa: E402
from tests.bench.timing import interleaved  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 3.0
PGD_STEPS, APGD_STEPS = 20, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="Use batches of 2 and 1 repeat, only to see that it runs.")
    arguments = parser.parse_args()
    batch_size, repeats = (2, 1) if arguments.quick else (arguments.batch_size, arguments.repeats)
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    classifier = build_classifier("resnet18", 1000, image_size=64, mean=MEAN, std=STD)
    images = np.random.default_rng(0).random((batch_size, 64, 64, 3)).astype(np.float32)
    # The labels are the predictions: an attack on an image that is already misclassified may have nothing to do.
    labels = classifier.predict(images, verbose=0).argmax(axis=-1).astype(np.int32)
    cases = _ours(classifier, images, labels, early_stop=False)
    if importlib.util.find_spec("foolbox"):
        cases |= _foolbox(classifier, images, labels)
    if importlib.util.find_spec("torchattacks") and importlib.util.find_spec("torchvision"):
        cases |= _torchattacks(classifier, images, labels, arguments.threads)
    _report(f"ResNet-18, 64x64, batch {batch_size}, float32, {arguments.threads} threads", cases, batch_size, repeats)
    stopping = _ours(classifier, images, labels, early_stop=True)
    _report(
        "The same with early_stop (nearly all images of this untrained network fall at once)",
        stopping,
        batch_size,
        repeats,
    )


def _report(title: str, cases: dict[str, Callable[[], object]], batch_size: int, repeats: int) -> None:
    timings = interleaved(cases, repeats=repeats, warmup=1)
    ours = {name.split(" ")[0]: timing.median for name, timing in timings.items() if name.endswith("robust_tf")}
    print(f"\n{title}, median of {repeats}\n{'':32}{'s/batch':>9}{'images/s':>10}{'/ ours':>10}{'first s':>9}")
    for name, timing in timings.items():
        ratio = f"{timing.median / ours[name.split(' ')[0]]:.2f}x"
        speed = batch_size / timing.median
        print(f"{name:32}{timing.median:9.3f}{speed:10.2f}{ratio:>10}{timing.first:9.1f}", flush=True)


def _ours(
    classifier: keras.Model, images: np.ndarray, labels: np.ndarray, *, early_stop: bool
) -> dict[str, Callable[[], object]]:
    x, y = tf.constant(images), tf.constant(labels)

    @tf.function
    def run_pgd(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        # The last iterate, which the other libraries return, instead of the best one.
        return pgd(classifier, x, y, norm="l2", epsilon=EPSILON, steps=PGD_STEPS, use_best=False, early_stop=early_stop)

    @tf.function
    def run_apgd(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return apgd(classifier, x, y, norm="l2", epsilon=EPSILON, steps=APGD_STEPS, early_stop=early_stop)

    return {
        f"PGD-{PGD_STEPS} robust_tf": lambda: run_pgd(x, y).numpy(),
        f"APGD-{APGD_STEPS} robust_tf": lambda: run_apgd(x, y).numpy(),
    }


def _foolbox(classifier: keras.Model, images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], object]]:
    import foolbox

    attack = foolbox.attacks.L2ProjectedGradientDescentAttack(
        rel_stepsize=2.5 / PGD_STEPS, steps=PGD_STEPS, random_start=False
    )
    x, y = tf.constant(images), tf.constant(labels, tf.int64)
    compiled = tf.function(lambda images: classifier(images, training=False))

    class Compiled(tf.Module):
        def __call__(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
            return compiled(images)

    def case(model: object) -> Callable[[], object]:
        wrapped = foolbox.TensorFlowModel(model, bounds=(0, 1), device="/CPU:0")
        # `run` leaves out the checks of the result that `__call__` adds.
        return lambda: attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=EPSILON).numpy()

    return {f"PGD-{PGD_STEPS} foolbox": case(classifier), f"PGD-{PGD_STEPS} foolbox, tf.function": case(Compiled())}


def _torchattacks(
    classifier: keras.Model, images: np.ndarray, labels: np.ndarray, threads: int
) -> dict[str, Callable[[], object]]:
    import torch
    import torchattacks
    import torchvision

    torch.set_num_threads(threads)
    network = torchvision.models.resnet18(num_classes=1000)
    network.load_state_dict({key: torch.from_numpy(array) for key, array in to_reference_state(classifier).items()})

    class Normalized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network((images.clamp(0, 1) - self.mean) / self.std)

    model = Normalized().eval().requires_grad_(False)
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))
    with torch.no_grad():
        difference = np.abs(model(x).numpy() - classifier.predict(images, verbose=0)).max()
    print(f"largest difference of a logit between TensorFlow and PyTorch: {difference:.1e}")
    pgd_torch = torchattacks.PGDL2(
        model, eps=EPSILON, alpha=2.5 * EPSILON / PGD_STEPS, steps=PGD_STEPS, random_start=False
    )
    apgd_torch = torchattacks.APGD(model, norm="L2", eps=EPSILON, steps=APGD_STEPS, n_restarts=1, seed=0, loss="ce")
    return {
        f"PGD-{PGD_STEPS} torchattacks": lambda: pgd_torch(x, y).detach().numpy(),
        f"APGD-{APGD_STEPS} torchattacks": lambda: apgd_torch(x, y).detach().numpy(),
    }


if __name__ == "__main__":
    main()
