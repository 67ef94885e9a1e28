"""The plan of a job for `--dry_run`. Jobs that it depends on are not run, and published models are not downloaded."""

import dataclasses

import keras

from robust_tf.config.job import JobConfig
from robust_tf.console import console
from robust_tf.data import dataset_info
from robust_tf.data.selection import held_out
from robust_tf.job.building import adapted_classifier, new_classifier
from robust_tf.job.planning.devices import parse_clusters
from robust_tf.job.planning.roofline import device_plan, job_work
from robust_tf.job.planning.table import plan_table
from robust_tf.job.sources import open_source, source_is_job, source_job
from robust_tf.job.task import TaskSummary, check_steps, load_job_task
from robust_tf.models import PUBLISHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """The size of a task whose data need not be present. See `TaskSummary` for the attributes."""

    num_train: int
    num_validation: int
    num_test: int
    class_names: tuple[str, ...]
    image_size: int
    augmentation: str
    steps_per_epoch: int


def print_plan(job: JobConfig) -> None:
    """Prints the plan of a job, and one for each cluster of `plan_devices`."""
    clusters = parse_clusters(job.plan.plan_devices)
    keras.config.set_dtype_policy(job.optimization.precision)
    try:
        classifier, task = planned_job(job)
        console.print(plan_table(job, task, classifier))
        if clusters:
            work = job_work(job, classifier, task)
            for cluster in clusters:
                console.print(device_plan(job, task, work, cluster))
    finally:
        keras.config.set_dtype_policy("float32")


def planned_job(
    job: JobConfig, source: JobConfig | None = None, *, task: TaskSummary | None = None
) -> tuple[keras.Model, TaskSummary]:
    """Returns a classifier with the layers of the job, frozen as in the job, and the size of its data.

    Args:
        job: Job to plan.
        source: Job that trains its source. By default, the one of `--source`, if that is a flag file.
        task: Size of its data, if it is known already.
    """
    planned = job
    if source is None and source_is_job(job):
        source = source_job(job)
    if source is not None:
        planned = job.with_flags(
            architecture=job.transfer.architecture or source.transfer.architecture,
            image_size=job.data.image_size or image_size_of(source),
        )
    elif job.transfer.source in PUBLISHED:
        planned = job.with_flags(architecture=PUBLISHED[job.transfer.source].architecture)
    elif job.is_transfer:
        classifier = open_source(job.transfer.source, job.transfer, image_size=job.data.image_size)
        task = task or _task_summary(job, image_size=classifier.input_shape[1])
        return adapted_classifier(classifier, job, task), task
    task = task or _task_summary(planned)
    classifier = new_classifier(planned, task)
    return (adapted_classifier(classifier, job, task) if job.is_transfer else classifier), task


def image_size_of(source: JobConfig) -> int | None:
    """Returns the image size of the classifier that a job trains; None if only its data set knows.

    Args:
        source: Training job.
    """
    return source.data.image_size or dataset_info(source.data.dataset).image_size


def needs_data(job: JobConfig) -> bool:
    """Returns whether the size of a job's data is known only from the data itself, not from the DATASETS table.

    Args:
        job: Job to plan.
    """
    info = dataset_info(job.data.dataset)
    return None in (info.num_classes, info.num_train, info.num_test) or _chosen_by_content(job)


def _chosen_by_content(job: JobConfig) -> bool:
    data = job.data
    return bool(data.classes or data.examples_per_class or data.subset or data.skip_bad_images)


def planned_task(job: JobConfig, *, image_size: int | None = None) -> TaskSummary:
    """Returns the size of a job's data from the DATASETS table, or from the data itself where that is not enough.

    Args:
        job: Job to plan.
        image_size: Image size of the source, used if the flags give none.
    """
    data, info = job.data, dataset_info(job.data.dataset)
    if info.num_classes is None or info.num_train is None or info.num_test is None or _chosen_by_content(job):
        return load_job_task(job, image_size=image_size)
    num_validation = int(held_out(info.num_train, data.validation_fraction).sum())
    num_train = info.num_train - num_validation
    steps_per_epoch = -(-num_train // job.optimization.batch_size)
    check_steps(job, steps_per_epoch)
    return PlannedTask(
        num_train=num_train,
        num_validation=num_validation,
        num_test=info.num_test,
        class_names=tuple(map(str, range(info.num_classes))),
        image_size=data.image_size or image_size or info.image_size,
        augmentation=data.augmentation or info.augmentation,
        steps_per_epoch=steps_per_epoch,
    )


def _task_summary(job: JobConfig, *, image_size: int | None = None) -> TaskSummary:
    """Returns the data of a job, or just its size for a plan for other devices."""
    if job.plan.plan_devices:
        return planned_task(job, image_size=image_size)
    return load_job_task(job, image_size=image_size)
