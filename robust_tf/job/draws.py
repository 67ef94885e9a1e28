"""Repeats a transfer for several draws of its labeled images, and compares the two sources over all of them.

One draw of a few labels says little. With stored features a further draw takes a second or two, because only the head
is new. The first draw is the job itself. The other draws are separate jobs in the subfolder draws/ of its workdir. They
use the next seeds.
"""

import contextlib
import dataclasses
import pathlib
import statistics

from robust_tf.config.job import JobConfig
from robust_tf.evaluation.outcomes import Outcomes, compare_draws, compare_outcomes, read_outcomes
from robust_tf.job.sources import baseline_job, classifier_path, source_is_job, source_job
from robust_tf.job.workdir import finished_results
from robust_tf.results import BASELINE, DrawMeans, JobResults
from robust_tf.sharing import sharing

DRAWS = "draws"


def sharing_of(job: JobConfig) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the draws of a job share the source, the features and the traced attack."""
    return sharing() if job.transfer.draws > 1 else contextlib.nullcontext()


def draw_jobs(job: JobConfig) -> list[JobConfig]:
    """Returns the jobs of all draws except the first, which is the job itself."""
    source = str(classifier_path(source_job(job))) if source_is_job(job) else job.transfer.source
    workdir = pathlib.Path(job.run.workdir) / DRAWS
    return [
        job.with_flags(
            source=source,
            workdir=str(workdir / f"seed{seed}"),
            seed=seed,
            outputs="results",
            baseline=False,
            draws=1,
            claims=(),
            export_dir="",
        )
        for seed in range(job.run.seed + 1, job.run.seed + job.transfer.draws)
    ]


def complete_results(job: JobConfig, results: JobResults, baseline: JobResults | None) -> JobResults:
    """Returns the results of a job with its baseline, its draws and the paired differences between the two sources.

    Args:
        job: Job that is finished, and all its draws with it.
        results: Results of the job.
        baseline: Results of its baseline, or None if it has none.
    """
    if job.transfer.draws > 1:
        results = _with_means(results, job)
    if baseline is None:
        return results
    if job.transfer.draws > 1:
        other = baseline_job(job)
        baseline = _with_means(baseline, other)
        comparison = compare_draws(_outcomes(job), _outcomes(other), metric=results.metric)
    else:
        workdir = pathlib.Path(job.run.workdir)
        comparison = compare_outcomes(read_outcomes(workdir), read_outcomes(workdir / BASELINE), metric=results.metric)
    if comparison is not None:
        comparison = comparison.with_claims(job.transfer.claims)
    return dataclasses.replace(results, baseline=baseline, comparison=comparison)


def _outcomes(job: JobConfig) -> list[Outcomes | None]:
    """Returns the predictions of all draws of a job, in the order of their seeds."""
    return [read_outcomes(pathlib.Path(each.run.workdir)) for each in (job, *draw_jobs(job))]


def _with_means(results: JobResults, job: JobConfig) -> JobResults:
    """Returns the results of a job with its mean accuracies over all draws."""
    others = [finished_results(pathlib.Path(draw.run.workdir)) for draw in draw_jobs(job)]
    draws = [results, *(each for each in others if each is not None)]
    clean = [each.clean_accuracy for each in draws if each.clean_accuracy is not None]
    robust = [each.robust_accuracy for each in draws if each.robust_accuracy is not None]
    per_class = [each.mean_per_class_accuracy for each in draws if each.mean_per_class_accuracy is not None]
    means = DrawMeans(
        draws=len(draws),
        clean_accuracy=statistics.fmean(clean),
        mean_per_class_accuracy=statistics.fmean(per_class),
        robust_accuracy=statistics.fmean(robust) if robust else None,
    )
    return dataclasses.replace(results, draw_means=means)
