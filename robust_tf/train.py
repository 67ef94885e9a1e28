"""Trains a classifier: adversarial (or standard) pretraining, or transfer of a robust backbone.

    python -m robust_tf.train --flagfile=configs/quickstart.cfg [--workdir=W] [any flag]

Started again on the same workdir, it goes on where it stopped.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.environment import set_tensorflow_defaults
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import check_output_folder, replaced_atomically
from robust_tf.flags import parse_flags, to_flag_file
from robust_tf.results import BASELINE, FILE_NAME, JobResults

set_tensorflow_defaults()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.console import console, only_a_warning  # noqa: E402
from robust_tf.data import TaskData, dataset_info  # noqa: E402
from robust_tf.job.building import TaskFigures, adapted, new_classifier, planned_task, task_of  # noqa: E402
from robust_tf.job.fitting import fit_classifier  # noqa: E402
from robust_tf.job.half_precision import emulation_warning  # noqa: E402
from robust_tf.job.head_fitting import fit_head  # noqa: E402
from robust_tf.job.planning.devices import parse_clusters  # noqa: E402
from robust_tf.job.planning.roofline import device_plan, job_work  # noqa: E402
from robust_tf.job.planning.table import plan_table  # noqa: E402
from robust_tf.job.results import closing_table, job_results, with_baseline  # noqa: E402
from robust_tf.job.testing import Evaluation, evaluate_classifier  # noqa: E402
from robust_tf.models import PUBLISHED, load_classifier, pixel_warning, save_classifier  # noqa: E402
from robust_tf.reporting import REPORT, write_examples, write_history, write_report  # noqa: E402
from robust_tf.reporting.next_commands import next_commands, served_name  # noqa: E402
from robust_tf.serving.publish.export import export_classifier, model_folder, readers_of  # noqa: E402
from robust_tf.serving.publish.model_card import card_from_results, decoding_from_results  # noqa: E402
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress  # noqa: E402
from robust_tf.training.distribution import PEER_LOST, restart_process, start_distribution  # noqa: E402
from robust_tf.training.interruption import Interrupted, signals_raise  # noqa: E402
from robust_tf.training.tensorboard import write_result  # noqa: E402
from robust_tf.transfer import sources  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """The program: flags in, the job's files and a table out."""
    logging.set_verbosity(logging.ERROR)  # TFDS and TensorFlow tell much that is no news to the user
    config, rest = parse_flags(JobConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"Everything is a flag, --name=value. Received: {rest[0]!r}.")
    try:
        with signals_raise():
            run(dataclasses.replace(config, workdir=config.workdir or default_workdir(argv)))
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None


def run(config: JobConfig) -> None:
    """Runs a job, its baseline and its export, and prints what came out."""
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.export_dir:
        model_folder(pathlib.Path(config.export_dir), served_name(config))  # a wrong name should not wait for the end
    if config.dry_run:
        print_plan(config)
        try:
            check_outputs(config)
        except UserError as error:  # the plan may be for another machine
            console.print(f"WARNING: on this machine the job could not write its results. {error}")
        return
    distribution = start_distribution(config.distribution)
    try:
        distribution.on_chief(lambda: check_outputs(config))
        results = run_job(config)
        baseline = run_baseline(config) if config.baseline else None
        distribution.on_chief(lambda: finish(config, results, baseline))
    except PEER_LOST as error:
        if distribution.num_workers == 1:
            raise
        restart_process(error, most=config.restarts)


def check_outputs(config: JobConfig) -> None:
    """Refuses folders that can't be written, before the hours of training whose results go there.

    Raises:
        UserError: names the flag and the folder.
    """
    workdirs = [pathlib.Path(config.workdir)]
    if config.baseline and sources.is_flag_file(config.source):
        workdirs.append(pathlib.Path(twin_config(config).workdir))
    for workdir in workdirs:
        if finished_results(workdir) is None:  # a finished job is only read
            check_output_folder(workdir, "--workdir")
    if config.export_dir:
        check_output_folder(model_folder(pathlib.Path(config.export_dir), served_name(config)), "--export_dir")


def finish(config: JobConfig, results: JobResults, baseline: JobResults | None = None) -> None:
    """What comes after all figures are there: the table, the export, the commands that may come next."""
    workdir = pathlib.Path(config.workdir)
    if baseline:
        compared = with_baseline(results, baseline, workdir)
        if compared != results:  # a finished job may lie where nothing can be written
            compared.write(workdir / FILE_NAME)
        if compared != results or not (workdir / REPORT).exists():
            with only_a_warning(f"The report of {workdir}"):
                write_report(workdir)
        results = compared
    console.print(closing_table(results))
    for line in results.comparison_in_words():
        console.print(line, soft_wrap=True)
    if config.export_dir:
        export(config, results)
    print_next_commands(config)


