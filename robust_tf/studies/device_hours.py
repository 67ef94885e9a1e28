"""The device-hours of a study on accelerators that this machine need not have, for `--dry_run --plan_devices`."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import keras
from etils import epath

from robust_tf.config.job import JobConfig
from robust_tf.config.run import PlanConfig
from robust_tf.console import meter
from robust_tf.data.tfds_preparation import builder_of
from robust_tf.errors import UserError
from robust_tf.flags import flat_values
from robust_tf.job.building import DEFAULT_ARCHITECTURE
from robust_tf.job.planning.devices import parse_clusters
from robust_tf.job.planning.plan import image_size_of, needs_data, planned_job, planned_task
from robust_tf.job.planning.roofline import JobWork, estimate, job_work
from robust_tf.job.task import TaskSummary
from robust_tf.models import PUBLISHED
from robust_tf.studies.grid import CellRun, SourceRun

# Flags of a job on which the work for one image depends, besides those of its attack. The number of classes is none of
# them, because the last layer is a small part of the work.
_OF_THE_WORK = "architecture transfer_mode freeze_through hidden_layers features batch_size precision optimizer".split()


class DeviceHours(NamedTuple):
    """The time of the jobs of a study on one cluster, whose devices run one job each.

    Attributes:
        name: Name of the cluster, as in the flag.
        devices: Number of its devices.
        sources: Device-hours of the sources.
        cells: Device-hours of the cells.
        unknown: Why the time of some jobs is unknown, by reason the number of these jobs.
    """

    name: str
    devices: int
    sources: float
    cells: float
    unknown: dict[str, int]

    @property
    def in_words(self) -> str:
        """The arithmetic, in a line."""
        total = self.sources + self.cells
        text = f"{self.sources:,.1f} h for sources + {self.cells:,.1f} h for cells = {total:,.1f} device-hours"
        if self.devices > 1:
            text += f"; / {self.devices} devices, one job on each = {total / self.devices:,.1f} h"
        for reason, count in self.unknown.items():
            text += f"; unknown for {count} jobs: {reason}"
        return text


def device_hours(plan: PlanConfig, sources: Sequence[SourceRun], cells: Sequence[CellRun]) -> list[DeviceHours]:
    """Estimates the device-hours of the jobs of a study on each cluster of `--plan_devices`.

    The work of each kind of network is counted once. What the data is like is read from the table of data sets, or from
    the data where the table is not enough.

    Args:
        plan: The clusters, and the share of their speed that jobs reach.
        sources: Sources to train.
        cells: Cells to run.

    Raises:
        UserError: A cluster is unknown, or lacks the precision of a job.
    """
    # One job runs on one device, however many devices there are.
    clusters = parse_clusters(plan.plan_devices)
    devices = [dataclasses.replace(cluster, hosts=1, per_host=1) for cluster in clusters]
    counted: dict[Hashable, JobWork] = {}
    hours = [[0.0, 0.0] for _ in clusters]
    unknown: dict[str, int] = {}
    runs: list[SourceRun | CellRun] = [*sources, *cells]
    with meter("planning", total=len(runs), unit="jobs") as bar:
        for done, run in enumerate(runs):
            bar.update(done, f"{len(counted)} kinds of networks")
            source = run.source.job if isinstance(run, CellRun) and run.source else None
            try:
                _check_present(run.job)
                task = planned_task(run.job, image_size=image_size_of(source) if source else None)
                key = _kind(run.job, source, task.image_size)
                if key not in counted:
                    counted[key] = _work(run.job, source, task)
            except UserError as error:
                reason = str(error).split(". ")[0]
                unknown[reason] = unknown.get(reason, 0) + 1
                continue
            for total, device in zip(hours, devices, strict=True):
                seconds = estimate(run.job, task, counted[key], device, utilization=plan.plan_utilization).run
                total[isinstance(run, CellRun)] += seconds / 3600
    return [
        DeviceHours(cluster.name, cluster.devices, total[0], total[1], unknown)
        for cluster, total in zip(clusters, hours, strict=True)
    ]


def _check_present(job: JobConfig) -> None:
    """Refuses a job whose data would have to be prepared first, which may download gigabytes."""
    name, data_dir = job.data.dataset, job.data.data_dir
    if name == "digits" or name.startswith("folder:") or not needs_data(job):
        return
    if not builder_of(name, epath.Path(data_dir) if data_dir else None).is_prepared():
        raise UserError(f"The size of {name} is not in the table of data sets, and it is not prepared here.")


def _work(job: JobConfig, source: JobConfig | None, task: TaskSummary) -> JobWork:
    keras.config.set_dtype_policy(job.optimization.precision)
    try:
        classifier, _ = planned_job(job, source, task=task)
        return job_work(job, classifier, task)
    finally:
        keras.config.set_dtype_policy("float32")


def _kind(job: JobConfig, source: JobConfig | None, image_size: int) -> Hashable:
    """Returns what jobs have in common whose work for one image is the same."""
    values, origin = flat_values(job), job.transfer.source
    if source:
        origin = source.transfer.architecture or DEFAULT_ARCHITECTURE
    elif origin in PUBLISHED:
        origin = PUBLISHED[origin].architecture
    return (*(values[name] for name in _OF_THE_WORK), origin, image_size, job.adversarial)
