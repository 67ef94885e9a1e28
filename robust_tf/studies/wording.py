"""The findings of a study in plain words."""

from collections.abc import Sequence

from robust_tf.statistics import Interval
from robust_tf.studies.analysis import Answer, Comparison, Difference, Group, Measure
from robust_tf.studies.axes import epsilon_text, norm_text
from robust_tf.studies.replication import Replication

_MODES = {
    "fixed_feature": "With fixed features",
    "full_network": "With the full network trained",
    "partial": "With a part of the network trained",
}
_MEASURES: dict[Measure, str] = {"accuracy": "accuracy", "robust_accuracy": "robust accuracy"}
_TO = "\u00a0to\u00a0"  # its spaces do not break, so an interval stays on one line


def answer_sentence(answer: Answer, groups: Sequence[Group]) -> str:
    """Returns the answer for a transfer mode in one sentence with its interval.

    Args:
        answer: The answer.
        groups: All groups of the study.
    """
    difference, estimate = answer.difference, answer.difference.estimate
    points = abs(100 * estimate.mean)
    measure = _MEASURES[answer.measure]
    mode = _MODES.get(answer.transfer_mode, f"With transfer mode {answer.transfer_mode}")
    source = _robust_source(answer, groups)
    about = f" on average over {answer.num_groups} groups" if answer.num_groups > 1 else ""
    measured = f"{interval_points(estimate.interval)}{_over(estimate)}"
    if difference.verdict == "not decided by this many runs":
        text = f"{mode}, this study does not decide whether {source} transfer better or worse than standard ones in "
        text += f"{measure}: the difference is {signed_points(estimate.mean)} points{about} ({measured})"
        return f"{text}; {needed(difference)}."
    verb = "transfer" if answer.measure == "accuracy" else "keep their accuracy under attack"
    higher = "higher" if estimate.mean > 0 else "lower"
    text = f"{mode}, {source} {verb} {difference.verdict} than standard ones: the {measure} is {points:.1f} points "
    return f"{text}{higher}{about} ({measured})."


def counts_sentence(comparisons: Sequence[Comparison], measure: Measure) -> str:
    """Returns how many comparisons came out better, worse and not decided."""
    verdicts = [comparison.difference.verdict for comparison in comparisons]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    return (
        f"Of {len(verdicts)} comparisons of the {_MEASURES[measure]} at one epsilon with the standard source, {better} "
        f"came out better, {worse} worse, and {len(verdicts) - better - worse} were not decided by this many runs (5 % "
        "level, adjusted by Holm's method for the epsilons of a group)."
    )


def needed(difference: Difference) -> str:
    """Returns how many runs would probably decide a comparison that is not decided, or that no number would."""
    estimate = difference.estimate
    unit = f"{estimate.cluster}s" if estimate.cluster == "source seed" else "draws of the labels"
    if estimate.interval is None:
        return "a single run cannot tell: at least two source seeds are needed"
    if difference.clusters_to_decide is None:
        return f"even 1000 {unit} would probably not decide it"
    return f"about {difference.clusters_to_decide} {unit} would probably decide it"


def percent(estimate: Replication) -> str:
    """Returns an accuracy with its interval, such as "80.1 % (78.0 to 82.2)"."""
    if estimate.interval is None:
        return f"{100 * estimate.mean:.1f} %"
    low, high = (100 * min(1.0, max(0.0, end)) for end in estimate.interval)
    return f"{100 * estimate.mean:.1f} % ({low:.1f}{_TO}{high:.1f})"


def signed_points(share: float) -> str:
    """Returns a difference in percentage points with its sign.

    Example:
        >>> signed_points(0.0312)
        '+3.1'
    """
    return f"{100 * share:+.1f}"


def interval_points(interval: Interval | None) -> str:
    """Returns the interval of a difference in percentage points.

    Example:
        >>> interval_points(Interval(0.01, 0.052)).replace(chr(160), " ")
        '95 % interval +1.0 to +5.2'
    """
    if interval is None:
        return "no interval from a single run"
    return f"95 % interval {signed_points(interval.low)}{_TO}{signed_points(interval.high)}"


def p_text(p_value: float | None) -> str:
    """Returns a p-value for a table.

    Example:
        >>> p_text(0.0123), p_text(1e-9), p_text(None)
        ('0.012', '< 0.001', '')
    """
    if p_value is None:
        return ""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def _robust_source(answer: Answer, groups: Sequence[Group]) -> str:
    if answer.epsilon_from == "validation":
        return "robust sources (with the epsilon that validation prefers)"
    if answer.epsilon_from == "mean":
        return "robust sources (averaged over all epsilons)"
    names = {
        f"{norm_text(group.key.source_norm)} epsilon {epsilon_text(place.epsilon, group.key.source_norm)}"
        for group in groups
        if group.key.transfer_mode == answer.transfer_mode
        for place in group.robust_places
    }
    return f"robust sources ({', '.join(sorted(names))})"


def _over(estimate: Replication) -> str:
    draws = f"{estimate.num_draws} draw{'s' if estimate.num_draws > 1 else ''} of the labels"
    if estimate.cluster == "draw":
        return f", over {draws}; it says nothing about other sources, because each is a single one"
    alone = "; it says nothing about other draws" if estimate.num_draws == 1 else ""
    return f", over {estimate.num_seeds} source seeds and {draws}{alone}"
