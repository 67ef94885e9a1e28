"""Loads the data of a job, and makes the checks that need it: the attack's epsilon and the length of the job."""

import dataclasses
import math
from typing import Protocol

from robust_tf.config.adversarial import AdversarialConfig
from robust_tf.config.job import JobConfig
from robust_tf.data import TaskData, load_task
from robust_tf.errors import UserError
from robust_tf.flags import to_text
from robust_tf.training.distribution import Distribution


class TaskSummary(Protocol):
    """The facts about a task that a plan needs. `TaskData` has all of them."""

    @property
    def num_train(self) -> int:
        """Number of training images."""

    @property
    def num_validation(self) -> int:
        """Number of validation images."""

    @property
    def num_test(self) -> int:
        """Number of test images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""

    @property
    def augmentation(self) -> str:
        """Name of the augmentation."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training images."""


def load_job_task(
    job: JobConfig, *, image_size: int | None = None, distribution: Distribution | None = None
) -> TaskData:
    """Loads the data of a job, or the share of one of its workers.

    Args:
        job: Job to load the data of.
        image_size: Image size of the source, used if the flags give none.
        distribution: Distribution of the job. None means one device.

    Raises:
        UserError: The data cannot be used, the job is too short for its flags, or an L2 radius is larger than any
            distance between two images.
    """
    task = load_task(
        dataclasses.replace(job.data, image_size=job.data.image_size or image_size),
        batch_size=job.optimization.batch_size,
        seed=job.run.seed,
        worker=distribution.worker if distribution else 0,
        num_workers=distribution.num_workers if distribution else 1,
        drop_remainder=distribution is not None and distribution.num_replicas > 1,
    )
    _check_radius(job.adversarial, task.image_size)
    check_steps(job, task.steps_per_epoch)
    return task


def check_steps(job: JobConfig, steps_per_epoch: int) -> None:
    """Refuses flags that would have no effect because the job is too short.

    Args:
        job: Job to check.
        steps_per_epoch: Number of batches in one pass over the training images.
    """
    steps = job.data_epochs * steps_per_epoch
    optimizer_steps, accumulated = steps * job.adversarial.replays, job.optimization.accumulate_steps
    if accumulated > optimizer_steps:
        raise UserError(
            f"The weights would never be updated: the job has {optimizer_steps} steps in all. Received: "
            f"--accumulate_steps={accumulated}."
        )
    profiled = job.run.profile_steps
    if profiled and profiled[0] > steps:
        raise UserError(
            f"--profile_steps must begin within the {steps} steps of the job. Received: "
            f"--profile_steps={to_text(profiled)}."
        )


def _check_radius(adversarial: AdversarialConfig, image_size: int) -> None:
    epsilon = max(adversarial.epsilon, adversarial.evaluation_attack.epsilon)
    diagonal = math.sqrt(3) * image_size
    if adversarial.norm == "l2" and epsilon > diagonal:
        raise UserError(
            f"No two images of {image_size}x{image_size} are further apart than {diagonal:.1f} in [0, 1] pixel units, "
            f"so that is the largest epsilon of the l2 norm. Received: epsilon={epsilon:g}. Did you mean "
            f"{epsilon:g}/255?"
        )
