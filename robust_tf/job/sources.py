"""The source of a transfer: a file, a published model, or the classifier of another job."""

import pathlib

import keras

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.transfer import TransferConfig
from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.models import pixel_warning
from robust_tf.results import BASELINE
from robust_tf.sharing import shared
from robust_tf.transfer import sources


def source_is_job(job: JobConfig) -> bool:
    """Returns whether the source is a flag file, whose job provides the classifier."""
    return sources.is_flag_file(job.transfer.source)


def source_job(job: JobConfig) -> JobConfig:
    """Reads the job of a source that is a flag file.

    Its workdir is a sibling of this job's workdir, unless the flag file names one.

    Raises:
        UserError: The flag file cannot be read, or its job would not keep its classifier.
    """
    path = pathlib.Path(job.transfer.source)
    source = read_flag_file(path)
    if source.run.outputs == "results":  # refused now, because the job might take hours
        raise UserError(
            f"The job of a source has to keep its classifier. Received: --outputs=results in {path}. Leave the flag "
            "out there."
        )
    return source.with_flags(
        workdir=source.run.workdir or str(pathlib.Path(job.run.workdir).with_name(path.stem)),
        data_dir=source.data.data_dir or job.data.data_dir,
        distribution=job.run.distribution,
    )


def twin_job(job: JobConfig) -> JobConfig:
    """Returns the standard counterpart of a source that is a flag file: the same job, trained without an attack."""
    robust = source_job(job)
    return robust.standard_twin().with_flags(workdir=f"{robust.run.workdir}_eps0")


def baseline_job(job: JobConfig) -> JobConfig:
    """Returns the same job from the standard counterpart of its source, which may have to be trained first."""
    is_job = source_is_job(job)
    source = str(classifier_path(twin_job(job))) if is_job else sources.published_twin(job.transfer.source)
    workdir = str(pathlib.Path(job.run.workdir) / BASELINE)
    return job.with_flags(source=source, workdir=workdir, baseline=False, claims=(), export_dir="")


def classifier_path(job: JobConfig) -> pathlib.Path:
    """Returns the file in which a job saves its classifier."""
    return pathlib.Path(job.run.workdir) / "classifier.keras"


def open_source(path: str, transfer: TransferConfig, *, image_size: int | None) -> keras.Model:
    """Loads a source from a file or a download. Prints a warning if it seems to expect pixels from 0 to 255.

    Args:
        path: Path of a file, or name of a published model.
        transfer: Settings of the transfer.
        image_size: Image size, needed only for a checkpoint, since checkpoints do not store it.
    """

    def load() -> keras.Model:
        source = sources.load_source(path, architecture=transfer.architecture, image_size=image_size)
        if warning := pixel_warning(source):
            console.print(f"WARNING for {path}: {warning}")
        return source

    if not transfer.cached:  # training may change the weights
        return load()
    try:
        status = pathlib.Path(path).stat()
    except OSError:  # a published model is no file
        return load()
    key = (path, status.st_mtime_ns, status.st_size, transfer.architecture, image_size)
    return shared(("source", *key), load)
