"""Trains a detector or segmenter on a few scenes until it knows them: a check that its head, loss and metric work.

    python tests/prepare_scenes.py scenes
    python -m tests.bench.dense_overfit --task_type=detection --epochs=70
    python -m tests.bench.dense_overfit --task_type=segmentation --epochs=220

The backbone comes from the robust Fashion-MNIST classifier in this package. The program prints the average precision
or the mean IoU on the images of the training.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import time  # noqa: E402

import keras  # noqa: E402

from robust_tf.attacks import AttackConfig  # noqa: E402
from robust_tf.config.data import DataConfig  # noqa: E402
from robust_tf.data import load_task  # noqa: E402
from robust_tf.models import fetch_published, load_classifier  # noqa: E402
from robust_tf.tasks.measuring import Measurer  # noqa: E402
from robust_tf.tasks.table import DENSE_TASKS  # noqa: E402
from robust_tf.transfer import with_image_size  # noqa: E402

IMAGES, SIDE, BATCH = 24, 96, 8


def main() -> None:
    """Trains the network and prints its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_type", choices=sorted(DENSE_TASKS), required=True)
    parser.add_argument("--epochs", type=int, required=True, help="number of epochs of three steps")
    parser.add_argument("--dataset", default="folder:scenes", help="scenes of tests/prepare_scenes.py")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    dense = DENSE_TASKS[arguments.task_type]
    data = DataConfig(task_type=arguments.task_type, dataset=arguments.dataset, image_size=SIDE, subset=str(IMAGES))
    task = load_task(data, batch_size=BATCH)
    source = with_image_size(load_classifier(fetch_published("resnet20_fashion_mnist_l2_eps1")), SIDE)
    network = dense.build(source, len(task.class_names), seed=0)
    task = dense.with_labels_for(task, network)
    batches = task.train_view(0).unbatch().cache().repeat().shuffle(IMAGES, seed=0).batch(BATCH)
    steps = IMAGES // BATCH
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, steps * arguments.epochs)
    network.compile(keras.optimizers.Adam(schedule, global_clipnorm=10.0), dense.loss())
    start = time.perf_counter()
    network.fit(batches, epochs=arguments.epochs, steps_per_epoch=steps, verbose=2)
    seconds = time.perf_counter() - start
    no_attack = AttackConfig(norm="l2", epsilon=0.0, step_size=0.0, steps=0)
    measured = Measurer(dense, network, task, attack=no_attack, batch_size=BATCH).measure(task.train_examples)
    print(f"OVERFIT {arguments.task_type}: {100 * measured.clean.value():.1f} % on {measured.num_images} images,")
    print(f"OVERFIT after {arguments.epochs} epochs in {seconds:.0f} s")


if __name__ == "__main__":
    main()
