"""Compares the time of an adversarial training step with its floor: the same passes, timed alone on the same model.

    python -m tests.bench.adversarial_step [--cases=resnet18_64,cifar_resnet18_32] [--precision=float32] [--steps=3,7]
        [--norms=l2] [--beside=torch [--torch_python=python3]] [--quick]

Each step is timed with and without `use_best`, which keeps the iterate with the highest loss and needs one more forward
pass. The PyTorch reference library was timed with the same models and batches. All cases of one model take turns in one
process. With --beside=torch, the same steps in tuned PyTorch (`torch_step.py`) take turns with them in another process,
and a column shows the ratio of the times, ours / PyTorch. With --memory, a new process measures the peak memory of each
kind of step.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
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
from tests.bench.step_process import StepProcess, StepSettings, torch_process  # noqa: E402
from tests.bench.timing import interleaved, peak_memory  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, a batch and an attack, as in the timings of the reference library."""

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
    "resnet50_224": Shape("resnet50", 1000, 224, 8, 3.0, 0.5),  # for the time of its first call: --steps=20 --repeats=1
}
LINF = (8 / 255, 2 / 255)  # epsilon and step size, for every shape


@dataclasses.dataclass(frozen=True)
class Step:
    """A kind of training step. With 0 steps of the attack it is a standard training step."""

    steps: int
    norm: str = "l2"
    use_best: bool = True

    @property
    def title(self) -> str:
        if not self.steps:
            return "standard step"
        return f"PGD-{self.steps} step, {self.norm}, {'best' if self.use_best else 'last'} iterate"


STANDARD = Step(0)
_IN_TORCH = "torch "  # before the title of a step that runs in PyTorch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default="resnet20_32,resnet18_64,cifar_resnet18_32", help="Names of models, separated by commas."
    )
    parser.add_argument("--precision", default="float32,mixed_bfloat16", help="Dtype policies, separated by commas.")
    parser.add_argument("--steps", default="1,3,7", help="Numbers of attack steps, separated by commas.")
    parser.add_argument("--norms", default="l2,linf", help="Norms of the attack, separated by commas.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--quick", action="store_true", help="Use batches of 2 and 2 repeats, only to see that it runs."
    )
    parser.add_argument("--beside", choices=("torch",), help="Other framework that takes turns with ours.")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="Command of a Python with torch and torchvision."
    )
    parser.add_argument("--memory", action="store_true", help="Also measure the peak memory of each step.")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # title of the step that a new process measures
    arguments = parser.parse_args()
    kinds = [
        Step(int(steps), norm, use_best)
        for norm in arguments.norms.split(",")
        for use_best in (True, False)
        for steps in arguments.steps.split(",")
    ]
    steps = {kind.title: kind for kind in (STANDARD, *kinds)}
    for name in arguments.cases.split(","):
        for precision in arguments.precision.split(","):
            keras.config.set_dtype_policy(precision)
            shape = dataclasses.replace(SHAPES[name], batch_size=2) if arguments.quick else SHAPES[name]
            if arguments.memory_of is not None:
                _memory_of(shape, steps[arguments.memory_of])
            else:
                _report(name, shape, precision, steps, arguments)


