"""The lines below the closing table: whether one run tells two sources apart."""

import pytest

from robust_tf.attacks import AttackConfig
from robust_tf.job.results import attack_in_words, attack_name, comparison_lines

ATTACK = {"name": "PGD-20 (highest-loss iterate)", "norm": "l2", "epsilon": 0.5, "steps": 20}


def compared(difference: float, low: float, high: float, p_value: float) -> dict:
    return {"difference": difference, "interval": [low, high], "p_value": p_value}


def test_each_figure_has_a_line():
    results = {
        "baseline": {"clean_accuracy": 0.5},
        "robust_accuracy_attack": ATTACK,
        "comparison": {
            "clean_accuracy": compared(0.058, 0.012, 0.104, 0.013),
            "mean_per_class_accuracy": compared(0.02, -0.01, 0.05, 0.2),
            "robust_accuracy": compared(0.13, 0.08, 0.18, 1e-7),
        },
    }
    assert comparison_lines(results) == [
        "clean accuracy, robust minus standard source: +5.8 points (95 % +1.2 to +10.4, p = 0.013)",
        "mean-per-class accuracy, robust minus standard source: +2.0 points (95 % -1.0 to +5.0, p = 0.2): this run "
        "does not decide",
        "accuracy under PGD-20 (highest-loss iterate), l2 0.5, robust minus standard source: +13.0 points (95 % +8.0 "
        "to +18.0, p < 0.001)",
    ]


@pytest.mark.parametrize("more", [{"comparison": None}, {}])
def test_a_baseline_without_predictions_is_said(more):
    (line,) = comparison_lines({"baseline": {"clean_accuracy": 0.5}, **more})
    assert "No paired difference" in line and "predictions.csv" in line
    assert comparison_lines({"baseline": None, **more}) == []


def test_without_an_attack_only_the_clean_accuracy_is_compared():
    results = {
        "baseline": {"clean_accuracy": 0.5},
        "robust_accuracy_attack": None,
        "comparison": {"clean_accuracy": compared(0.1, 0.05, 0.15, 0.001), "robust_accuracy": None},
    }
    assert len(comparison_lines(results)) == 1


def test_the_attack_is_named_by_the_iterate_that_it_keeps():
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.01, steps=20)
    assert attack_name(attack) == "PGD-20 (highest-loss iterate)"
    assert attack_in_words(ATTACK) == "PGD-20 (highest-loss iterate), l2 0.5"
    older = {name: value for name, value in ATTACK.items() if name != "name"}
    assert attack_in_words(older) == attack_in_words(ATTACK)
