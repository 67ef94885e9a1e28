"""The mean over repeated runs, with an interval that holds for other source seeds and other draws of the labels.

The runs of one place of the grid form a table: each source seed is combined with each draw of the training labels. All
runs from one source share that source, so they are not independent: they are clustered by source seed. They are also
clustered by draw, because every source meets the same draws.

A bootstrap that resamples source seeds is the usual answer to clusters, but it never reaches beyond the smallest and
the largest mean of a cluster. These two hold the true mean with a probability of at most 1 - 2 ** (1 - n) for n source
seeds: 75 % for three, 94 % for five, and a percentile interval lies inside them. The interval here is therefore a t
interval. Its variance is the variance between the means of the source seeds, which is what the bootstrap clustered by
source seed estimates, plus the part of the variance between draws that it does not hold already.

Sources: Searle, Casella, McCulloch 1992, Variance Components, chapter 4 (two-way random model); Satterthwaite 1946,
Biometrics Bulletin 2(6), 110-114 (degrees of freedom); Hesterberg 2015, The American Statistician 69(4), 371-386 (why
the percentile bootstrap is too narrow for few clusters).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from robust_tf.statistics import Interval

Cluster = Literal["source seed", "draw"]
POWER = 0.8  # probability with which the suggested number of runs decides, if the true difference is the measured one
_MOST_CLUSTERS = 1000  # a larger number of seeds is no advice
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replication:
    """A mean over repeated runs.

    Attributes:
        mean: Mean over the source seeds of their means over the draws.
        standard_error: Standard error of the mean, over both source seeds and draws; NaN for a single run.
        degrees_of_freedom: Degrees of freedom of the standard error; NaN for a single run.
        cluster: What the runs are clustered by. "draw" if there is only one source, or its seed is unknown: the
            interval then says nothing about other sources.
        num_seeds: Number of source seeds.
        num_draws: Number of draws of the labels.
        num_runs: Number of runs.
        cluster_variance: Variance between the means of the clusters.
        draw_variance: Part of the squared standard error that more clusters would not reduce.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    cluster: Cluster
    num_seeds: int
    num_draws: int
    num_runs: int
    cluster_variance: float
    draw_variance: float

    @property
    def interval(self) -> Interval | None:
        """The 95 % confidence interval of the mean; None for a single run, which says nothing about others."""
        if math.isnan(self.standard_error):
            return None
        half = float(stats.t.ppf(0.975, self.degrees_of_freedom)) * self.standard_error
        return Interval(self.mean - half, self.mean + half)

    @property
    def p_value(self) -> float | None:
        """Probability of a mean at least this far from 0 if the true mean is 0, by the t test of the same interval."""
        if math.isnan(self.standard_error):
            return None
        if self.standard_error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.standard_error, self.degrees_of_freedom))

    @property
    def num_clusters(self) -> int:
        """Number of source seeds, or of draws if the runs are clustered by draw."""
        return self.num_seeds if self.cluster == "source seed" else self.num_draws

    def clusters_to_decide(self, level: float = 0.05) -> int | None:
        """Returns how many clusters would decide on which side of 0 the true mean is, with a probability of 80 %.

        The number is for a true mean and variances that equal the measured ones, so it is only a rough guide.

        Args:
            level: Level of the test: the largest p-value that counts as decided.

        Returns:
            The number of source seeds (or draws, see `cluster`), at least the present one plus one. None if no number
            up to 1000 is enough, because the mean is too close to 0 or because the draws vary too much.
        """
        if math.isnan(self.standard_error):
            return None
        first = self.num_clusters + 1
        if self._power(_MOST_CLUSTERS, level) < POWER:
            return None
        return next(count for count in range(first, _MOST_CLUSTERS + 1) if self._power(count, level) >= POWER)

    def _power(self, clusters: int, level: float) -> float:
        between, fixed = self.cluster_variance / clusters, self.draw_variance
        variance = between + fixed
        if variance == 0:
            return float(self.mean != 0)
        freedom = _satterthwaite(variance, [(between, clusters - 1), (fixed, self.num_draws - 1)])
        shift = abs(self.mean) / math.sqrt(variance)
        bound = stats.t.ppf(1 - level / 2, freedom)
        # The normal distribution stands in where SciPy's noncentral t has no number: for a very large shift.
        power = stats.nct.sf(bound, freedom, shift)
        return float(power if np.isfinite(power) else stats.norm.sf(bound - shift))


