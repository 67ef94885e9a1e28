"""The examples in a report cover many classes and mistakes, in whatever order the test images come."""

from collections import Counter

import numpy as np

from robust_tf.evaluation.example_choice import PER_KIND, ExampleChoice


def looked_at(rows: list[tuple[int, int, int, int]], batch: int = 16) -> ExampleChoice:
    """Returns a choice that has seen all rows. The pixels of each image are the number of its row."""
    choice = ExampleChoice()
    for start in range(0, len(rows), batch):
        part = np.array(rows[start : start + batch])
        numbers = np.arange(start, start + len(part), dtype=np.float32)[:, None, None, None]
        choice.look_at(part, numbers * np.ones((1, 2, 2, 3)), -numbers * np.ones((1, 2, 2, 3)))
    return choice


def test_the_examples_are_spread_over_the_classes_of_sorted_images():
    rows = [(label, label, label, 1) for label in range(9) for _ in range(20)]
    examples = looked_at(rows).examples
    assert len(examples) == PER_KIND
    assert len({each.label for each in examples}) == PER_KIND


def test_each_example_has_its_own_pixels_and_predictions():
    rows = [(label, label, [label, 1 - label][number % 2], 1) for number in range(30) for label in (0, 1)]
    rows += [(0, 1, 1, 1)] * 10
    examples = looked_at(rows).examples
    assert Counter(each.kind for each in examples) == {"resists": PER_KIND, "falls": PER_KIND, "wrong": PER_KIND}
    for kind, of_label in (("resists", 3), ("falls", 3)):
        assert Counter(each.label for each in examples if each.kind == kind) == {0: of_label, 1: of_label}
    for each in examples:
        number = int(each.image[0, 0, 0])
        assert rows[number][:3] == (each.label, each.prediction, each.prediction_adv)
        np.testing.assert_array_equal(each.image_adv, -each.image)


def test_different_mistakes_are_preferred_within_a_class():
    rows = [(0, 1, 1, 1)] * 50 + [(0, 2, 2, 1), (0, 3, 3, 1), (0, 4, 3, 1)]
    examples = looked_at(rows).examples
    assert {each.prediction for each in examples} == {1, 2, 3, 4}


def test_images_that_only_fill_a_batch_are_left_out():
    assert looked_at([(0, 0, 0, 0)] * 20).examples == ()
    assert [each.label for each in looked_at([(0, 0, 0, 0), (1, 1, 1, 1)]).examples] == [1]