def run_job(config: JobConfig) -> JobResults:
    """One training job from its flags to results.json; a finished one is only read again.

    Raises:
        UserError: something in the flags, the data or the files is at fault. What was written before is kept.
    """
    workdir = pathlib.Path(config.workdir)
    distribution = start_distribution(config.distribution)
    distribution.check_batch_size(config.batch_size)
    distribution.on_chief(lambda: claim_workdir(workdir, config))
    results = distribution.on_chief(lambda: finished_results(workdir))
    if distribution.any(results is not None):
        console.print(f"{workdir} is finished already.")
        if distribution.is_chief and not config.baseline and not (workdir / REPORT).exists():
            with only_a_warning(f"The report of {workdir}"):
                write_report(workdir)
        return results or JobResults()

    keras.config.set_dtype_policy(config.precision)  # also tells Keras whether to scale the loss
    try:
        with distribution.scope():
            classifier, task = build_job(config)
        console.print(f"Training {classifier.name} on {config.dataset} ({task.num_train} images) in {workdir}.")
        if warning := emulation_warning(config.precision):
            console.print(warning)
        for note in task.notes:
            console.print(note, markup=False)
        if task.skipped:
            console.print(f"Left out {len(task.skipped)} images that cannot be decoded: {', '.join(task.skipped[:5])}")
        head_fit = None
        with task.broken_images_named():
            if config.features == "cached":
                head_fit = fit_head(config, classifier, task, workdir)
                progress = head_fit.progress
            else:
                progress = fit_classifier(config, classifier, task, workdir, distribution)
            # The one and only look at the test part.
            evaluation = evaluate_classifier(
                classifier,
                distribution.test_data(task),
                attack=config.evaluation_attack,
                ids=distribution.test_ids(task),
                strategy=distribution.strategy,
            )
        results = job_results(config, task, classifier, evaluation, progress, head_fit)
        distribution.on_chief(lambda: write_job(config, task, classifier, evaluation, progress, results))
        return results
    except UserError:
        if distribution.is_chief:
            release_workdir(workdir)
        raise
    except Interrupted as interruption:
        state = Checkpoints(workdir / "checkpoints").latest()
        progress = state.progress if state else TrainingProgress()
        console.print(
            f"Interrupted. {progress.epochs_done} of {config.passes} epochs are saved in {workdir}, and "
            f"{progress.steps_done} steps of the next one; the same command goes on there."
        )
        raise SystemExit(interruption.exit_code) from None
    finally:
        keras.config.set_dtype_policy("float32")


