"""The table that `--dry_run` prints: the size of a job, before anything is trained."""

import math
import pathlib

import keras
from rich.table import Table

from robust_tf.config.adversarial import AdversarialConfig
from robust_tf.config.job import JobConfig
from robust_tf.config.optimization import OptimizationConfig
from robust_tf.job.task import TaskSummary
from robust_tf.transfer.stages import parameter_counts

# Resident size of a process that has imported TensorFlow and read its data, as measured on Linux.
_PROCESS_BYTES = 700 * 1024**2
# Number of values that training keeps in memory for each value that a layer outputs, measured in the same way.
_PER_OUTPUT = 1.2
# Layers whose inputs are kept in memory, because their gradients need them.
_KEEPING = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
    keras.layers.BatchNormalization,
)


def plan_table(job: JobConfig, task: TaskSummary, classifier: keras.Model) -> Table:
    """Returns the plan of one job.

    Args:
        job: Job to plan.
        task: Size of its data.
        classifier: Classifier with the right layers frozen; its weights do not matter.
    """
    trainable, total = parameter_counts(classifier)
    table = Table(
        title=f"Plan of {pathlib.Path(job.run.workdir)} (dry run: nothing is trained)",
        title_justify="left",
        show_header=False,
    )
    rows = {
        "task": job.task,
        "data": f"{job.data.dataset}: {task.num_train} training, {task.num_validation} validation, "
        f"{task.num_test} test images, {len(task.class_names)} classes"
        + (", weighted in the loss" if job.optimization.class_weight == "balanced" else ""),
        "images": f"{task.image_size}x{task.image_size}, augmentation {task.augmentation}",
        "source": job.transfer.source,
        "model": f"{classifier.name}: {total:,} parameters, {trainable:,} trainable, {total - trainable:,} frozen",
        "attack": _attack(job.adversarial, epochs=job.optimization.epochs),
        "steps": _steps(job, task.steps_per_epoch),
        "rate": _learning_rate(job.optimization) if job.transfer.head == "sgd" else "no learning rate",
        "passes": f"1 forward pass per image and view ({job.transfer.views}), whose features are stored"
        if job.transfer.cached
        else f"{job.gradients_per_image:g} forward and backward passes per image and epoch",
        "memory": f"about {estimated_bytes(job, classifier) / 1024**3:.1f} GB (estimate)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def estimated_bytes(job: JobConfig, classifier: keras.Model) -> int:
    """Estimates the peak memory of training on a CPU: process, weights, gradients, momentum, and activations.

    The estimate is right within a factor of 1.5: tests/job/test_planning.py measures the peak resident size of PGD
    training on Linux.

    Args:
        job: Job to plan.
        classifier: Classifier with the right layers frozen.
    """
    trainable, total = parameter_counts(classifier)
    # AWP keeps a second set of weights, and TRADES keeps two batches for its backward pass.
    weights = 4 * (total + (3 if job.adversarial.uses_awp else 2) * trainable)
    images = job.optimization.batch_size * (2 if job.adversarial.uses_trades else 1)
    return int(_PROCESS_BYTES + weights + images * activation_bytes(classifier, job.optimization.precision))


def activation_bytes(classifier: keras.Model, precision: str) -> float:
    """Estimates the bytes that training on a CPU needs for one image of a batch.

    The estimate is a multiple of the outputs of all layers. Not all outputs are kept for the backward pass, but
    gradients and the operations' workspaces take memory as well.

    Args:
        classifier: Classifier that is trained.
        precision: Value of `--precision`.
    """
    outputs = sum(_values(tensor) for layer in classifier.layers for tensor in keras.tree.flatten(layer.output))
    return _PER_OUTPUT * outputs * _bytes_per_value(precision)


def fused_activation_bytes(classifier: keras.Model, precision: str) -> float:
    """Estimates the bytes for one image in training on an accelerator, where XLA fuses the layers between convolutions.

    The inputs of convolutions, dense layers and BatchNorm are kept for the backward pass; the largest output and its
    gradient are added. Where layers are frozen, this is an upper bound. By this estimate, the batches with
    which NVIDIA trains ResNet-50 on 16 GB (128 images in float32, 256 in float16) just fit.

    Args:
        classifier: Classifier that is trained.
        precision: Value of `--precision`.
    """
    kept = {id(layer.input): _values(layer.input) for layer in classifier.layers if isinstance(layer, _KEEPING)}
    largest = max(_values(tensor) for layer in classifier.layers for tensor in keras.tree.flatten(layer.output))
    return (sum(kept.values()) + 2 * largest) * _bytes_per_value(precision)


def _values(tensor: keras.KerasTensor) -> int:
    return 0 if None in tensor.shape[1:] else math.prod(tensor.shape[1:])


def _bytes_per_value(precision: str) -> int:
    return 4 if precision == "float32" else 2


def _attack(adversarial: AdversarialConfig, *, epochs: int) -> str:
    attack = adversarial.training_attack
    if not attack.active:
        return "none: standard training"
    name = {"fgsm": "FGSM", "free": "free"}.get(adversarial.fast, f"PGD-{attack.steps}")
    parts = [f"{name}, {attack.norm} epsilon {attack.epsilon:.4g}, step {attack.step_size:.4g}"]
    if attack.random_start:
        parts.append("random start")
    rise = adversarial.warmup_epochs(epochs=epochs)
    if rise is not None:
        parts.append(f"epsilon rises for {rise:g} epochs")
    if adversarial.uses_trades:
        parts.append(f"TRADES with beta {adversarial.trades_beta:g}")
    if adversarial.uses_awp:
        after = f" after {adversarial.awp_warmup_epochs:g} epochs" if adversarial.awp_warmup_epochs else ""
        parts.append(f"AWP with gamma {adversarial.awp_gamma:g}{after}")
    return ", ".join(parts)


def _learning_rate(optimization: OptimizationConfig) -> str:
    """Describes the learning-rate schedule and its flags, and says whether training is too short to reach the drops."""
    epochs = optimization.epochs
    parts = [f"learning rate {optimization.peak_learning_rate:.4g}, {optimization.lr_schedule}"]
    if optimization.lr_schedule in ("step", "piecewise"):
        drops = optimization.lr_milestones
        if optimization.lr_schedule == "step":
            drops = tuple(range(optimization.lr_step_epochs, epochs, optimization.lr_step_epochs))
        within = [str(epoch) for epoch in drops if epoch < epochs]
        shown = within if len(within) <= 4 else [*within[:4], "..."]
        after = f"after epochs {', '.join(shown)}" if within else f"never within {epochs} epochs"
        parts.append(f"x {optimization.lr_decay:g} {after}")
    if optimization.warmup_epochs:
        parts.append(f"rises from 0 for {optimization.warmup_epochs:g} epochs")
    return ", ".join(parts)


def _steps(job: JobConfig, batches: int) -> str:
    if job.transfer.head != "sgd":
        return f"none: --head={job.transfer.head} is fitted to all features at once"
    optimization, replays = job.optimization, job.adversarial.replays
    total = job.data_epochs * batches * replays
    shown_replays = f" batches x {replays} replays" if job.adversarial.fast == "free" else ""
    steps = f"{job.data_epochs} epochs x {batches}{shown_replays} = {total:,} steps of {optimization.batch_size} images"
    if optimization.accumulate_steps > 1:
        every = optimization.accumulate_steps
        steps += f", an update of the weights every {every}: {total // every:,} updates"
    if optimization.patience:
        steps += f"; fewer after {optimization.patience} epochs without a better validation figure"
    return steps
