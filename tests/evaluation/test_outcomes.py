"""The predictions that a job keeps, and the comparison of two jobs image by image."""

import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.evaluation.outcomes import Outcomes, compare_outcomes, read_outcomes
from robust_tf.statistics import paired_difference, paired_mean_per_class


def made_up(seed: int, *, count: int = 60, share: float = 0.7, attacked: bool = True) -> Outcomes:
    """Returns predictions for three classes, fewer of them right under attack. The labels do not depend on the seed."""
    labels = np.arange(count) % 3
    rng = np.random.default_rng(seed)
    predictions = np.where(rng.random(count) < share, labels, (labels + 1) % 3)
    predictions_adv = np.where(rng.random(count) < share, predictions, (labels + 2) % 3)
    return Outcomes(7 * np.arange(count), labels, predictions, predictions_adv if attacked else None)


@pytest.mark.parametrize("attacked", [True, False])
def test_what_is_written_is_read_back(tmp_path, attacked):
    written = made_up(0, attacked=attacked)
    written.write(tmp_path)
    read = read_outcomes(tmp_path)
    for name in ("ids", "labels", "predictions"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    if attacked:
        np.testing.assert_array_equal(read.predictions_adv, written.predictions_adv)
        np.testing.assert_array_equal(read.robust, written.robust)
    else:
        assert read.predictions_adv is None and read.robust is None


def test_an_image_that_is_misclassified_without_an_attack_is_not_robust():
    outcomes = Outcomes(np.arange(4), np.zeros(4, int), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert outcomes.right.tolist() == [True, True, False, False]
    assert outcomes.robust.tolist() == [True, False, False, False]
    assert outcomes.confusion(2).tolist() == [[2, 2], [0, 0]]


@pytest.mark.parametrize("content", ["", "id,label\n1,2\n", "id,label,prediction\n", "id,label,prediction\n1,2,x\n"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "predictions.csv").write_text(content)
    with pytest.raises(
        UserError, match=r"predictions\.csv is not what a training job writes.*Received: .*Delete the file"
    ):
        read_outcomes(tmp_path)


def figures(compared) -> tuple:
    return compared.difference, compared.interval, compared.p_value


def test_two_jobs_are_compared_image_by_image():
    ours, theirs = made_up(0, share=0.9), made_up(1, share=0.5)
    compared = compare_outcomes(ours, theirs, metric="accuracy")
    assert compared.mean_per_class_accuracy is None
    assert figures(compared.clean_accuracy) == figures(paired_difference(ours.right, theirs.right))
    assert figures(compared.robust_accuracy) == figures(paired_difference(ours.robust, theirs.robust))
    assert compared.clean_accuracy.difference == pytest.approx(ours.right.mean() - theirs.right.mean())


def test_the_mean_per_class_is_compared_where_it_is_the_metric():
    ours, theirs = made_up(0), made_up(1, attacked=False)
    compared = compare_outcomes(ours, theirs, metric="mean_per_class_accuracy")
    expected = paired_mean_per_class(ours.right, theirs.right, ours.labels)
    assert figures(compared.mean_per_class_accuracy) == figures(expected)
    assert compared.robust_accuracy is None  # one of the two was not attacked


def test_jobs_with_other_images_or_without_predictions_are_not_compared():
    ours = made_up(0)
    assert compare_outcomes(ours, None, metric="accuracy") is None
    assert compare_outcomes(ours, made_up(1, count=59), metric="accuracy") is None
    relabelled = Outcomes(ours.ids, (ours.labels + 1) % 3, ours.predictions, ours.predictions_adv)
    assert compare_outcomes(ours, relabelled, metric="accuracy") is None
