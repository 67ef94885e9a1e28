"""Subsets have the right size, are balanced, and depend on the seed."""

import numpy as np
import pytest

from robust_tf.data.selection import balanced_subset, held_out
from robust_tf.errors import UserError
from robust_tf.flags import parse_amount

LABELS = np.repeat([0, 1, 2], [50, 30, 6])
EVERYTHING = np.ones(len(LABELS), bool)


@pytest.mark.parametrize(("text", "amount"), [("1000", 1000), ("0.1", 0.1), (".5", 0.5), ("1.0", 1.0), ("1", 1)])
def test_a_subset_is_a_number_or_a_share(text, amount):
    assert parse_amount(text) == amount and type(parse_amount(text)) is type(amount)


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "0.0", "10%", "ten", "1e3"])
def test_any_other_subset_is_refused_with_its_value(text):
    with pytest.raises(UserError, match=f"Received: '{text}'"):
        parse_amount(text)


@pytest.mark.parametrize(
    ("amount", "counts"), [(30, [12, 12, 6]), (0.5, [19, 18, 6]), (3, [1, 1, 1]), (86, [50, 30, 6]), (1.0, [50, 30, 6])]
)
def test_classes_are_as_equal_as_their_sizes_allow(amount, counts):
    chosen = balanced_subset(LABELS, EVERYTHING, amount, 0, "data")
    got = np.bincount(LABELS[chosen])
    assert sorted(got) == sorted(counts) and got[2] == counts[2]


def test_the_seed_chooses_examples_within_the_mask():
    mask = ~held_out(len(LABELS), 0.2)
    first, again, other = (balanced_subset(LABELS, mask, 20, seed, "data") for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not (first & ~mask).any()


@pytest.mark.parametrize("amount", [2, 87, 0.001])
def test_subsets_that_are_too_small_or_too_large_are_refused(amount):
    with pytest.raises(UserError, match=rf"3 to 86 training images. Received: subset={amount}"):
        balanced_subset(LABELS, EVERYTHING, amount, 0, "data")
