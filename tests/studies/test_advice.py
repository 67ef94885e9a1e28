"""The advice: cheap probes rank sources as their features deserve, and a finished study tells how good that is."""

import numpy as np
import pytest
from made_up_study import study

from robust_tf import study as program
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.flags import to_flag_file
from robust_tf.models import build_classifier
from robust_tf.studies import advice
from robust_tf.studies.advice import Probed, Source, SourceKind, check_advice, cross_validated, rank_sources
from robust_tf.studies.analysis import analyze
from robust_tf.studies.records import write_cells
from robust_tf.studies.replication import replicate


def probed(epsilon, value, norm="l2"):
    kind = SourceKind("resnet20", norm if epsilon else "", epsilon, "digits", "0,1,2,3,4")
    return Probed(kind=kind, names=("",), estimate=replicate([value], [0], [0]))


def test_cross_validation_predicts_images_that_it_did_not_fit():
    random = np.random.default_rng(0)
    labels = random.integers(4, size=200)
    noise = cross_validated(random.normal(size=(200, 150)), labels, num_classes=4, metric="accuracy")
    assert len(noise) == 5 and all(0.1 < value < 0.42 for value in noise)
    weak = np.eye(4)[labels] + random.normal(size=(200, 4))
    signal = cross_validated(weak, labels, num_classes=4, metric="accuracy")
    assert min(signal) > 0.5
    assert cross_validated(weak, labels, num_classes=4, metric="accuracy") == signal


def test_the_folds_share_out_each_class():
    labels = np.repeat([0, 1, 2], [40, 8, 4])
    folds = advice._stratified_folds(labels, np.random.default_rng(0))
    for label, count in ((0, 10), (1, 2), (2, 1)):
        assert np.bincount(folds[labels == label]).tolist() == [count] * 4


@pytest.fixture
def job(tmp_path, data_dir):
    return JobConfig.from_flags(
        task="transfer",
        source="none.keras",
        classes=(0, 1, 2),
        image_size=8,
        data_dir=str(data_dir),
        cache_dir=str(tmp_path / "cache"),
        workdir=str(tmp_path / "job"),
    )


def source(folder, name, epsilon, *, blind):
    """Returns a source with random weights. A blind one sees nothing of the images."""
    classifier = build_classifier("resnet8", 10, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)
    if blind:
        for layer in classifier.layers:
            if layer.name.startswith("stem"):
                layer.set_weights([np.zeros_like(weight) for weight in layer.get_weights()])
    classifier.save(folder / f"{name}.keras")
    return Source(str(folder / f"{name}.keras"), SourceKind("resnet8", "l2" if epsilon else "", epsilon, "", ""), None)


@pytest.mark.slow
def test_a_source_that_sees_nothing_is_ranked_last(tmp_path, job):
    sources = [source(tmp_path, "blind", 1.0, blind=True), source(tmp_path, "seeing", 0.0, blind=False)]
    first, last = rank_sources(job, sources, repeats=3)
    assert (first.kind.epsilon, last.kind.epsilon) == (0.0, 1.0)
    assert first.estimate.mean > 0.8 and last.estimate.mean < 0.5
    assert first.behind is None and not last.may_be_best and last.behind.interval.low > 0.2
    table = advice.advice_table([first, last], "digits")
    assert list(table.columns[3].cells) == ["first choice", "worse"]
    assert "cross-validated" in table.title and "does not cover other images" in table.caption


@pytest.mark.slow
def test_a_finished_study_ranks_its_own_sources_and_checks_the_ranking(tmp_path, job, capsys):
    cells = study(epsilons=(0, 1.0), gain=-0.3, seeds=(3,), classes=("0,1,2",), source_architecture=("resnet8",))
    for epsilon in (0.0, 1.0):
        folder = tmp_path / "sources" / f"eps{epsilon}"
        folder.mkdir(parents=True)
        source(folder, "classifier", epsilon, blind=epsilon > 0)
        flags = f"--architecture=resnet8\n--epsilon={epsilon}\n--classes=0,1,2,3,4\n--seed=3\n"
        (folder / "flags.cfg").write_text(flags)
        (folder / "results.json").write_text("{}")
    for each in cells:
        (tmp_path / "cells" / each.cell).mkdir(parents=True)
        (tmp_path / "cells" / each.cell / "flags.cfg").write_text(to_flag_file(job.with_flags(examples_per_class=5)))
    found = advice.study_sources(tmp_path)
    assert [(each.kind.norm, each.kind.epsilon, each.seed) for each in found] == [("", 0.0, 3), ("l2", 1.0, 3)]
    assert {(each.kind.dataset, each.kind.classes) for each in found} == {("digits", "0,1,2,3,4")}
    checked = advice.advice_on_study(tmp_path, analyze(cells), repeats=2)
    assert (checked.hits, checked.groups) == (1, 1)
    write_cells(tmp_path / "cells.csv", cells)
    program.main(["study", "--advise", f"--workdir={tmp_path}"])
    assert "in 1 of 1 groups of the study" in " ".join(capsys.readouterr().out.split())


def test_advice_needs_a_data_set_or_a_finished_study(tmp_path):
    with pytest.raises(UserError, match=r"Received: no --dataset, and --workdir=.* without cells\.csv"):
        program.main(["study", "--advise", f"--workdir={tmp_path}"])


def test_without_sources_the_error_says_what_to_do(job):
    with pytest.raises(UserError, match="Received: none. Name a study"):
        rank_sources(job, [])


def test_without_a_study_the_published_sources_are_ranked(monkeypatch, tmp_path, job):
    found = []
    monkeypatch.setattr(advice, "rank_sources", lambda job, sources: found.extend(sources) or [])
    advice.advise(job, tmp_path)
    assert {each.name for each in found} >= {"resnet20_fashion_mnist_l2_eps0", "resnet20_fashion_mnist_l2_eps1"}


def test_the_check_counts_how_often_the_first_choice_is_as_good_as_the_best():
    groups = analyze(study(epsilons=(0, 1.0), gain=0.3, examples_per_class=(5, 20)))
    task = ("digits", "5,6,7,8,9")
    right = check_advice(groups, {task: [probed(1.0, 0.9), probed(0, 0.8)]})
    wrong = check_advice(groups, {task: [probed(0, 0.9), probed(1.0, 0.8)]})
    assert (right.hits, right.groups, wrong.hits) == (2, 2, 0)
    assert right.by_chance == wrong.by_chance == 1.0
    assert [(choice.epsilon, best.epsilon) for _, choice, best in wrong.misses] == [(0, 1.0), (0, 1.0)]
    assert "in 2 of 2 groups" in right.in_words and "1.0 of them" in right.in_words


def test_the_check_leaves_out_sources_and_data_sets_that_a_group_does_not_have():
    groups = analyze(study(epsilons=(0, 1.0), gain=0.3))
    task = ("digits", "5,6,7,8,9")
    others = [probed(7.0, 0.99), probed(1.0, 0.98, norm="linf")]
    assert check_advice(groups, {task: [*others, probed(1.0, 0.9)]}).hits == 1
    assert check_advice(groups, {("pets", ""): [probed(1.0, 0.9)]}).groups == 0
    assert check_advice(groups, {task: others}).groups == 0
