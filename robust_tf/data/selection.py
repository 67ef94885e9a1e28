"""The choice of the examples that a task uses, as boolean masks over the numbered examples of a part."""

from collections.abc import Sequence

import numpy as np

from robust_tf.data.records import LabeledImages, check_classes_present, check_labels
from robust_tf.errors import UserError
from robust_tf.flags import parse_amount

# A fixed number and not the seed of the job, so that every run on a data set holds out the same images.
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
    """Returns the masks of the training, validation and test examples.

    Args:
        images: Data set to choose from.
        name: Name of the data set, for messages.
        broken: Numbers of the examples to leave out of `images.train` (key "train") and `images.test` (key "test").
        classes: Labels to keep. None keeps all.
        validation_fraction: Share of the training part that is held out, in (0, 1), unless the data set itself defines
            a validation part.
        examples_per_class: Number of training examples to keep of each class. None keeps all.
        subset: Number ("1000") or share ("0.1") of the training examples to keep, balanced over the classes. ""
            keeps all.
        seed: Seed for the choice of the training examples.

    Returns:
        The masks of the training and validation examples, both (images.train.num_examples,) bool, and the mask of the
        test examples, (images.test.num_examples,) bool.

    Raises:
        UserError: If a part is empty or lacks a class, or if a label belongs to no class.
    """
    names, num_pool = images.class_names, images.train.num_examples
    validation = held_out(num_pool, validation_fraction) if images.validation is None else images.validation.copy()
    train, test = ~validation, np.ones(images.test.num_examples, bool)
    for mask, part in ((train, "train"), (validation, "train"), (test, "test")):
        mask[broken[part]] = False
    if images.label_kind != "classes":
        if subset:
            train = random_subset(train, parse_amount(subset), seed, name)
    elif classes is not None or examples_per_class is not None or subset or not images.trusted:
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
                f"The {part} part of {name!r} must not be empty. Received: classes={classes}, "
                f"validation_fraction={validation_fraction}, and {num_pool} training examples in all."
            )
    return train, validation, test


def held_out(num_examples: int, fraction: float) -> np.ndarray:
    """Returns a mask that is true for the validation examples, the same in every run.

    Args:
        num_examples: Number of training and validation examples together.
        fraction: Share of the validation examples, in (0, 1). At least one example is held out.

    Returns:
        (num_examples,) bool.
    """
    mask = np.zeros(num_examples, bool)
    count = max(1, round(fraction * num_examples))
    mask[np.random.default_rng(_VALIDATION_SEED).permutation(num_examples)[:count]] = True
    return mask


def checked_classes(classes: Sequence[int], num_classes: int, name: str) -> Sequence[int]:
    """Returns `classes` unchanged if they are two or more different labels of the data set.

    Args:
        classes: Labels to keep.
        num_classes: Number of classes of the data set.
        name: Name of the data set, for the message.

    Raises:
        UserError: If a label is out of range or occurs twice, or if there is only one.
    """
    wrong = [label for label in classes if not 0 <= label < num_classes]
    if wrong:
        raise UserError(
            f"classes must be labels of {name}, 0 to {num_classes - 1}. Received: {wrong} in classes={list(classes)}."
        )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"classes must be two or more different labels. Received: classes={list(classes)}.")
    return classes


def few_of_each_class(labels: np.ndarray, mask: np.ndarray, count: int, seed: int, name: str) -> np.ndarray:
    """Returns `mask` reduced to the same number of examples of each class.

    Args:
        labels: Labels of the whole part, (num_examples,) int.
        mask: Examples to choose from, (num_examples,) bool.
        count: Number of examples to keep of each class.
        seed: Seed for the choice.
        name: Name of the data set, for the message.

    Returns:
        (num_examples,) bool.

    Raises:
        UserError: If a class has fewer examples.
    """
    for label, available in zip(*np.unique(labels[mask], return_counts=True), strict=True):
        if available < count:
            raise UserError(
                f"examples_per_class must be at most the number of training images of each class of {name}. Received: "
                f"examples_per_class={count}, and {available} images of class {label} without the validation part."
            )
    return _chosen(labels, mask, {label: count for label in np.unique(labels[mask])}, seed)


def balanced_subset(labels: np.ndarray, mask: np.ndarray, amount: int | float, seed: int, name: str) -> np.ndarray:
    """Returns `mask` reduced to a given number of examples, taken from all classes as evenly as possible.

    Args:
        labels: Labels of the whole part, (num_examples,) int.
        mask: Examples to choose from, (num_examples,) bool.
        amount: Number of examples to keep (int), or their share in (0, 1] (float).
        seed: Seed for the choice.
        name: Name of the data set, for the message.

    Returns:
        (num_examples,) bool.

    Raises:
        UserError: If there are fewer examples than `amount`, or if a class would be left without one.
    """
    classes, available = np.unique(labels[mask], return_counts=True)
    total = amount if isinstance(amount, int) else round(amount * int(available.sum()))
    if not len(classes) <= total <= available.sum():
        raise UserError(
            f"subset must keep at least one image of each class: of {name}, {len(classes)} to {available.sum()} "
            f"training images. Received: subset={amount}, which keeps {total}."
        )
    counts = np.zeros_like(available)
    # In every round, one example is taken from each class that has any left. The order of the classes is random.
    turn = np.random.default_rng(seed).permutation(len(classes))
    level = 0
    while counts.sum() < total:
        level += 1
        willing = [position for position in turn if available[position] >= level]
        counts[willing[: total - counts.sum()]] += 1
    return _chosen(labels, mask, dict(zip(classes, counts, strict=True)), seed)


def random_subset(mask: np.ndarray, amount: int | float, seed: int, name: str) -> np.ndarray:
    """Returns `mask` reduced to a given number of examples, chosen at random.

    Args:
        mask: Examples to choose from, (num_examples,) bool.
        amount: Number of examples to keep (int), or their share in (0, 1] (float).
        seed: Seed for the choice.
        name: Name of the data set, for the message.

    Returns:
        (num_examples,) bool.

    Raises:
        UserError: If there are fewer examples than `amount`, or if none would be left.
    """
    available = np.flatnonzero(mask)
    total = amount if isinstance(amount, int) else round(amount * len(available))
    if not 1 <= total <= len(available):
        raise UserError(
            f"subset must keep 1 to {len(available)} training images of {name}. Received: subset={amount}, which keeps "
            f"{total}."
        )
    chosen = np.zeros_like(mask)
    chosen[np.random.default_rng(seed).permutation(available)[:total]] = True
    return chosen


def _chosen(labels: np.ndarray, mask: np.ndarray, counts: dict[int, int], seed: int) -> np.ndarray:
    chosen = np.zeros_like(mask)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[mask[order]]
    for label, count in counts.items():
        chosen[order[labels[order] == label][:count]] = True
    return chosen
