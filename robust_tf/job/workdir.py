"""The folders of a job: checks that it may write to them, and reads what they already hold."""

import pathlib
from typing import get_args

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.run import OutputKind
from robust_tf.errors import UserError
from robust_tf.files import check_output_folder, replaced_atomically
from robust_tf.flags import to_flag_file
from robust_tf.job.sources import baseline_job, source_is_job, twin_job
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.serving.publish.staging import model_folder

FLAGS = "flags.cfg"
_OUTPUTS = get_args(OutputKind)  # from the most files to the fewest


def claim_workdir(job: JobConfig) -> None:
    """Writes flags.cfg into the workdir of a job, or checks that the one there describes the same job.

    Raises:
        UserError: The workdir belongs to another job (the message lists the flags that differ), or can't be written
            to.
    """
    path = pathlib.Path(job.run.workdir) / FLAGS
    if path.exists():
        differences = read_flag_file(path).differences(job)
        if differences:
            raise UserError(
                f"The workdir {path.parent} holds a job with other flags (there -> now): {'; '.join(differences)}. "
                "Choose another --workdir, or delete this one."
            )
        return
    with replaced_atomically(path) as temporary:
        # Includes the values that the recipe sets, because a recipe may set other values in a later version.
        temporary.write_text(to_flag_file(job.resolved()), encoding="utf-8")


def release_workdir(workdir: pathlib.Path) -> None:
    """Deletes flags.cfg from a workdir that holds nothing else, so that a corrected command can use the workdir."""
    if [path.name for path in workdir.iterdir()] == [FLAGS]:
        (workdir / FLAGS).unlink()


def finished_results(workdir: pathlib.Path) -> JobResults | None:
    """Returns the results of a workdir whose job is finished, or None.

    Raises:
        UserError: There is a results.json, but it does not belong to a finished job.
    """
    results = JobResults.read(workdir / FILE_NAME)
    if results is not None:
        results.check_finished(workdir / FILE_NAME)
    return results


def check_kept(job: JobConfig, results: JobResults) -> None:
    """Refuses a finished job that kept less than is asked for now.

    Args:
        job: Job that is asked for.
        results: Results that its workdir holds.
    """
    for kept, what in (("results", "its results"), ("classifier", "its classifier and results")):
        if _OUTPUTS.index(job.run.outputs) < _OUTPUTS.index(kept) and f"--outputs={kept}" in results.flags:
            raise UserError(
                f"{job.run.workdir} is finished, but only {what} were kept. Received: --outputs={job.run.outputs}, "
                f"and --outputs={kept} before. Choose another --workdir, or delete this one to run the job again."
            )


def check_export(job: JobConfig) -> None:
    """Refuses a name under which the classifier can't be published."""
    if job.run.export_dir:
        model_folder(pathlib.Path(job.run.export_dir), job.run.served_name)


def check_outputs(job: JobConfig) -> None:
    """Refuses folders that can't be written to, before training starts.

    Raises:
        UserError: A folder can't be written to, and the message names its flag, or there is no source for the baseline.
    """
    workdirs = [pathlib.Path(job.run.workdir)]
    if job.transfer.baseline:
        baseline_job(job)  # refuses a source whose standard counterpart is not known
    if job.transfer.baseline and source_is_job(job):
        workdirs.append(pathlib.Path(twin_job(job).run.workdir))
    for workdir in workdirs:
        if finished_results(workdir) is None:  # a finished job is only read
            check_output_folder(workdir, "--workdir")
    if job.run.export_dir:
        check_output_folder(model_folder(pathlib.Path(job.run.export_dir), job.run.served_name), "--export_dir")
