"""What `--dry_run` prints: the job in figures, before anything is trained."""

import math
import pathlib

import keras
from rich.table import Table

from robust_tf.config.job import JobConfig
from robust_tf.job.building import TaskFigures
from robust_tf.training.schedules import peak_learning_rate
from robust_tf.transfer.stages import parameter_counts

# Resident size of a process that has imported TensorFlow and read its data, measured on Linux.
_PROCESS_BYTES = 700 * 1024**2
# Values held in training for each output of a layer, measured likewise.
_PER_OUTPUT = 1.2
# Layers whose gradients need their inputs.
_KEEPING = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
    keras.layers.BatchNormalization,
)


def plan_table(config: JobConfig, task: TaskFigures, classifier: keras.Model, workdir: pathlib.Path) -> Table:
    """The plan of one job; the classifier only has to have the right layers frozen."""
    trainable, total = parameter_counts(classifier)
    table = Table(title=f"Plan of {workdir} (dry run: nothing is trained)", title_justify="left", show_header=False)
    rows = {
        "task": config.task,
        "data": f"{config.dataset}: {task.num_train} training, {task.num_validation} validation, "
        f"{task.num_test} test images, {len(task.class_names)} classes"
        + (", weighted in the loss" if config.class_weight == "balanced" else ""),
        "images": f"{task.image_size}x{task.image_size}, augmentation {task.augmentation}",
        "source": config.source,
        "model": f"{classifier.name}: {total:,} parameters, {trainable:,} trainable, {total - trainable:,} frozen",
        "attack": _attack(config),
        "steps": _steps(config, task.steps_per_epoch),
        "rate": _learning_rate(config),
        "passes": f"1 forward pass per image and view ({config.views}), whose features are stored"
        if config.features == "cached"
        else f"{config.gradients_per_image:g} forward and backward passes per image and epoch",
        "memory": f"about {estimated_bytes(config, classifier, trainable, total) / 1024**3:.1f} GB (estimate)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def estimated_bytes(config: JobConfig, classifier: keras.Model, trainable: int, total: int) -> int:
    """Estimated peak memory of training on a CPU: process, weights, gradients, momentum, and activations.

    Right within a factor of 1.5: tests/job/test_planning.py measures the peak resident size of PGD training on Linux.
    """
    # AWP has a second set of weights, and TRADES two batches in its backward pass.
    weights = 4 * (total + (3 if config.uses_awp else 2) * trainable)
    images = config.batch_size * (2 if config.uses_trades else 1)
    return int(_PROCESS_BYTES + weights + images * activation_bytes(classifier, config.precision))


def activation_bytes(classifier: keras.Model, precision: str) -> float:
    """Estimated bytes that one image of a batch takes in training on a CPU.

    A multiple of the outputs of all layers: not all of them are kept for the backward pass, but gradients and what
    operations need inside are there besides.

    Args:
        precision: a value of --precision.
    """
    outputs = sum(_values(tensor) for layer in classifier.layers for tensor in keras.tree.flatten(layer.output))
    return _PER_OUTPUT * outputs * _bytes_per_value(precision)


def fused_activation_bytes(classifier: keras.Model, precision: str) -> float:
    """The same on an accelerator, where XLA fuses what lies between two convolutions.

    Kept for the backward pass are the inputs of convolutions, dense layers and BatchNorm; the largest output and its
    gradient come on top. An upper bound where layers are frozen. With this, the batches that NVIDIA trains ResNet-50
    with on 16 GB (128 images in float32, 256 in float16) fit, and not many more.
    """
    kept = {id(layer.input): _values(layer.input) for layer in classifier.layers if isinstance(layer, _KEEPING)}
    largest = max(_values(tensor) for layer in classifier.layers for tensor in keras.tree.flatten(layer.output))
    return (sum(kept.values()) + 2 * largest) * _bytes_per_value(precision)


def _values(tensor: keras.KerasTensor) -> int:
    return 0 if None in tensor.shape[1:] else math.prod(tensor.shape[1:])


def _bytes_per_value(precision: str) -> int:
    return 4 if precision == "float32" else 2


def _attack(config: JobConfig) -> str:
    attack = config.attack
    if not attack.active:
        return "none: standard training"
    name = {"fgsm": "FGSM", "free": "free"}.get(config.fast, f"PGD-{attack.steps}")
    parts = [f"{name}, {attack.norm} epsilon {attack.epsilon:.4g}, step {attack.step_size:.4g}"]
    if attack.random_start:
        parts.append("random start")
    if config.epsilon_warmup_epochs is not None:
        parts.append(f"epsilon rises for {config.epsilon_warmup_epochs:g} epochs")
    if config.uses_trades:
        parts.append(f"TRADES with beta {config.trades_beta:g}")
    if config.uses_awp:
        after = f" after {config.awp_warmup_epochs:g} epochs" if config.awp_warmup_epochs else ""
        parts.append(f"AWP with gamma {config.awp_gamma:g}{after}")
    return ", ".join(parts)


def _learning_rate(config: JobConfig) -> str:
    """The schedule with the flags that act on it, and whether the job is long enough for its drops."""
    if config.head != "sgd":
        return "no learning rate"
    parts = [f"learning rate {peak_learning_rate(config):.4g}, {config.lr_schedule}"]
    if config.lr_schedule in ("step", "piecewise"):
        drops = config.lr_milestones
        if config.lr_schedule == "step":
            drops = tuple(range(config.lr_step_epochs, config.epochs, config.lr_step_epochs))
        within = [str(epoch) for epoch in drops if epoch < config.epochs]
        shown = within if len(within) <= 4 else [*within[:4], "..."]
        after = f"after epochs {', '.join(shown)}" if within else f"at no time within {config.epochs} epochs"
        parts.append(f"x {config.lr_decay:g} {after}")
    if config.warmup_epochs:
        parts.append(f"rises from 0 for {config.warmup_epochs:g} epochs")
    return ", ".join(parts)


def _steps(config: JobConfig, batches: int) -> str:
    if config.head != "sgd":
        return f"none: --head={config.head} is fitted to all features at once"
    total = config.passes * batches * config.replays
    replays = f" batches x {config.replays} replays" if config.fast == "free" else ""
    steps = f"{config.passes} epochs x {batches}{replays} = {total:,} steps of {config.batch_size} images"
    if config.accumulate_steps > 1:
        steps += f", a move of the weights every {config.accumulate_steps}: {total // config.accumulate_steps:,} moves"
    if config.patience:
        steps += f"; fewer after {config.patience} epochs without a better validation figure"
    return steps
