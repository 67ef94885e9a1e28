"""What a job trains, from its flags: the data of its task, and a new or an adapted classifier."""

import math
import pathlib

import keras

from robust_tf.config import JobConfig
from robust_tf.data import TaskData, dataset_info, load_task
from robust_tf.errors import UserError, unknown_name
from robust_tf.models import build_classifier
from robust_tf.transfer import freeze, replace_head, with_dtype_policy, with_image_size, with_normalization
from robust_tf.transfer.stages import stages

DEFAULT_ARCHITECTURE = "resnet20"


def task_of(config: JobConfig, *, image_size: int | None = None) -> TaskData:
    """The data of a job; `image_size` is that of the source and counts when the flags name none.

    Raises:
        UserError: something about the data is at fault, or an L2 radius is larger than any distance between images.
    """
    task = load_task(
        config.dataset,
        classes=config.classes or None,
        image_size=config.image_size or image_size,
        batch_size=config.batch_size,
        augmentation=config.augmentation or None,
        rand_augment=config.rand_augment,
        mixing=config.mixing,
        downscale=config.downscale,
        validation_fraction=config.validation_fraction,
        examples_per_class=config.examples_per_class,
        subset=config.subset,
        skip_bad_images=config.skip_bad_images,
        seed=config.seed,
        split_seed=config.split_seed,
        data_dir=pathlib.Path(config.data_dir) if config.data_dir else None,
        cache=config.cache,
        cache_dir=pathlib.Path(config.cache_dir) if config.cache_dir else None,
    )
    epsilon = max(config.epsilon, config.evaluation_attack.epsilon)
    diagonal = math.sqrt(3) * task.image_size
    if config.norm == "l2" and epsilon > diagonal:
        raise UserError(
            f"No two images of {task.image_size}x{task.image_size} are further apart than {diagonal:.1f} in [0, 1] "
            f"pixel units, so that is the largest epsilon of the l2 norm. Received: epsilon={epsilon:g}. Did you mean "
            f"{epsilon:g}/255?"
        )
    return task


def new_classifier(config: JobConfig, task: TaskData) -> keras.Model:
    """An untrained classifier for pretraining, normalised as the data set's row says."""
    info = dataset_info(config.dataset)
    classifier = build_classifier(
        config.architecture or DEFAULT_ARCHITECTURE,
        len(task.class_names),
        image_size=task.image_size,
        mean=info.mean,
        std=info.std,
    )
    _check_multipliers(config, classifier)
    return classifier


def adapted(classifier: keras.Model, config: JobConfig, task: TaskData) -> keras.Model:
    """Makes the source a classifier of the task: size, normalisation, precision, a fresh head, frozen layers."""
    if classifier.input_shape[1] != task.image_size:
        classifier = with_image_size(classifier, task.image_size)
    if config.normalization == "dataset":
        info = dataset_info(config.dataset)
        classifier = with_normalization(classifier, info.mean, info.std)
    classifier = with_dtype_policy(classifier, config.precision)
    classifier = replace_head(classifier, len(task.class_names), hidden_layers=config.hidden_layers, seed=config.seed)
    # Before the trainer is compiled: a compiled model goes on training what it trained.
    freeze(
        classifier,
        mode=config.transfer_mode,
        through=config.freeze_through or None,
        batchnorm=config.frozen_batchnorm,
    )
    _check_multipliers(config, classifier)
    return classifier


def _check_multipliers(config: JobConfig, classifier: keras.Model) -> None:
    """A stage that the classifier doesn't have would be ignored silently."""
    for stage in config.multipliers:
        if stage not in (known := stages(classifier)):
            raise unknown_name("stage in --learning_rate_multipliers", stage, known)
