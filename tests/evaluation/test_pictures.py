"""The choice of the images on the sheet of examples."""

import numpy as np

from robust_tf.evaluation.pictures import drawn_examples, kept_examples
from robust_tf.evaluation.robustness import Robustness
from robust_tf.evaluation.subject import Images

# 40 images of 4 classes in the order of a folder. Every fifth is misclassified without an attack.
LABELS = np.repeat(np.arange(4), 10)
CORRECT = np.arange(40) % 5 != 0


def result_of(felled_by: np.ndarray, kept: np.ndarray) -> Robustness:
    at = {"": -1.0, "clean": 0.0, "pgd": 0.5}
    return Robustness(
        attack="pgd",
        norm="l2",
        epsilon=0.5,
        felled_by=tuple(felled_by),
        felled_at=tuple(at[name] for name in felled_by),
        predictions=(0,) * 40,
        warnings={},
        kept={100 + int(position): np.zeros((2, 2, 3), np.float32) for position in kept},
    )


def test_the_sheet_shows_all_classes_and_all_outcomes():
    kept = kept_examples(LABELS, CORRECT, count=8)
    assert len(kept) == 16 and np.all(CORRECT[kept])
    np.testing.assert_array_equal(np.bincount(LABELS[kept]), 4)
    felled_by = np.where(CORRECT, np.where(np.arange(40) % 2 == 0, "pgd", ""), "clean")
    images = Images(100 + np.arange(40), np.zeros((40, 2, 2, 3), np.float32), LABELS)
    drawn = drawn_examples(images, result_of(felled_by, kept), count=8)
    assert [felled_by[position] for position in drawn] == ["pgd"] * 3 + [""] * 3 + ["clean"] * 2
    np.testing.assert_array_equal(np.bincount(LABELS[drawn]), 2)
    assert set(drawn[:6]) <= set(kept)  # the adversarial images of the others were not kept


def test_the_sheet_is_filled_if_an_outcome_does_not_occur():
    nothing_fell = np.full(40, "")
    images = Images(100 + np.arange(40), np.zeros((40, 2, 2, 3), np.float32), LABELS)
    kept = kept_examples(LABELS, np.ones(40, bool), count=6)
    drawn = drawn_examples(images, result_of(nothing_fell, kept), count=6)
    assert len(drawn) == 6 and sorted(set(LABELS[drawn])) == [0, 1, 2, 3]
    assert drawn_examples(images, result_of(nothing_fell, kept[:2]), count=6) == sorted(kept[:2].tolist())
    assert drawn_examples(images, result_of(nothing_fell, kept[:0]), count=6) == []
