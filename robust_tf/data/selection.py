"""Which examples of a data set a task uses, as boolean masks over the numbered examples of a part."""

from collections.abc import Sequence

import numpy as np

from robust_tf.data.records import LabeledImages, check_classes_present, check_labels
from robust_tf.errors import UserError
from robust_tf.flags import parse_amount

# Not the job's seed: every run on a data set must hold out the same images.
_VALIDATION_SEED = 20_200_716


def part_masks(
    images: LabeledImages,
    name: str,
    *,
    broken: dict[str, np.ndarray],
    classes: Sequence[int] | None,
    validation_fraction: float,
    examples_per_class: int | None,
    subset: str,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which examples train, validate (both of `images.train`) and test, bool.

    Args:
        images: the data set called `name`.
        broken: numbers of the examples to leave out of "train" and "test".

    The others are those of `load_task`.

    Raises:
        UserError: a part is empty or lacks a class, or labels are wrong.
    """
    names, num_pool = images.class_names, images.train.num_examples
    validation = held_out(num_pool, validation_fraction) if images.validation is None else images.validation.copy()
    train, test = ~validation, np.ones(images.test.num_examples, bool)
    for mask, part in ((train, "train"), (validation, "train"), (test, "test")):
        mask[broken[part]] = False
    if classes is not None or examples_per_class is not None or subset or not images.trusted:
        labels, test_labels = images.train.labels(), images.test.labels()
        check_labels(labels, images.train, names, name=name)
        check_labels(test_labels, images.test, names, name=name)
        in_use = classes or range(len(names))
        for mask, part_labels in ((train, labels), (validation, labels), (test, test_labels)):
            mask &= np.isin(part_labels, in_use)
        check_classes_present(labels[train], in_use, names, where=f"the training part of {name}")
        check_classes_present(test_labels[test], in_use, names, where=f"the test part of {name}")
        if examples_per_class is not None:
            train = few_of_each_class(labels, train, examples_per_class, seed, name)
        if subset:
            train = balanced_subset(labels, train, parse_amount(subset), seed, name)
    for part, mask in (("training", train), ("validation", validation), ("test", test)):
        if not mask.any():
            raise UserError(
                f"The {part} part of {name!r} is empty. Received: classes={classes}, "
                f"validation_fraction={validation_fraction}, {num_pool} training examples in all."
            )
    return train, validation, test


def held_out(num_examples: int, fraction: float) -> np.ndarray:
    """(num_examples,) bool, true for the validation part."""
    mask = np.zeros(num_examples, bool)
    count = max(1, round(fraction * num_examples))
    mask[np.random.default_rng(_VALIDATION_SEED).permutation(num_examples)[:count]] = True
    return mask


def checked_classes(classes: Sequence[int], num_classes: int, name: str) -> Sequence[int]:
    """`classes` themselves.

    Raises:
        UserError: not two or more different labels of the data set.
    """
    wrong = [label for label in classes if not 0 <= label < num_classes]
    if wrong:
        raise UserError(
            f"--classes must be labels of {name}, 0 to {num_classes - 1}. Received: {wrong} in {list(classes)}."
        )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"--classes must be two or more different labels. Received: {list(classes)}.")
    return classes


def few_of_each_class(labels: np.ndarray, mask: np.ndarray, count: int, seed: int, name: str) -> np.ndarray:
    """`mask` reduced to `count` examples of each class, chosen by `seed`.

    Raises:
        UserError: a class has fewer.
    """
    for label, available in zip(*np.unique(labels[mask], return_counts=True), strict=True):
        if available < count:
            raise UserError(
                f"--examples_per_class={count} is more than {name} has: class {label} has {available} training "
                "examples besides the validation part."
            )
    return _chosen(labels, mask, {label: count for label in np.unique(labels[mask])}, seed)


def balanced_subset(labels: np.ndarray, mask: np.ndarray, amount: int | float, seed: int, name: str) -> np.ndarray:
    """`mask` reduced to so many examples, chosen by `seed`, as equally from all classes as these have examples.

    Args:
        labels: (num_examples,) of the whole part.
        mask: (num_examples,) bool, what to choose from.
        amount: a number of examples, or (float) a share of them in (0, 1].
        seed: of the choice.
        name: of the data set, for the message.

    Raises:
        UserError: more than there are, or fewer than one for each class.
    """
    classes, available = np.unique(labels[mask], return_counts=True)
    total = amount if isinstance(amount, int) else round(amount * int(available.sum()))
    if not len(classes) <= total <= available.sum():
        raise UserError(
            f"--subset must leave at least one image of each class: of {name}, {len(classes)} to {available.sum()} "
            f"training images. Received: {amount}, which are {total}."
        )
    counts = np.zeros_like(available)
    # Round by round each class gives one more, until it has no more; which classes come first is drawn.
    turn = np.random.default_rng(seed).permutation(len(classes))
    level = 0
    while counts.sum() < total:
        level += 1
        willing = [position for position in turn if available[position] >= level]
        counts[willing[: total - counts.sum()]] += 1
    return _chosen(labels, mask, dict(zip(classes, counts, strict=True)), seed)


def _chosen(labels: np.ndarray, mask: np.ndarray, counts: dict[int, int], seed: int) -> np.ndarray:
    chosen = np.zeros_like(mask)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[mask[order]]
    for label, count in counts.items():
        chosen[order[labels[order] == label][:count]] = True
    return chosen
