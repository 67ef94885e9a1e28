"""Runs a job, from its configuration to results.json, and the jobs that it depends on: its source and its baseline."""

import pathlib

import keras

from robust_tf.config.job import JobConfig
from robust_tf.console import console
from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.job.building import adapted_classifier, new_classifier
from robust_tf.job.dense import measure_test
from robust_tf.job.draws import draw_jobs
from robust_tf.job.fitting import fit_classifier
from robust_tf.job.half_precision import emulation_warning
from robust_tf.job.head_fitting import HeadFit, can_test_features, classifier_to_attack, evaluate_features, fit_head
from robust_tf.job.outputs import write_job, write_missing_report
from robust_tf.job.results import job_results
from robust_tf.job.reuse import reused_classifier, reuses_trainer
from robust_tf.job.sources import baseline_job, classifier_path, open_source, source_is_job, source_job, twin_job
from robust_tf.job.task import load_job_task
from robust_tf.job.testing import Evaluation, evaluate_classifier
from robust_tf.job.workdir import check_kept, claim_workdir, finished_results, release_workdir
from robust_tf.results import JobResults
from robust_tf.tasks.measuring import Measurement
from robust_tf.tasks.table import dense_task
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress
from robust_tf.training.distribution import Distribution, start_distribution
from robust_tf.training.interruption import Interrupted
from robust_tf.training.xla import compiles_with_xla, prepare_for_xla


def run_job(job: JobConfig) -> JobResults:
    """Runs one job, from its configuration to results.json. If the job is finished already, its results are read.

    Raises:
        UserError: Something is wrong with the flags, the data or the files. Files that were written before are kept.
    """
    workdir = pathlib.Path(job.run.workdir)
    distribution = start_distribution(job.run.distribution, worker_timeout=job.run.worker_timeout)
    distribution.check_batch_size(job.optimization.batch_size)
    distribution.on_chief(lambda: claim_workdir(job))
    results = distribution.on_chief(lambda: finished_results(workdir))
    if distribution.any(results is not None):
        console.print(f"{workdir} is finished already.")
        if results is not None:
            check_kept(job, results)
        if distribution.is_chief and not job.transfer.baseline and job.run.outputs == "all":
            write_missing_report(workdir)
        return results or JobResults()

    keras.config.set_dtype_policy(job.optimization.precision)  # also tells Keras whether to scale the loss
    try:
        with distribution.scope():
            classifier, task = build_job(job)
        _introduce(job, classifier, task)
        with task.broken_images_named():
            progress, head_fit = _fit(job, classifier, task, distribution)
            evaluation = _test(job, classifier, task, distribution)
        results = job_results(job, task, classifier, evaluation, progress, head_fit)
        distribution.on_chief(lambda: write_job(job, task, classifier, evaluation, progress, results))
        return results
    except UserError:
        if distribution.is_chief:
            release_workdir(workdir)
        raise
    except Interrupted as interruption:
        state = Checkpoints(workdir / "checkpoints").latest()
        progress = state.progress if state else TrainingProgress()
        console.print(
            f"Interrupted. {progress.epochs_done} of {job.data_epochs} epochs are saved in {workdir}, and "
            f"{progress.steps_done} steps of the next one; the same command continues there."
        )
        raise SystemExit(interruption.exit_code) from None
    finally:
        keras.config.set_dtype_policy("float32")


def run_baseline(job: JobConfig) -> JobResults:
    """Runs the same job from the standard counterpart of its source, in the subfolder baseline/ of its workdir."""
    if source_is_job(job):
        run_job(twin_job(job))
    return run_job(baseline_job(job).with_flags(draws=1))


def run_draws(job: JobConfig) -> None:
    """Runs the draws of a job, and of its baseline if it has one. Draws that are finished are not run again."""
    for each in (job, *([baseline_job(job)] if job.transfer.baseline else [])):
        for draw in draw_jobs(each):
            if finished_results(pathlib.Path(draw.run.workdir)) is None:
                run_job(draw)


def build_job(job: JobConfig) -> tuple[keras.Model, TaskData]:
    """Returns the classifier of a job, with the right layers frozen, and its data. Runs the source's job if needed."""
    distribution = start_distribution(job.run.distribution, worker_timeout=job.run.worker_timeout)
    source = _source_classifier(job, distribution) if job.is_transfer else None
    with distribution.chief_first():  # only the chief prepares a data set, where all workers see the same disk
        task = load_job_task(job, image_size=source.input_shape[1] if source else None, distribution=distribution)
    # Seeded only now, because preparing a data set and running the source's job also draw random numbers, and a
    # repeated run does neither.
    keras.utils.set_random_seed(job.run.seed)
    classifier = adapted_classifier(source, job, task) if source else new_classifier(job, task)
    if (dense := dense_task(job.data.task_type)) is not None:
        task = dense.with_labels_for(task, classifier)
    return reused_classifier(job, classifier), task


def _source_classifier(job: JobConfig, distribution: Distribution) -> keras.Model:
    """Loads the source. If it is a flag file whose classifier is missing, that job runs first."""
    path = job.transfer.source
    if source_is_job(job):
        source = source_job(job)
        if pathlib.Path(source.run.workdir).resolve() == pathlib.Path(job.run.workdir).resolve():
            raise UserError(
                f"The source's job needs its own workdir. Received: --source={path}, whose job would use the workdir "
                f"of this job, {job.run.workdir}. Choose another --workdir."
            )
        run_job(source)
        path = str(classifier_path(source))
    with distribution.chief_first():  # only the chief downloads a published model
        return open_source(path, job.transfer, image_size=job.data.image_size)


def _introduce(job: JobConfig, classifier: keras.Model, task: TaskData) -> None:
    """Prints what is about to be trained, and what the user should know about the data."""
    console.print(f"Training {classifier.name} on {job.data.dataset} ({task.num_train} images) in {job.run.workdir}.")
    if warning := emulation_warning(job.optimization.precision):
        console.print(warning)
    for note in task.notes:
        console.print(note, markup=False)
    if task.skipped:
        console.print(f"Left out {len(task.skipped)} images that cannot be decoded: {', '.join(task.skipped[:5])}")


def _fit(
    job: JobConfig, classifier: keras.Model, task: TaskData, distribution: Distribution
) -> tuple[TrainingProgress, HeadFit | None]:
    workdir = pathlib.Path(job.run.workdir)
    if job.transfer.cached:
        head_fit = fit_head(job, classifier, task, workdir)
        return head_fit.progress, head_fit
    return fit_classifier(job, classifier, task, workdir, distribution), None


def _test(
    job: JobConfig, classifier: keras.Model, task: TaskData, distribution: Distribution
) -> Evaluation | Measurement:
    """Evaluates on the test part, which no other part of a job uses."""
    if (dense := dense_task(job.data.task_type)) is not None:
        return measure_test(job, dense, classifier, task)
    if can_test_features(job):
        return evaluate_features(classifier, task)
    compiled = distribution.num_replicas == 1 and compiles_with_xla(job.optimization.xla, classifier)
    if compiled:
        prepare_for_xla(classifier)
    share_trace = (job.transfer.cached or reuses_trainer(job)) and not compiled
    if job.transfer.cached and share_trace:
        classifier = classifier_to_attack(job, classifier)
    return evaluate_classifier(
        classifier,
        task.test_share(replicas=1) if compiled else distribution.test_data(task),  # XLA needs batches of one size
        attack=job.adversarial.evaluation_attack,
        ids=distribution.test_ids(task),
        strategy=distribution.strategy,
        jit_compile=compiled,
        share_trace=share_trace,
    )