def _report(name: str, shape: Shape, precision: str, steps: dict[str, Step], arguments: argparse.Namespace) -> None:
    repeats = 2 if arguments.quick else arguments.repeats
    with contextlib.ExitStack() as stack:
        cases = _cases(shape, steps)
        if arguments.beside:
            process = stack.enter_context(contextlib.closing(torch_process(arguments.torch_python)))
            cases |= _cases_in_torch(process, shape, precision, steps)
        timings = interleaved(cases, repeats=repeats, warmup=2)
    median = {case: timing.median for case, timing in timings.items()}
    print(f"\n{name}, batch {shape.batch_size}, {precision}, median of {repeats}")
    print(f"{'':32}{'s/step':>9}{'images/s':>10}{'/ floor':>9}{'/ torch':>9}{'first s':>9}{'peak MiB':>10}")
    for case, timing in timings.items():
        step = steps.get(case)
        floor = 0.0
        if step and step.steps:
            floor = median[STANDARD.title] + step.steps * median["input gradient"] + step.use_best * median["forward"]
        memory = _peak_memory(name, precision, case, arguments) if arguments.memory and step else ""
        ratio = f"{timing.median / floor:.2f}" if floor else ""
        other = median.get(_IN_TORCH + case)
        beside = f"{timing.median / other:.2f}" if other else ""
        speed = shape.batch_size / timing.median
        print(
            f"{case:32}{timing.median:9.4f}{speed:10.1f}{ratio:>9}{beside:>9}{timing.first:9.1f}{memory:>10}",
            flush=True,
        )


def _cases(shape: Shape, steps: dict[str, Step]) -> dict[str, Callable[[], object]]:
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
        return run_pgd(classifier, images, labels, attack=_attack(shape, Step(3))).images_adv

    return {
        "forward": lambda: forward().numpy(),
        "input gradient": lambda: input_gradient().numpy(),
        "attack alone (PGD-3)": lambda: attack().numpy(),
        **{title: _step(shape, classifier, step) for title, step in steps.items()},
    }


def _cases_in_torch(
    process: StepProcess, shape: Shape, precision: str, steps: dict[str, Step]
) -> dict[str, Callable[[], object]]:
    """Builds the same steps in the process of PyTorch. Returns a function for each that runs it there."""
    for title, step in steps.items():
        attack = _attack(shape, step)
        settings = StepSettings(
            architecture=shape.architecture,
            num_classes=shape.num_classes,
            image_size=shape.image_size,
            batch_size=shape.batch_size,
            steps=step.steps,
            norm=step.norm,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            use_best=step.use_best,
            precision="float32" if precision == "float32" else "bfloat16",
            compiled=False,
            device="CPU",
        )
        process.build(title, settings)
    return {_IN_TORCH + title: functools.partial(process.run, title) for title in steps}


def _step(shape: Shape, classifier: keras.Model, step: Step) -> Callable[[], object]:
    images, labels = _batch(shape)
    trainer = AdversarialTrainer(classifier, _attack(shape, step))
    trainer.compile(
        build_optimizer("sgd", learning_rate=1e-4, momentum=0.9, weight_decay=5e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return lambda: trainer.train_on_batch(images, labels)


def _attack(shape: Shape, step: Step) -> AttackConfig:
    epsilon, step_size = LINF if step.norm == "linf" else (shape.epsilon, shape.step_size)
    return AttackConfig(
        norm=step.norm,
        epsilon=epsilon if step.steps else 0.0,
        step_size=step_size,
        steps=step.steps,
        use_best=step.use_best,
    )


def _classifier(shape: Shape) -> keras.Model:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return build_classifier(shape.architecture, shape.num_classes, image_size=shape.image_size, mean=mean, std=std)


def _batch(shape: Shape) -> tuple[tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(0)
    images = rng.random((shape.batch_size, shape.image_size, shape.image_size, 3)).astype(np.float32)
    return tf.constant(images), tf.constant(rng.integers(0, shape.num_classes, shape.batch_size), tf.int32)


def _memory_of(shape: Shape, kind: Step) -> None:
    step = _step(shape, _classifier(shape), kind)
    for _ in range(3):
        step()
    print(f"{peak_memory():.0f}")


def _peak_memory(name: str, precision: str, title: str, arguments: argparse.Namespace) -> str:
    command = [sys.executable, "-m", "tests.bench.adversarial_step", f"--cases={name}", f"--precision={precision}"]
    command += [f"--memory_of={title}", f"--steps={arguments.steps}", f"--norms={arguments.norms}"]
    command += ["--quick"] if arguments.quick else []
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
