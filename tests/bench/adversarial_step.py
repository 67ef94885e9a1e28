"""Times the adversarial training step beside its floor: the same passes, each timed bare on the same model.

    python -m tests.bench.adversarial_step [--cases=resnet18_64,cifar_resnet18_32] [--precision=float32] [--quick]

The shapes are those at which the PyTorch reference library was timed. All cases of one model run in one process and
take turns. Peak memory is that of a fresh process for each kind of step (--memory).
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.attacks import AttackConfig, run_pgd  # noqa: E402
from robust_tf.models import build_classifier  # noqa: E402
from robust_tf.training import AdversarialTrainer  # noqa: E402
from robust_tf.training.optimizers import build_optimizer  # noqa: E402
from tests.bench.timing import interleaved, peak_memory  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model and batch, with the attack that the reference timings have for it."""

    architecture: str
    num_classes: int
    image_size: int
    batch_size: int
    epsilon: float
    step_size: float


SHAPES = {
    "resnet20_32": Shape("resnet20", 10, 32, 128, 1.0, 0.2),
    "resnet18_64": Shape("resnet18", 1000, 64, 32, 3.0, 2.0),
    "cifar_resnet18_32": Shape("cifar_resnet18", 10, 32, 64, 0.5, 0.1),
}
STEPS = (0, 3, 7)
TITLES = {0: "standard step", 3: "PGD-3 step", 7: "PGD-7 step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="resnet20_32,resnet18_64,cifar_resnet18_32", help="names, with commas")
    parser.add_argument("--precision", default="float32,mixed_bfloat16", help="policies, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="batches of 2, two repeats: only to see that it runs")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each step, in new processes")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)  # PGD steps; what the new processes are told
    arguments = parser.parse_args()
    for name in arguments.cases.split(","):
        for precision in arguments.precision.split(","):
            keras.config.set_dtype_policy(precision)
            shape = dataclasses.replace(SHAPES[name], batch_size=2) if arguments.quick else SHAPES[name]
            if arguments.memory_of is not None:
                _memory_of(shape, arguments.memory_of)
            else:
                _report(name, shape, precision, 2 if arguments.quick else arguments.repeats, arguments)


def _report(name: str, shape: Shape, precision: str, repeats: int, arguments: argparse.Namespace) -> None:
    timings = interleaved(_cases(shape), repeats=repeats, warmup=2)
    median = {case: timing.median for case, timing in timings.items()}
    print(f"\n{name}, batch {shape.batch_size}, {precision}, median of {repeats}")
    print(f"{'':28}{'s/step':>9}{'images/s':>10}{'/ floor':>9}{'first s':>9}{'peak MiB':>10}")
    for case, timing in timings.items():
        steps = next((steps for steps, title in TITLES.items() if title == case), None)
        # use_best looks at the last iterate too: one more forward pass.
        floor = median["standard step"] + steps * median["input gradient"] + median["forward"] if steps else None
        memory = _peak_memory(name, precision, steps, arguments) if arguments.memory and steps is not None else ""
        ratio = f"{timing.median / floor:.2f}" if floor else ""
        speed = shape.batch_size / timing.median
        print(f"{case:28}{timing.median:9.4f}{speed:10.1f}{ratio:>9}{timing.first:9.1f}{memory:>10}", flush=True)


def _cases(shape: Shape) -> dict[str, Callable[[], object]]:
    images, labels = _batch(shape)
    classifier = _classifier(shape)

    @tf.function
    def forward() -> tf.Tensor:
        return classifier(images, training=False)

    @tf.function
    def input_gradient() -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            logits = tf.cast(classifier(images, training=False), tf.float32)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return tape.gradient(loss, images)

    @tf.function
    def attack() -> tf.Tensor:
        return run_pgd(classifier, images, labels, attack=_attack(shape, 3)).images_adv

    steps = {TITLES[count]: _step(shape, classifier, count) for count in STEPS}
    return {
        "forward": lambda: forward().numpy(),
        "input gradient": lambda: input_gradient().numpy(),
        "attack alone (PGD-3)": lambda: attack().numpy(),
        **steps,
    }


def _step(shape: Shape, classifier: keras.Model, steps: int) -> Callable[[], object]:
    images, labels = _batch(shape)
    trainer = AdversarialTrainer(classifier, _attack(shape, steps))
    trainer.compile(
        build_optimizer("sgd", learning_rate=1e-4, momentum=0.9, weight_decay=5e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return lambda: trainer.train_on_batch(images, labels)


def _attack(shape: Shape, steps: int) -> AttackConfig:
    return AttackConfig(norm="l2", epsilon=shape.epsilon, step_size=shape.step_size, steps=steps)


def _classifier(shape: Shape) -> keras.Model:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return build_classifier(shape.architecture, shape.num_classes, image_size=shape.image_size, mean=mean, std=std)


def _batch(shape: Shape) -> tuple[tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(0)
    images = rng.random((shape.batch_size, shape.image_size, shape.image_size, 3)).astype(np.float32)
    return tf.constant(images), tf.constant(rng.integers(0, shape.num_classes, shape.batch_size), tf.int32)


def _memory_of(shape: Shape, steps: int) -> None:
    step = _step(shape, _classifier(shape), steps)
    for _ in range(3):
        step()
    print(f"{peak_memory():.0f}")


def _peak_memory(name: str, precision: str, steps: int, arguments: argparse.Namespace) -> str:
    command = [sys.executable, "-m", "tests.bench.adversarial_step", f"--cases={name}", f"--precision={precision}"]
    command += [f"--memory_of={steps}"] + (["--quick"] if arguments.quick else [])
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
