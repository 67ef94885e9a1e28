"""Trains a classifier: adversarial (or standard) pretraining, or transfer of a robust backbone.

    python -m robust_tf.train --flagfile=configs/quickstart.cfg [--workdir=W] [any flag]

Run the same command again after an interruption, and the job continues from its last checkpoint.
"""

import sys
from collections.abc import Sequence

from robust_tf.config.job import JobConfig
from robust_tf.environment import start_tensorflow, use_xla_cache
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import cache_folder
from robust_tf.flags import default_workdir, parse_flags


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and runs the job that they describe."""
    job, rest = parse_flags(JobConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    # TensorFlow is imported only now, so that --help and error messages about flags do not have to wait for it.
    if job.optimization.jit_compile != "false" and not job.plan.dry_run:
        folder = cache_folder(job.data.cache_dir or None)
        use_xla_cache(folder, deterministic=job.run.deterministic, tf32=job.optimization.tf32)
    start_tensorflow()
    from robust_tf.training.interruption import Interrupted, signals_raise

    try:
        with signals_raise():
            run(job.with_flags(workdir=job.run.workdir or default_workdir(argv)))
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None


def run(job: JobConfig) -> None:
    """Runs a job, its baseline and its export, and prints the results."""
    import tensorflow as tf

    from robust_tf.job.draws import sharing_of
    from robust_tf.job.outputs import finish_job
    from robust_tf.job.run import run_baseline, run_draws, run_job
    from robust_tf.job.workdir import check_export, check_outputs
    from robust_tf.training.distribution import PEER_LOST, restart_process, start_distribution

    tf.config.experimental.enable_tensor_float_32_execution(job.optimization.tf32)
    if job.run.deterministic:
        tf.config.experimental.enable_op_determinism()
    check_export(job)
    if job.plan.dry_run:
        plan(job)
        return
    try:
        distribution = start_distribution(job.run.distribution, worker_timeout=job.run.worker_timeout)
    except PEER_LOST as error:
        if job.run.distribution != "multi_worker":
            raise
        restart_process(error, most=job.run.restarts)
    with distribution.watched() as watch:
        try:
            distribution.on_chief(lambda: check_outputs(job))
            with sharing_of(job):
                results = run_job(job)
                baseline = run_baseline(job) if job.transfer.baseline else None
                run_draws(job)
            distribution.on_chief(lambda: finish_job(job, results, baseline))
        except PEER_LOST as error:
            if distribution.num_workers == 1:
                raise
            restart_process(error, most=job.run.restarts, signal_number=watch.signal_number)


def plan(job: JobConfig) -> None:
    """Prints the plan of a job, and a warning if this machine could not write its results."""
    from robust_tf.console import console
    from robust_tf.job.planning.plan import print_plan
    from robust_tf.job.workdir import check_outputs

    print_plan(job)
    try:
        check_outputs(job)
    except UserError as error:  # the plan may be for another machine
        console.print(f"WARNING: on this machine the job could not write its results. {error}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
