"""What `--dry_run` prints: the job in figures, before anything is trained."""

import math
import pathlib

import keras
from rich.table import Table

from robust_tf.config import JobConfig
from robust_tf.data import TaskData
from robust_tf.transfer.stages import parameter_counts

# Resident size of a process that has imported TensorFlow and read its data, measured on Linux.
_PROCESS_BYTES = 700 * 1024**2


def plan_table(config: JobConfig, task: TaskData, classifier: keras.Model, workdir: pathlib.Path) -> Table:
    """The plan of one job; the classifier only has to have the right layers frozen."""
    trainable, total = parameter_counts(classifier)
    table = Table(title=f"Plan of {workdir} (dry run: nothing is trained)", title_justify="left", show_header=False)
    rows = {
        "task": config.task,
        "data": f"{config.dataset}: {task.num_train} training, {task.num_validation} validation, "
        f"{task.num_test} test images, {len(task.class_names)} classes",
        "images": f"{task.image_size}x{task.image_size}, augmentation {task.augmentation}",
        "source": config.source,
        "model": f"{classifier.name}: {total:,} parameters, {trainable:,} trainable, {total - trainable:,} frozen",
        "attack": _attack(config),
        "steps": _steps(config, task.steps_per_epoch),
        "passes": f"1 forward pass per image and view ({config.views}), whose features are stored"
        if config.features == "cached"
        else f"{config.gradients_per_image:g} forward and backward passes per image and epoch",
        "memory": f"about {estimated_bytes(config, classifier, trainable, total) / 1024**3:.1f} GB (estimate)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def estimated_bytes(config: JobConfig, classifier: keras.Model, trainable: int, total: int) -> int:
    """Estimated peak memory of training: process, weights, gradients, momentum, and the outputs of all layers.

    Every layer's output is kept for the backward pass, and about as much again is alive in gradients and in the
    operations inside the layers. TRADES has two batches in its backward pass, and AWP a second set of weights.
    """
    bytes_per_value = 4 if config.precision == "float32" else 2
    outputs = sum(
        math.prod(tensor.shape[1:])
        for layer in classifier.layers
        for tensor in keras.tree.flatten(layer.output)
        if None not in tensor.shape[1:]
    )
    weights = total + (3 if config.uses_awp else 2) * trainable
    images = config.batch_size * (2 if config.uses_trades else 1)
    return _PROCESS_BYTES + 4 * weights + 2 * outputs * images * bytes_per_value


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


def _steps(config: JobConfig, batches: int) -> str:
    total = config.passes * batches * config.replays
    replays = f" batches x {config.replays} replays" if config.fast == "free" else ""
    return f"{config.passes} epochs x {batches}{replays} = {total:,} steps of {config.batch_size} images"
