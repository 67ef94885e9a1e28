"""What a job trains, from its flags: the data of its task, and a new or an adapted classifier."""

import dataclasses
import math
import pathlib
from typing import Protocol

import keras

from robust_tf.config.job import JobConfig
from robust_tf.data import TaskData, dataset_info, load_task
from robust_tf.data.open_dataset import data_folder
from robust_tf.data.selection import held_out
from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import to_text
from robust_tf.models import build_classifier
from robust_tf.training.metrics import CrossEntropy, balanced_class_weights
from robust_tf.training.optimizers import build_optimizer
from robust_tf.training.schedules import schedule_of
from robust_tf.transfer import freeze, replace_head, with_dtype_policy, with_image_size, with_normalization
from robust_tf.transfer.stages import stages

DEFAULT_ARCHITECTURE = "resnet20"


class TaskFigures(Protocol):
    """What a plan has to know of a task; see `TaskData`."""

    @property
    def num_train(self) -> int: ...
    @property
    def num_validation(self) -> int: ...
    @property
    def num_test(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def augmentation(self) -> str: ...
    @property
    def steps_per_epoch(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """The figures of a task whose data need not be there."""

    num_train: int
    num_validation: int
    num_test: int
    class_names: tuple[str, ...]
    image_size: int
    augmentation: str
    steps_per_epoch: int


def planned_task(config: JobConfig, *, image_size: int | None = None) -> TaskFigures:
    """What the DATASETS table says of a job's data; where that is not enough, the data themselves."""
    info = dataset_info(config.dataset)
    chosen_by_content = config.classes or config.examples_per_class or config.subset or config.skip_bad_images
    if info.num_classes is None or info.num_train is None or info.num_test is None or chosen_by_content:
        return task_of(config, image_size=image_size)
    num_validation = int(held_out(info.num_train, config.validation_fraction).sum())
    num_train = info.num_train - num_validation
    steps_per_epoch = -(-num_train // config.batch_size)
    check_steps(config, steps_per_epoch)
    return PlannedTask(
        num_train=num_train,
        num_validation=num_validation,
        num_test=info.num_test,
        class_names=tuple(map(str, range(info.num_classes))),
        image_size=config.image_size or image_size or info.image_size,
        augmentation=config.augmentation or info.augmentation,
        steps_per_epoch=steps_per_epoch,
    )


def task_of(
    config: JobConfig, *, image_size: int | None = None, worker: int = 0, num_workers: int = 1, num_replicas: int = 1
) -> TaskData:
    """The data of a job, or of one of its workers.

    Args:
        config: of the job.
        image_size: that of the source; it counts when the flags name none.
        worker, num_workers: this process, of so many.
        num_replicas: that share a batch, in all processes.

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
        decoding=Decoding(exif=config.exif, alpha_background=config.alpha_background),
        validation_fraction=config.validation_fraction,
        examples_per_class=config.examples_per_class,
        subset=config.subset,
        skip_bad_images=config.skip_bad_images,
        seed=config.seed,
        split_seed=config.split_seed,
        data_dir=data_folder(config.data_dir),
        cache=config.cache,
        cache_dir=pathlib.Path(config.cache_dir) if config.cache_dir else None,
        worker=worker,
        num_workers=num_workers,
        drop_remainder=num_replicas > 1,
    )
    epsilon = max(config.epsilon, config.evaluation_attack.epsilon)
    diagonal = math.sqrt(3) * task.image_size
    if config.norm == "l2" and epsilon > diagonal:
        raise UserError(
            f"No two images of {task.image_size}x{task.image_size} are further apart than {diagonal:.1f} in [0, 1] "
            f"pixel units, so that is the largest epsilon of the l2 norm. Received: epsilon={epsilon:g}. Did you mean "
            f"{epsilon:g}/255?"
        )
    check_steps(config, task.steps_per_epoch)
    return task


def check_steps(config: JobConfig, steps_per_epoch: int) -> None:
    """Refuses flags that would do nothing, because the job is shorter than they say.

    Args:
        config: of the job.
        steps_per_epoch: batches in one pass over the training part.
    """
    steps = config.passes * steps_per_epoch
    if config.accumulate_steps > steps * config.replays:
        raise UserError(
            f"The weights would never move: the job has {steps * config.replays} steps in all. Received: "
            f"--accumulate_steps={config.accumulate_steps}."
        )
    if config.profile_steps and config.profile_steps[0] > steps:
        raise UserError(
            f"--profile_steps must begin within the {steps} steps of the job. Received: "
            f"--profile_steps={to_text(config.profile_steps)}."
        )


def new_classifier(config: JobConfig, task: TaskFigures) -> keras.Model:
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


def adapted(classifier: keras.Model, config: JobConfig, task: TaskFigures) -> keras.Model:
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


def loss_of(config: JobConfig, task: TaskData) -> CrossEntropy:
    """The loss of a job, with the class weights of its training images if it has any."""
    if config.class_weight == "none":
        return CrossEntropy()
    return CrossEntropy(balanced_class_weights(task.train_examples.labels(), len(task.class_names)).tolist())


def optimizer_of(config: JobConfig, steps_per_epoch: int, *, factor: float = 1.0) -> keras.optimizers.Optimizer:
    """The optimizer of a job, with its schedule; `factor` is on the learning rate."""
    return build_optimizer(
        config.optimizer,
        learning_rate=schedule_of(config, steps_per_epoch, factor=factor),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        multipliers=config.multipliers,
        global_clipnorm=config.clip_norm or None,
        accumulate_steps=config.accumulate_steps,
        average_decay=config.ema_decay,
    )


def _check_multipliers(config: JobConfig, classifier: keras.Model) -> None:
    """A stage that the classifier doesn't have would be ignored silently."""
    for stage in config.multipliers:
        if stage not in (known := stages(classifier)):
            raise unknown_name("stage in --learning_rate_multipliers", stage, known)
