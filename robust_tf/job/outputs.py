"""What a finished job writes and prints: its files, its table, its export, and the commands to run next."""

import pathlib
import shutil

import keras

from robust_tf.config.job import JobConfig
from robust_tf.console import console, only_a_warning
from robust_tf.data import TaskData
from robust_tf.flags import flat_values
from robust_tf.job.dense import write_measurement
from robust_tf.job.draws import complete_results
from robust_tf.job.results import closing_table
from robust_tf.job.sources import classifier_path
from robust_tf.job.task import load_job_task
from robust_tf.job.testing import Evaluation
from robust_tf.models import load_classifier, read_model, save_classifier
from robust_tf.reporting import REPORT, write_examples, write_history, write_report
from robust_tf.reporting.next_commands import next_commands
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.export_dense import export_dense
from robust_tf.serving.publish.model_card import card_from_results, decoding_from_results
from robust_tf.serving.publish.staging import readers_of
from robust_tf.serving.wire.names import IMAGE_BYTES_SIGNATURE
from robust_tf.tasks.measuring import Measurement
from robust_tf.tasks.table import dense_task
from robust_tf.training.checkpoint import TrainingProgress
from robust_tf.training.tensorboard import write_result


def write_job(
    job: JobConfig,
    task: TaskData,
    classifier: keras.Model,
    evaluation: Evaluation | Measurement,
    progress: TrainingProgress,
    results: JobResults,
) -> None:
    """Writes the files of a finished job.

    Args:
        job: Job that is finished.
        task: Data of the job.
        classifier: Trained classifier.
        evaluation: Evaluation of the classifier, or measurement of the network, on the test part.
        progress: Progress of the training.
        results: Content of results.json.
    """
    workdir = pathlib.Path(job.run.workdir)
    if job.run.outputs != "results":
        save_classifier(classifier, classifier_path(job))
    if isinstance(evaluation, Measurement):
        _write_dense_job(job, task, evaluation, progress, results)
        return
    if job.run.outputs != "all":
        evaluation.outcomes.write(workdir)
        write_history(workdir, progress.history)
        results.write(workdir / FILE_NAME)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        return
    write_result(
        workdir / "tensorboard",
        settings=_hyperparameters(job),
        figures={
            figure.name: figure.value
            for figure in (results.figure("clean_accuracy"), results.figure("robust_accuracy"))
            if figure.value is not None
        },
        confusion=evaluation.confusion,
        class_names=task.class_names,
    )
    evaluation.outcomes.write(workdir)
    write_history(workdir, progress.history)
    results.write(workdir / FILE_NAME)  # last, because its presence means that the job is finished
    with only_a_warning(f"The report of {workdir}"):
        write_examples(workdir, evaluation.examples)
        if not job.transfer.baseline:  # with a baseline, `finish_job` writes the report
            write_report(workdir)


def _write_dense_job(
    job: JobConfig, task: TaskData, measurement: Measurement, progress: TrainingProgress, results: JobResults
) -> None:
    """Writes the files of a finished job for detection or segmentation, which has no predictions.csv and no report."""
    workdir, dense = pathlib.Path(job.run.workdir), dense_task(job.data.task_type)
    write_history(workdir, progress.history)
    if job.run.outputs == "all" and dense is not None:
        with only_a_warning(f"The examples of {workdir}"):
            write_measurement(job, dense, task, measurement, results)
    results.write(workdir / FILE_NAME)  # last, because its presence means that the job is finished
    if job.run.outputs != "all":
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)


def write_missing_report(workdir: pathlib.Path) -> None:
    """Writes the report of a finished job if there is none yet."""
    if not (workdir / REPORT).exists():
        with only_a_warning(f"The report of {workdir}"):
            write_report(workdir)


def finish_job(job: JobConfig, results: JobResults, baseline: JobResults | None = None) -> None:
    """Prints the results of a job, publishes its classifier if `export_dir` is set, and prints the next commands.

    Args:
        job: Job that is finished.
        results: Results of the job.
        baseline: Results of the same job with the standard source, or None if there is no baseline.
    """
    workdir = pathlib.Path(job.run.workdir)
    if baseline or job.transfer.draws > 1:
        complete = complete_results(job, results, baseline)
        if complete != results:  # the folder of a finished job may be read-only
            complete.write(workdir / FILE_NAME)
        if job.run.outputs == "all" and (complete != results or not (workdir / REPORT).exists()):
            with only_a_warning(f"The report of {workdir}"):
                write_report(workdir)
        results = complete
    console.print(closing_table(results))
    for line in results.comparison_in_words():
        console.print(line, soft_wrap=True)
    if job.run.export_dir:
        _publish(job, results)
    if job.run.outputs == "all":
        print_next_commands(job)


def print_next_commands(job: JobConfig) -> None:
    """Prints the commands that a user may want to run next, ready to copy."""
    sample = load_job_task(job).sample() if job.run.export_dir else b""
    signature = "" if job.data.task_type == "classification" else IMAGE_BYTES_SIGNATURE
    commands = next_commands(job.run, sample, signature_name=signature)
    console.print("Next:", *(f"  {command}" for command in commands), sep="\n")


def _publish(job: JobConfig, results: JobResults) -> None:
    path, folder, name = classifier_path(job), job.run.export_dir, job.run.served_name
    decoding = decoding_from_results(results)
    if job.data.task_type == "classification":
        version_dir = export_classifier(
            load_classifier(path),
            folder,
            name,
            model_card=card_from_results(results),
            labels=results.class_names,
            resize_size=results.resize_size,
            decoding=decoding,
        )
    else:
        card = card_from_results(results, task_type=job.data.task_type)
        network = read_model(path)
        version_dir = export_dense(
            network, folder, name, model_card=card, labels=results.class_names, decoding=decoding
        )
    console.print(f"Published {version_dir} ({readers_of(version_dir)}).")


def _hyperparameters(job: JobConfig) -> dict[str, bool | int | float | str]:
    values = flat_values(job.resolved())
    return {
        name: value for name, value in values.items() if isinstance(value, bool | int | float | str) and value != ""
    }
