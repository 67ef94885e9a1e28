"""Compares the time of an adversarial training step of a detector or segmenter with the same passes timed alone.

    python -m tests.bench.dense_step [--task_types=detection,segmentation] [--image_size=96] [--batch_size=16]
        [--steps=3] [--dataset=folder:scenes]

The floor of a step is a standard step, an input gradient of the task's loss for each attack step, and a forward pass
for the last iterate. All cases of one network take turns in one process. With --dataset, the speed of the input
pipeline alone is measured as well.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.attacks import AttackConfig  # noqa: E402
from robust_tf.config.data import DataConfig  # noqa: E402
from robust_tf.data import load_task  # noqa: E402
from robust_tf.models import build_classifier  # noqa: E402
from robust_tf.tasks.base import DenseTask  # noqa: E402
from robust_tf.tasks.table import DENSE_TASKS  # noqa: E402
from robust_tf.training import AdversarialTrainer  # noqa: E402
from robust_tf.training.optimizers import build_optimizer  # noqa: E402
from tests.bench.timing import interleaved  # noqa: E402

NUM_CLASSES = 10


def main() -> None:
    """Reads the arguments and prints a table for each task type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_types", default="detection,segmentation", help="task types, separated by commas")
    parser.add_argument("--architecture", default="resnet20", help="backbone")
    parser.add_argument("--image_size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch_size", type=int, default=16, help="images in a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of the attack")
    parser.add_argument("--repeats", type=int, default=7, help="number of timings of each case")
    parser.add_argument("--dataset", default="", help="data set whose pipeline is timed, too")
    arguments = parser.parse_args()
    for name in arguments.task_types.split(","):
        report(DENSE_TASKS[name], arguments)


def report(dense: DenseTask, arguments: argparse.Namespace) -> None:
    """Times the cases of one task type and prints them."""
    timings = interleaved(cases_of(dense, arguments), repeats=arguments.repeats, warmup=2)
    median = {name: timing.median for name, timing in timings.items()}
    floor = median["standard step"] + arguments.steps * median["input gradient"] + median["forward"]
    print(f"\n{dense.name}, {arguments.architecture}, {arguments.image_size} pixels, batch {arguments.batch_size}")
    for name, seconds in median.items():
        ratio = f"  {seconds / floor:.2f} of its floor" if name.startswith("PGD") else ""
        print(f"{name:20}{seconds:9.4f} s{arguments.batch_size / seconds:9.1f} images/s{ratio}", flush=True)
    if arguments.dataset:
        print(f"{'pipeline':20}{pipeline_rate(dense, arguments):21.1f} images/s", flush=True)


def cases_of(dense: DenseTask, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns the functions to time."""
    size = arguments.image_size
    backbone = build_classifier(arguments.architecture, 10, image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = dense.build(backbone, NUM_CLASSES, seed=0)
    rng = np.random.default_rng(0)
    images = tf.constant(rng.random((arguments.batch_size, size, size, 3)).astype(np.float32))
    labels = dense.trial_labels(network(images, training=False))
    losses = keras.tree.flatten(dense.loss())

    @tf.function
    def forward() -> Any:
        return network(images, training=False)

    @tf.function
    def input_gradient() -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            pairs = zip(
                losses, keras.tree.flatten(labels), keras.tree.flatten(network(images, training=False)), strict=True
            )
            loss = tf.add_n([tf.reduce_sum(loss.call(tf.cast(y, tf.float32), outputs)) for loss, y, outputs in pairs])
        return tape.gradient(loss, images)

    def step(steps: int) -> Callable[[], Any]:
        attack = AttackConfig(norm="l2", epsilon=0.5 if steps else 0.0, step_size=0.2, steps=steps)
        trainer = AdversarialTrainer(network, attack)
        optimizer = build_optimizer("sgd", learning_rate=1e-4, momentum=0.9, weight_decay=5e-4)
        trainer.compile(optimizer, dense.loss(), weighted_metrics=dense.metrics(NUM_CLASSES))
        trainer.build_metrics(dense.trial_labels)
        return lambda: trainer.train_on_batch(images, labels)

    return {
        "forward": lambda: keras.tree.map_structure(lambda output: output.numpy(), forward()),
        "input gradient": lambda: input_gradient().numpy(),
        "standard step": step(0),
        f"PGD-{arguments.steps} step": step(arguments.steps),
    }


def pipeline_rate(dense: DenseTask, arguments: argparse.Namespace) -> float:
    """Returns how many training images a second the input pipeline prepares."""
    data = DataConfig(task_type=dense.name, dataset=arguments.dataset, image_size=arguments.image_size)
    task = load_task(data, batch_size=arguments.batch_size)
    backbone = build_classifier(
        arguments.architecture, 10, image_size=arguments.image_size, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    task = dense.with_labels_for(task, dense.build(backbone, len(task.class_names), seed=0))
    batches = iter(task.train(first_epoch=0, epochs=1000))
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    for _ in range(30):
        next(batches)
    return 30 * arguments.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
