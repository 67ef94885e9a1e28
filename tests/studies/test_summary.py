"""summary.csv: one line for each group and epsilon, with the figures of the analysis."""

import csv

import pytest
from made_up_study import study

from robust_tf.studies.analysis import analyze
from robust_tf.studies.summary import write_summary


def test_each_place_is_a_line_with_its_figures(tmp_path):
    groups = analyze(study(examples_per_class=(5, 20), downscale=("", "32")))
    write_summary(tmp_path / "summary.csv", groups)
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(group.places) for group in groups) == 24
    for line, (group, place) in zip(lines, [(g, place) for g in groups for place in g.places], strict=True):
        assert int(line["examples_per_class"]) == group.key.examples_per_class
        assert line["downscale"] == dict(group.key.varied).get("downscale", "")
        assert float(line["source_epsilon"]) == place.epsilon
        for measure, measured in place.measures.items():
            assert float(line[measure]) == pytest.approx(measured.estimate.mean, rel=1e-5)
            assert float(line[f"{measure}_low"]) < float(line[measure]) < float(line[f"{measure}_high"])
            if difference := measured.difference:
                assert float(line[f"{measure}_difference"]) == pytest.approx(difference.estimate.mean, rel=1e-4)
                assert line[f"{measure}_verdict"] == difference.verdict
                assert int(line[f"{measure}_wins"]) == difference.wins
                assert float(line[f"{measure}_bootstrap_high"]) == pytest.approx(difference.bootstrap.high, rel=1e-4)
                assert float(line[f"{measure}_holm_p_value"]) == pytest.approx(difference.holm_p_value, rel=1e-4)
            else:
                assert line[f"{measure}_difference"] == line[f"{measure}_verdict"] == ""
    assert {line["clusters"] for line in lines} == {"source seeds"}


def test_what_was_not_measured_is_empty(tmp_path):
    cells = study(epsilons=(1.0,), seeds=(None,), draws=(0,))
    write_summary(tmp_path / "summary.csv", analyze(cells))
    with (tmp_path / "summary.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["clusters"] == "draws" and line["accuracy_low"] == line["accuracy_difference"] == ""
