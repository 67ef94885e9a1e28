"""The parts of a job's training: a new or adapted classifier, the loss, the optimizer and the recipe."""

import math

import keras

from robust_tf.config.adversarial import AdversarialConfig
from robust_tf.config.job import JobConfig
from robust_tf.config.optimization import ClassWeight, OptimizationConfig
from robust_tf.data import TaskData, dataset_info
from robust_tf.errors import unknown_name
from robust_tf.job.task import TaskSummary
from robust_tf.models import build_classifier
from robust_tf.sharing import shared
from robust_tf.tasks.table import dense_task
from robust_tf.training.metrics import CrossEntropy, balanced_class_weights
from robust_tf.training.objectives import Recipe
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.schedules import build_schedule
from robust_tf.transfer import freeze, replace_head, with_dtype_policy, with_image_size, with_normalization
from robust_tf.transfer.stages import stages

DEFAULT_ARCHITECTURE = "resnet20"


def new_classifier(job: JobConfig, task: TaskSummary) -> keras.Model:
    """Builds an untrained classifier that normalizes images with the mean and standard deviation of the data set."""
    info = dataset_info(job.data.dataset)
    classifier = build_classifier(
        job.transfer.architecture or DEFAULT_ARCHITECTURE,
        len(task.class_names),
        image_size=task.image_size,
        mean=info.mean,
        std=info.std,
    )
    _check_multipliers(job.optimization, classifier)
    return classifier


def adapted_classifier(source: keras.Model, job: JobConfig, task: TaskSummary) -> keras.Model:
    """Turns the source of a transfer into a classifier for the task.

    The image size, normalization and precision follow the job, the head is new, and the layers that transfer keeps are
    frozen.
    """

    def adapt() -> tuple[keras.Model, keras.Model]:
        classifier = source
        if classifier.input_shape[1] != task.image_size:
            classifier = with_image_size(classifier, task.image_size)
        if job.transfer.normalization == "dataset":
            info = dataset_info(job.data.dataset)
            classifier = with_normalization(classifier, info.mean, info.std)
        return with_dtype_policy(classifier, job.optimization.precision), source

    if job.transfer.cached:  # the backbone does not change, so that other jobs can use it
        dataset = job.data.dataset if job.transfer.normalization == "dataset" else ""
        key = ("adapted", id(source), task.image_size, dataset, job.optimization.precision)
        classifier, _ = shared(key, adapt)  # it keeps the source, too, so that no other model gets its id
    else:
        classifier, _ = adapt()
    num_classes, seed = len(task.class_names), job.run.seed
    dense = dense_task(job.data.task_type)
    if dense is not None:
        classifier = dense.build(classifier, num_classes, seed=seed)
    else:
        classifier = replace_head(classifier, num_classes, hidden_layers=job.transfer.hidden_layers, seed=seed)
    # Frozen before the trainer is compiled, since a compiled model keeps training the layers that were trainable then.
    freeze(
        classifier,
        mode=job.transfer.transfer_mode,
        through=job.transfer.freeze_through or None,
        batchnorm=job.transfer.frozen_batchnorm,
    )
    _check_multipliers(job.optimization, classifier)
    return classifier


def job_loss(class_weight: ClassWeight, task: TaskData) -> CrossEntropy:
    """Builds the loss of a job, with the class weights of its training images if it uses them."""
    if class_weight == "none":
        return CrossEntropy()
    return CrossEntropy(balanced_class_weights(task.train_examples.labels(), len(task.class_names)).tolist())


def job_optimizer(
    optimization: OptimizationConfig, steps_per_epoch: float, *, factor: float = 1.0
) -> keras.optimizers.Optimizer:
    """Builds the optimizer of a job, with its schedule.

    Args:
        optimization: Settings of the optimization.
        steps_per_epoch: Number of updates of the weights in an epoch, see `optimizer_steps_per_epoch`.
        factor: Factor for the learning rate.
    """
    return build_optimizer(
        optimization.optimizer,
        learning_rate=build_schedule(optimization, steps_per_epoch, factor=factor),
        momentum=optimization.momentum,
        weight_decay=optimization.weight_decay,
        multipliers=optimization.multipliers,
        global_clipnorm=optimization.clip_norm or None,
        accumulate_steps=optimization.accumulate_steps,
        average_decay=optimization.ema_decay,
    )


def job_recipe(adversarial: AdversarialConfig, optimization: OptimizationConfig, steps_per_epoch: float) -> Recipe:
    """Builds the recipe of a job's adversarial training.

    Args:
        adversarial: Settings of the adversarial training.
        optimization: Settings of the optimization.
        steps_per_epoch: Number of updates of the weights in an epoch, see `optimizer_steps_per_epoch`.
    """
    free = adversarial.fast == "free"
    warmup_epochs = adversarial.warmup_epochs(epochs=optimization.epochs)
    return Recipe(
        trades_beta=adversarial.trades_beta if adversarial.uses_trades else None,
        awp_gamma=adversarial.awp_gamma if adversarial.uses_awp else None,
        awp_warmup_steps=adversarial.awp_warmup_epochs * steps_per_epoch,
        epsilon_warmup_steps=(warmup_epochs or 0.0) * steps_per_epoch,
        free_replays=adversarial.free_replays if free else 0,
        free_batch_size=optimization.batch_size if free else 0,
        attack_mode=adversarial.network_mode,
    )


def optimizer_steps_per_epoch(optimization: OptimizationConfig, *, replays: int, batches: int) -> float:
    """Returns the number of updates of the weights in one of `optimization.epochs`.

    Args:
        optimization: Settings of the optimization.
        replays: Number of optimizer steps on each batch, more than 1 in free adversarial training.
        batches: Number of batches in one pass over the training images.
    """
    data_epochs = math.ceil(optimization.epochs / replays)
    return batches * replays * data_epochs / (optimization.epochs * optimization.accumulate_steps)


def _check_multipliers(optimization: OptimizationConfig, classifier: keras.Model) -> None:
    """Refuses a multiplier for a stage that the classifier lacks, which would otherwise have no effect."""
    for stage in optimization.multipliers:
        if stage not in (known := stages(classifier)):
            raise unknown_name("stage in --learning_rate_multipliers", stage, known)
