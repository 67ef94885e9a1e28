"""The results of a finished job, and the table and lines that the program prints last."""

import pytest
from rich.console import Console

from robust_tf.attacks import AttackConfig
from robust_tf.job.results import closing_table, measured_attack
from robust_tf.results import AccuracyDifference, Comparison, JobResults, MeasuredAttack
from robust_tf.statistics import Interval

ATTACK = MeasuredAttack(name="PGD-20 (highest-loss iterate)", norm="l2", epsilon=0.5, steps=20)
BASELINE = JobResults(clean_accuracy=0.5)


def test_each_figure_that_was_compared_has_a_line():
    compared = Comparison(
        clean_accuracy=AccuracyDifference(0.058, Interval(0.012, 0.104), 0.013),
        mean_per_class_accuracy=AccuracyDifference(0.02, Interval(-0.01, 0.05), 0.2),
        robust_accuracy=AccuracyDifference(0.13, Interval(0.08, 0.18), 1e-7),
    )
    results = JobResults(baseline=BASELINE, robust_accuracy_attack=ATTACK, comparison=compared)
    assert results.comparison_in_words() == [
        "clean accuracy, robust minus standard source: +5.8 points (95 % +1.2 to +10.4, p = 0.013)",
        "mean-per-class accuracy, robust minus standard source: +2.0 points (95 % -1.0 to +5.0, p = 0.2): this run "
        "does not show which is better",
        "accuracy under PGD-20 (highest-loss iterate), l2 0.5, robust minus standard source: +13.0 points (95 % +8.0 "
        "to +18.0, p < 0.001)",
    ]


def test_a_line_says_when_a_baseline_could_not_be_compared():
    (line,) = JobResults(baseline=BASELINE).comparison_in_words()
    assert "no paired differences" in line and "predictions.csv" in line
    assert JobResults().comparison_in_words() == []


def test_without_an_attack_only_the_clean_accuracy_is_compared():
    compared = Comparison(clean_accuracy=AccuracyDifference(0.1, Interval(0.05, 0.15), 0.001))
    assert len(JobResults(baseline=BASELINE, comparison=compared).comparison_in_words()) == 1


def test_the_attack_is_named_after_the_iterate_that_it_keeps():
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.01, steps=20)
    assert measured_attack(attack).in_words == "PGD-20 (highest-loss iterate), linf 0.1"
    assert measured_attack(AttackConfig(norm="linf", epsilon=0.1, step_size=0.01, steps=3, use_best=False)).name == (
        "PGD-3 (last iterate)"
    )
    assert measured_attack(AttackConfig(norm="linf", epsilon=0.0, step_size=0.01, steps=20)) is None


def test_an_attack_that_an_older_version_ran_is_named_by_its_steps():
    assert MeasuredAttack(norm="l2", epsilon=0.5, steps=20).in_words == ATTACK.in_words


@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class_accuracy"])
@pytest.mark.parametrize("baseline", [None, BASELINE])
def test_the_closing_table_has_a_row_for_each_job_and_a_column_for_each_figure(metric, baseline):
    results = JobResults(
        dataset="pets",
        architecture="resnet18",
        num_test_images=100,
        metric=metric,
        clean_accuracy=0.8,
        clean_accuracy_interval=Interval(0.7, 0.9),
        mean_per_class_accuracy=0.75,
        robust_accuracy=0.25,
        robust_accuracy_interval=Interval(0.2, 0.3),
        robust_accuracy_attack=ATTACK,
        baseline=baseline,
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(closing_table(results))
    title, head, *rows = [line.strip() for line in capture.get().splitlines() if line.strip()]
    assert title == "pets: 100 test images"
    assert ("mean per class" in head, "PGD-20 (highest-loss iterate), l2 0.5" in head) == (metric != "accuracy", True)
    cells = [row.split("  ") for row in rows[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    per_class = ["75.0%"] if metric != "accuracy" else []
    name = "from the robust source" if baseline else "resnet18"
    assert cells[0] == [name, "80.0% (70.0% to 90.0%)", *per_class, "25.0% (20.0% to 30.0%)"]
    unknown = ["not measured"] if metric != "accuracy" else []
    expected = [["from the standard source", "50.0%", *unknown, "not measured"]] if baseline else []
    assert cells[1:] == expected