def write_job(
    config: JobConfig,
    task: TaskData,
    classifier: keras.Model,
    evaluation: Evaluation,
    progress: TrainingProgress,
    results: JobResults,
) -> None:
    """The files of a finished job."""
    workdir = pathlib.Path(config.workdir)
    save_classifier(classifier, workdir / "classifier.keras")
    write_result(
        workdir / "tensorboard",
        settings=_hparams(config),
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
    results.write(workdir / FILE_NAME)  # last: its presence says that the job is finished
    with only_a_warning(f"The report of {workdir}"):
        write_examples(workdir, evaluation.examples)
        if not config.baseline:  # with a baseline the report has to wait for it
            write_report(workdir)


def finished_results(workdir: pathlib.Path) -> JobResults | None:
    """The results of a workdir whose job is finished, or None."""
    results = JobResults.read(workdir / FILE_NAME)
    if results is not None:
        results.check_finished(workdir / FILE_NAME)
    return results


def build_job(config: JobConfig) -> tuple[keras.Model, TaskData]:
    """The classifier, frozen as the flags say, and its data. Runs the source's job first if it has to."""
    source = load_source_classifier(config) if config.task == "transfer" else None
    distribution = start_distribution(config.distribution)
    with distribution.chief_first():  # which prepares the data set, where all see the same disk
        task = task_of(
            config,
            image_size=source.input_shape[1] if source else None,
            worker=distribution.worker,
            num_workers=distribution.num_workers,
            num_replicas=distribution.num_replicas,
        )
    # Only now: preparing a data set and running the source's job, which a repetition does not, draw numbers as well.
    keras.utils.set_random_seed(config.seed)
    classifier = adapted(source, config, task) if source else new_classifier(config, task)
    return classifier, task


def load_source_classifier(config: JobConfig) -> keras.Model:
    """The source; if it is a flag file whose classifier is missing, that job is run first."""
    path = config.source
    if sources.is_flag_file(config.source):
        source_job = source_config(config)
        if pathlib.Path(source_job.workdir).resolve() == pathlib.Path(config.workdir).resolve():
            raise UserError(
                f"The source's job needs a workdir of its own. Received: --source={config.source}, whose workdir is "
                f"that of this job, {config.workdir}. Choose another --workdir."
            )
        run_job(source_job)
        path = str(pathlib.Path(source_job.workdir) / "classifier.keras")
    with start_distribution(config.distribution).chief_first():  # which fetches a published one
        source = sources.load_source(path, architecture=config.architecture, image_size=config.image_size)
    if warning := pixel_warning(source):
        console.print(f"WARNING for {path}: {warning}")
    return source


def source_config(config: JobConfig) -> JobConfig:
    """The job of a source that is a flag file; its workdir lies beside this job's unless the file names one."""
    path = pathlib.Path(config.source)
    source_job = read_flag_file(path)
    workdir = source_job.workdir or str(pathlib.Path(config.workdir).with_name(path.stem))
    return dataclasses.replace(
        source_job,
        workdir=workdir,
        data_dir=source_job.data_dir or config.data_dir,
        distribution=config.distribution,
    )


def twin_config(config: JobConfig) -> JobConfig:
    """The standard twin of a source that is a flag file."""
    robust = source_config(config)
    return dataclasses.replace(robust.standard_twin(), workdir=f"{robust.workdir}_eps0")


def run_baseline(config: JobConfig) -> JobResults:
    """The same job from the standard twin of its source, in the sub-folder baseline/ of its workdir."""
    if sources.is_flag_file(config.source):
        twin_job = twin_config(config)
        run_job(twin_job)
        twin = str(pathlib.Path(twin_job.workdir) / "classifier.keras")
    else:
        twin = sources.published_twin(config.source)
    workdir = str(pathlib.Path(config.workdir) / BASELINE)
    return run_job(dataclasses.replace(config, source=twin, workdir=workdir, baseline=False, export_dir=""))


def claim_workdir(workdir: pathlib.Path, config: JobConfig) -> None:
    """Writes flags.cfg, or checks that the one there describes the same job.

    Raises:
        UserError: the workdir belongs to another job (lists the flags that differ), or can't be written.
    """
    path = workdir / "flags.cfg"
    if path.exists():
        differences = read_flag_file(path).differences(config)
        if differences:
            raise UserError(
                f"The workdir {workdir} holds a job with other flags (there -> now): {'; '.join(differences)}. "
                "Choose another --workdir, or delete this one."
            )
        return
    with replaced_atomically(path) as temporary:
        temporary.write_text(to_flag_file(config), encoding="utf-8")


def release_workdir(workdir: pathlib.Path) -> None:
    """Gives up a workdir in which nothing was begun: the command with its mistake corrected may have it."""
    if [path.name for path in workdir.iterdir()] == ["flags.cfg"]:
        (workdir / "flags.cfg").unlink()


def export(config: JobConfig, results: JobResults) -> None:
    """Publishes the finished classifier as the next SavedModel version below `--export_dir`."""
    classifier = load_classifier(pathlib.Path(config.workdir) / "classifier.keras")
    version_dir = export_classifier(
        classifier,
        config.export_dir,
        served_name(config),
        model_card=card_from_results(results),
        labels=results.class_names,
        resize_size=results.resize_size,
        decoding=decoding_from_results(results),
    )
    console.print(f"Published {version_dir} ({readers_of(version_dir)}).")


def print_plan(config: JobConfig) -> None:
    """`--dry_run`: the figures of the job. Sources that are jobs or downloads of their own are not run or fetched."""
    clusters = parse_clusters(config.plan_devices)
    keras.config.set_dtype_policy(config.precision)
    try:
        classifier, task = planned_job(config)
        console.print(plan_table(config, task, classifier, pathlib.Path(config.workdir)))
        if clusters:
            work = job_work(config, classifier, task)
            for cluster in clusters:
                console.print(device_plan(config, task, work, cluster))
    finally:
        keras.config.set_dtype_policy("float32")


def planned_job(config: JobConfig) -> tuple[keras.Model, TaskFigures]:
    """A classifier with the layers and the frozen ones of the job, and its data (with --plan_devices its figures)."""
    figures_of = planned_task if config.plan_devices else task_of
    planned = config
    if sources.is_flag_file(config.source):
        source_job = source_config(config)
        planned = dataclasses.replace(
            config,
            architecture=config.architecture or source_job.architecture,
            image_size=config.image_size or source_job.image_size or dataset_info(source_job.dataset).image_size,
        )
    elif config.source in PUBLISHED:
        planned = dataclasses.replace(config, architecture=PUBLISHED[config.source].architecture)
    elif config.task == "transfer":
        source = load_source_classifier(config)
        task = figures_of(config, image_size=source.input_shape[1])
        return adapted(source, config, task), task
    task = figures_of(planned)
    classifier = new_classifier(planned, task)
    return (adapted(classifier, config, task) if config.task == "transfer" else classifier), task


def default_workdir(argv: Sequence[str]) -> str:
    """runs/<name of the flag file>."""
    arguments = [arg.lstrip("-").partition("=") for arg in argv]
    following = [*argv[1:], ""]  # absl takes "--flagfile F", too
    flag_files = [
        value if separator else after
        for (name, separator, value), after in zip(arguments, following, strict=True)
        if name == "flagfile"
    ]
    return str(pathlib.Path("runs") / (pathlib.Path(flag_files[-1]).stem if flag_files else "train"))


def print_next_commands(config: JobConfig) -> None:
    """The commands that usually follow, to copy."""
    sample = task_of(config).sample() if config.export_dir else b""
    console.print("Next:", *(f"  {command}" for command in next_commands(config, sample)), sep="\n")


def _hparams(config: JobConfig) -> dict[str, bool | int | float | str]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: value for name, value in values.items() if isinstance(value, bool | int | float | str) and value != ""
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
