"""The statistics of a study: what is grouped, what is paired, and what the verdicts say."""

import dataclasses

import numpy as np
import pytest
from made_up_study import cell, study
from scipy import stats

from robust_tf.studies.analysis import analyze, answers, comparisons, validated_flags


def by_epsilon(group):
    return {place.epsilon: place for place in group.places}


def test_groups_differ_in_everything_but_epsilon_seed_and_draw():
    cells = study(
        epsilons=(0, 1),
        seeds=range(2),
        draws=range(2),
        examples_per_class=(5, 20, None),
        transfer_mode=("fixed_feature", "full_network"),
        downscale=("", "32"),
    )
    groups = analyze(cells)
    assert len(groups) == 12 and all(len(group.places) == 2 for group in groups)
    assert [group.key.examples_per_class for group in groups[:3]] == [5, 20, None]
    assert sum(len(place.cells) for group in groups for place in group.places) == len(cells)
    assert analyze(cells[::-1]) == groups or [g.key for g in analyze(cells[::-1])] == [g.key for g in groups]


def test_the_difference_is_paired_by_seed_and_draw():
    random = np.random.default_rng(0)
    level, shift = random.normal(0.7, 0.1, size=6), random.normal(0.02, 0.005, size=6)
    cells = [cell(0.0, seed, 3, level[seed]) for seed in range(6)]
    cells += [cell(1.0, seed, 3, level[seed] + shift[seed]) for seed in range(6)][::-1]
    (group,) = analyze(cells)
    difference = by_epsilon(group)[1.0].measures["accuracy"].difference
    assert difference.p_value == pytest.approx(stats.ttest_rel(level + shift, level).pvalue, rel=0.05)
    assert difference.verdict == "better" and difference.wins == 6
    assert by_epsilon(group)[0.0].measures["accuracy"].difference is None


def test_runs_without_a_partner_count_for_the_mean_but_not_for_the_difference():
    cells = [cell(0.0, seed, 0, 0.5) for seed in range(3)] + [cell(1.0, seed, 0, 0.6) for seed in range(1, 5)]
    place = by_epsilon(analyze(cells)[0])[1.0].measures["accuracy"]
    assert place.estimate.num_runs == 4 and place.difference.estimate.num_runs == 2
    alone = analyze([cell(1.0, 0, 0, 0.6)])[0].places[0].measures["accuracy"]
    assert alone.difference is None and alone.estimate.interval is None


def test_the_standard_source_belongs_to_both_norms():
    l2 = study(epsilons=(0, 1), seeds=range(3), draws=(0,))
    linf = [
        dataclasses.replace(each, source_norm="linf", cell=f"linf {each.cell}") for each in l2 if each.source_epsilon
    ]
    groups = analyze(l2 + linf)
    assert [group.key.source_norm for group in groups] == ["l2", "linf"]
    assert groups[0].standard.cells == groups[1].standard.cells
    own = [dataclasses.replace(each, source_norm="linf", cell=f"linf {each.cell}") for each in l2]
    assert [group.standard.cells[0].source_norm for group in analyze(l2 + own)] == ["l2", "linf"]
    standards = [each for each in l2 + own if each.source_epsilon == 0]
    assert [group.key.source_norm for group in analyze(standards)] == ["l2", "linf"]


def test_only_cells_that_validation_chose_count_and_their_axes_make_no_groups():
    cells = study(epsilons=(0, 1), seeds=range(3), draws=(0,), learning_rate=("0.1", "0.01"), weight_decay=("0", "1"))
    chosen = [
        dataclasses.replace(
            each, chosen=each.varied["learning_rate"] == ("0.1" if each.source_seed else "0.01"), cell=str(number)
        )
        for number, each in enumerate(cells)
    ]
    assert validated_flags(chosen) == {"learning_rate"}
    assert validated_flags(cells) == frozenset()
    groups = analyze(chosen)
    assert [group.key.varied for group in groups] == [(("weight_decay", "0"),), (("weight_decay", "1"),)]
    assert all(each.chosen for group in groups for place in group.places for each in place.cells)


