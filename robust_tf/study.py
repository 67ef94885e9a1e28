"""Runs a study: a grid of transfer jobs, with its statistics and report.

    python -m robust_tf.study --flagfile=configs/study_digits.cfg [--workers=2] [any flag of the job]

An axis of the grid is a flag of the job with several values, --vary="examples_per_class=5 10 20". Axes over flags of
the source's job are written --vary="source.epsilon=0 1", where --source is the flag file of that job. Run the same
command again after an interruption, and the study continues.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from robust_tf.config.job import JobConfig
from robust_tf.config.study import Study, parse_study
from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import default_workdir
from robust_tf.studies.grid import CellRun, SourceRun, StudyPlan, plan_study


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and runs the study that they describe."""
    study = parse_study(argv, __doc__ or "")
    study = dataclasses.replace(study, workdir=study.workdir or default_workdir(argv, otherwise="study"))
    config = study.config
    if config.advise:
        _advise(study)
        return
    plan = plan_study(study)
    if study.plan.dry_run:
        start_tensorflow()
        from robust_tf.studies.dry_run import print_study_plan

        print_study_plan(study, plan)
    elif config.launcher != "none":
        from robust_tf.studies.launch import write_launch_files

        write_launch_files(config, plan, argv)
    elif config.only_source is not None:
        _run_one("only_source", config.only_source, plan.sources)
    elif config.only_cell is not None:
        _run_one("only_cell", config.only_cell, plan.cells)
    else:
        _run_whole(study, plan)


def _advise(study: Study) -> None:
    start_tensorflow()
    from robust_tf.studies.advice import advise, print_check

    workdir = pathlib.Path(study.workdir)
    if "dataset" not in study.grids[0].fixed:
        print_check(workdir)
        return
    # The probes replace the source by each of those that they rank.
    advise(JobConfig.from_flags(**{"source": "any", **study.grids[0].fixed}), workdir)


def _run_whole(study: Study, plan: StudyPlan) -> None:
    start_tensorflow()
    from robust_tf.console import console
    from robust_tf.studies.collect import collect_study
    from robust_tf.studies.run import failed_before, failure_table, run_study
    from robust_tf.studies.states import settle_stale
    from robust_tf.training.interruption import Interrupted, signals_raise

    try:
        with signals_raise():
            if study.config.collect:
                failed = failed_before(plan)
            else:
                settle_stale(plan, study.config.stale)
                failed = run_study(plan, study.config)
            cells = collect_study(plan)
    except Interrupted as interruption:
        console.print(f"Interrupted. What is finished is saved in {plan.workdir}; the same command continues there.")
        raise SystemExit(interruption.exit_code) from None
    console.print(
        f"{len(cells)} of {len(plan.cells)} cells are finished; the report is {plan.workdir / 'report.html'}."
    )
    if failed:
        console.print(failure_table(failed))
        console.print("Their errors are in error.txt in their folders. --retry_failed runs them again.")
        raise SystemExit(1)


def _run_one(flag: str, number: int, runs: Sequence[CellRun | SourceRun]) -> None:
    if number >= len(runs):
        raise UserError(f"--{flag} counts from 0 to {len(runs) - 1} in this study. Received: {number}.")
    from robust_tf.studies.worker import prepare_process, run_safely

    prepare_process(threads=0)
    from robust_tf.training.interruption import Interrupted, signals_raise

    run = runs[number]
    try:
        with signals_raise():
            outcome = run_safely(run.job)
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None
    if outcome.error:
        print(f"error: {run.name}: {outcome.error}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