def replicate(
    values: Sequence[float],
    seeds: Sequence[int | None],
    draws: Sequence[int],
    *,
    resolution: float = 0.0,
) -> Replication:
    """Returns the mean over runs with its standard error over source seeds and draws.

    The table of source seeds and draws may have gaps. Several runs with the same seed and draw count as one run with
    their mean.

    Args:
        values: Value of each run, such as an accuracy in [0, 1] or a difference of two; at least one.
        seeds: Source seed of each run; None if it is unknown, as it is for published models.
        draws: Seed that drew the labels of each run.
        resolution: Smallest step between two values, such as one divided by the number of test images. The standard
            error is at least what rounding to such steps causes, so that values that happen to be equal do not count
            as certain.

    Example:
        >>> runs = replicate([0.80, 0.82, 0.86, 0.88, 0.83, 0.85], [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
        >>> f"{runs.mean:.2f}, {runs.interval.in_words}"
        '0.84, 77.5% to 90.5%'
    """
    table = _table(values, seeds, draws)
    num_seeds, num_draws = table.shape
    num_runs = int(np.isfinite(table).sum())
    cluster: Cluster = "source seed" if num_seeds > 1 else "draw"
    if cluster == "draw":
        table = table.T
    means = np.nanmean(table, axis=1)
    count = len(means)
    result = {
        "mean": float(means.mean()),
        "cluster": cluster,
        "num_seeds": num_seeds,
        "num_draws": num_draws,
        "num_runs": num_runs,
    }
    if count == 1:
        nan = math.nan
        return Replication(
            **result, standard_error=nan, degrees_of_freedom=nan, cluster_variance=nan, draw_variance=0.0
        )
    rounding = resolution**2 / 12
    between = max(float(means.var(ddof=1)), rounding)
    fixed, parts = _variance_of_draws(table)
    variance = between / count + fixed
    return Replication(
        **result,
        standard_error=math.sqrt(variance),
        degrees_of_freedom=_satterthwaite(variance, [(between / count, count - 1), *parts]),
        cluster_variance=between,
        draw_variance=fixed,
    )


def cluster_bootstrap(
    values: Sequence[float], seeds: Sequence[int | None], draws: Sequence[int], *, random_seed: int = 0
) -> Interval:
    """Returns the 95 % percentile interval of the bootstrap clustered by source seed, for comparison.

    Each of 10,000 resamples takes as many source seeds as there are, with replacement, and all runs of each. With fewer
    than about 20 source seeds the interval is too narrow; see the text at the top of this module. Verdicts therefore
    use `replicate`.

    Args:
        values: Value of each run; at least one.
        seeds: Source seed of each run. With a single source, draws are resampled instead.
        draws: Seed that drew the labels of each run.
        random_seed: Seed of the resampling.

    Example:
        >>> cluster_bootstrap([0.80, 0.82, 0.86, 0.88], [0, 0, 1, 1], [0, 1, 0, 1])
        Interval(low=0.81, high=0.87)
    """
    table = _table(values, seeds, draws)
    means = np.nanmean(table, axis=1 if len(table) > 1 else 0)
    chosen = np.random.default_rng(random_seed).integers(len(means), size=(_RESAMPLES, len(means)))
    low, high = np.quantile(means[chosen].mean(axis=1), (0.025, 0.975))
    return Interval(round(float(low), 12), round(float(high), 12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for their number, so that the chance of any false finding stays below the level.

    Args:
        p_values: P-values of the comparisons.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _table(values: Sequence[float], seeds: Sequence[int | None], draws: Sequence[int]) -> np.ndarray:
    """Returns the values as (source seeds, draws) float64, with NaN in the gaps."""
    rows = {seed: row for row, seed in enumerate(dict.fromkeys(seeds))}
    columns = {draw: column for column, draw in enumerate(dict.fromkeys(draws))}
    total, count = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    for value, seed, draw in zip(values, seeds, draws, strict=True):
        total[rows[seed], columns[draw]] += value
        count[rows[seed], columns[draw]] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _variance_of_draws(table: np.ndarray) -> tuple[float, list[tuple[float, int]]]:
    """Returns the variance of the mean that comes from the columns alone, and the parts that it was computed from.

    In the two-way random model, the mean of a column varies by the variance between columns and by a share of the
    residual variance. The variance between the means of the rows holds that share, too, so it is taken away here. Each
    part is a variance with its degrees of freedom.
    """
    rows, columns = table.shape
    residuals, freedom = _additive_residuals(table)
    if columns < 2 or freedom < 1:
        return 0.0, []
    of_columns = float(np.nanmean(table, axis=0).var(ddof=1)) / columns
    residual = float((residuals**2).sum()) / freedom / int(np.isfinite(table).sum())
    if of_columns <= residual:
        return 0.0, []
    return of_columns - residual, [(of_columns, columns - 1), (residual, freedom)]


def _additive_residuals(table: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns what the sum of an effect of the row and an effect of the column leaves over, and its freedom."""
    rows, columns = table.shape
    row, column = np.nonzero(np.isfinite(table))
    design = np.zeros((len(row), rows + columns))
    design[np.arange(len(row)), row] = 1.0
    design[np.arange(len(row)), rows + column] = 1.0
    values = table[row, column]
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return values - design @ effects, len(values) - int(rank)


def _satterthwaite(variance: float, parts: Sequence[tuple[float, float]]) -> float:
    """Returns the degrees of freedom of a variance that is a sum or difference of parts, each with its own freedom."""
    uncertainty = sum(part**2 / freedom for part, freedom in parts if part > 0)
    return variance**2 / uncertainty if uncertainty else min(freedom for _, freedom in parts)