def test_holm_makes_a_verdict_harder_the_more_epsilons_there_are():
    random = np.random.default_rng(0)
    base = random.normal(0.7, 0.01, size=5)
    shift = np.array([0.01, 0.035, 0.02, 0.002, 0.02])
    cells = [cell(0.0, seed, 0, base[seed]) for seed in range(5)]
    cells += [cell(1.0, seed, 0, base[seed] + shift[seed]) for seed in range(5)]
    nothing = [cell(2.0, seed, 0, base[seed] + 0.01 * (-1) ** seed) for seed in range(5)]
    alone = analyze(cells)[0].places[1].measures["accuracy"].difference
    beside = analyze(cells + nothing)[0].places[1].measures["accuracy"].difference
    assert alone.p_value == beside.p_value == alone.holm_p_value and beside.holm_p_value == 2 * alone.p_value
    assert alone.verdict == "better" and beside.verdict == "not decided by this many runs"
    # Two comparisons are open, so each has to pass half of the level.
    assert alone.clusters_to_decide is None
    assert beside.clusters_to_decide == beside.estimate.clusters_to_decide(0.025) > 5


def test_worse_sources_are_called_worse_and_robust_accuracies_are_compared_too():
    cells = study(epsilons=(0, 1), gain=-0.1)
    (group,) = analyze(cells)
    place = by_epsilon(group)[1]
    assert place.measures["accuracy"].difference.verdict == "worse"
    assert place.measures["robust_accuracy"].difference.verdict == "better"
    assert [each.place for each in comparisons([group], "robust_accuracy")] == [place]


def test_published_sources_without_seeds_are_clustered_by_draw():
    (group,) = analyze(study(epsilons=(0, 1), seeds=(None,), draws=range(6)))
    estimate = group.places[1].measures["accuracy"].difference.estimate
    assert estimate.cluster == "draw" and estimate.num_clusters == 6


def test_sources_of_unknown_epsilon_are_listed_but_not_compared():
    cells = study(epsilons=(0, 1), seeds=(None,)) + [
        dataclasses.replace(
            cell(None, None, draw, 0.5), source=name, cell=f"{name}{draw}", robust_norm="l2", robust_epsilon=0.5
        )
        for name in ("a.keras", "b.keras")
        for draw in range(2)
    ]
    (group,) = analyze(cells)
    assert [place.source for place in group.places] == ["", "", "a.keras", "b.keras"]
    assert len(comparisons([group])) == 1


def test_the_answer_takes_the_epsilon_that_validation_prefers_for_each_run():
    cells = []
    for seed in range(4):
        cells.append(cell(0.0, seed, 0, 0.70, validation_value=0.99))
        best = 1.0 if seed % 2 else 2.0
        for epsilon in (1.0, 2.0):
            value = 0.9 if epsilon == best else 0.8
            cells.append(cell(epsilon, seed, 0, 0.75 + seed / 100 - (value == 0.8) / 10, validation_value=value))
    (answer,) = answers(analyze(cells))
    assert answer.epsilon_from == "validation" and answer.num_groups == 1
    assert answer.difference.estimate.mean == pytest.approx(0.065)
    unknown = [dataclasses.replace(each, validation_value=None) for each in cells]
    (answer,) = answers(analyze(unknown))
    assert answer.epsilon_from == "mean" and answer.difference.estimate.mean == pytest.approx(0.015)
    (answer,) = answers(analyze([each for each in unknown if each.source_epsilon != 2.0]))
    assert answer.epsilon_from == "only"


def test_the_answer_averages_over_the_groups_of_a_mode_on_the_runs_that_they_share():
    few = study(epsilons=(0, 1), draws=range(2), gain=0.02, transfer_mode=("full_network",), examples_per_class=(5,))
    more = study(epsilons=(0, 1), draws=range(5), gain=0.08, transfer_mode=("full_network",), examples_per_class=(50,))
    fixed = study(epsilons=(0, 1), draws=range(5))
    groups = analyze(few + more + fixed)
    full, alone = answers(groups)[1], answers(groups)[0]
    assert (full.transfer_mode, alone.transfer_mode) == ("full_network", "fixed_feature")
    assert full.num_groups == 2 and full.difference.estimate.num_draws == 2 and full.difference.estimate.num_seeds == 5
    means = [
        np.mean([each.accuracy for each in group if each.source_epsilon == 1 and each.seed < 2])
        - np.mean([each.accuracy for each in group if each.source_epsilon == 0 and each.seed < 2])
        for group in (few, more)
    ]
    assert full.difference.estimate.mean == pytest.approx(np.mean(means))
    assert answers(analyze([each for each in fixed if each.source_epsilon])) == []
