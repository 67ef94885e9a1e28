"""Square Attack, a random search without gradients (Andriushchenko et al. 2020, arXiv 1912.00049)."""

import functools
from collections.abc import Callable
from typing import TypeAlias, cast

import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch
from robust_tf.attacks.loops import State, in_graph, repeat, repeat_while_resisting, select_images
from robust_tf.attacks.losses import Model, is_correct, logits_of, margin_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in, uniform
from robust_tf.attacks.threat_models import NORMS, Scale
from robust_tf.config.names import AttackNorm

# The norms that the attack has patches for. To add patches for another norm, extend `_patch`, `_lengths` and
# `_into_ball`, or write a proposal and a start like the ones for linf.
SQUARE_NORMS = ("linf", "l2", "l1")

_FIRST_SHARE = 0.8  # p: share of the image that the first squares cover
# Numbers of queries after which the share is halved (section 5 of the paper, which makes 10,000 queries).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: AttackNorm,
    epsilon: float | tf.Tensor,
    queries: int = 5000,
    restarts: int = 1,
    early_stop: bool = True,
    seed: Seed = 0,
) -> tf.Tensor:
    """Returns adversarial examples found by the Square Attack, a random search that needs no gradients.

    Square changes one square patch at a time and keeps the change if it lowers the margin, which is the label's logit
    minus the best other logit. Because it needs nothing but logits, it also works on models that have no gradients or
    hide them. If it beats the gradient attacks, the model's gradients are probably masked.

    The function runs eagerly and inside `tf.function`. An eager call traces a new graph each time, so wrap the call in
    a `tf.function` if there are many batches.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        norm: Norm of the ball, "linf", "l2" or "l1".
        epsilon: Radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
        queries: Number of patches tried for each image in each run. Their sizes do not depend on this number, as in
            AutoAttack.
        restarts: Number of runs. Each image keeps the result with the smallest margin.
        early_stop: Whether an image stops at its first wrong prediction and leaves the batch.
        seed: Seed for the patches: an integer, or (batch, 2) integers with a pair for each image.

    Returns:
        images_adv (batch, height, width, channels) float32, in the ball and in [0, 1]: the point with the
        smallest margin found for each image, including the image itself.

    Raises:
        UserError: An argument is out of range, or the model does not return one number for each class. In an eager call
            also: the images are not in [0, 1], or a label is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Warns:
        AttackWarning: In an eager call, the outputs seem to be probabilities, or the images seem to be in another unit.

    Source: Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; for the patches in l1 Croce and Hein 2021,
    arXiv 2103.01208.

    Example:
        A model classifies one image as dark and one as bright, and both change their class within epsilon:

        >>> import tensorflow as tf
        >>> from robust_tf.attacks import square
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = tf.stack([tf.fill([8, 8, 3], 0.45), tf.fill([8, 8, 3], 0.55)])
        >>> labels = tf.constant([0, 1])
        >>> images_adv = square(dark_or_bright, images, labels, norm="linf", epsilon=0.2, queries=100)
        >>> tf.argmax(dark_or_bright(images_adv), axis=1).numpy().tolist()
        [1, 0]
    """
    check_threat_model(norm, epsilon, SQUARE_NORMS)
    check_at_least(1, queries=queries, restarts=restarts)
    model, images, labels = checked_batch(model, images, labels)
    clean = logits_of(model, images)
    height, width, channels = images.shape[1:]
    sizes = _sizes(queries, height, width, smallest=1 if norm == "linf" else 3)
    seeds = as_seeds(seed, tf.shape(images)[0])
    propose, start_of = (
        (_linf_proposal, _stripes) if norm == "linf" else (_patch_proposal(norm, sizes), _patch_start(norm))
    )

    # In each run, evaluation 0 is the start, and each of the others tries one patch.
    def step(i: tf.Tensor, state: State) -> State:
        run, query = i // (queries + 1), i % (queries + 1)

        def start() -> tf.Tensor:
            return start_of(state["images"], epsilon, fold_in(state["seeds"], 1 + run))

        def change() -> tf.Tensor:
            numbers = tf.gather(state["numbers"], run * queries + query - 1, axis=1)
            return propose(state["images"], state["points"], epsilon, tf.gather(sizes, query - 1), numbers)

        points = tf.cond(query > 0, change, start)
        logits = logits_of(model, points)
        margin = margin_of(logits, state["labels"])
        wrong = ~is_correct(logits, state["labels"])
        first = tf.equal(query, 0)
        accepted = first | (margin < state["margin"]) | wrong
        worse = (margin < state["worst_margin"]) | (wrong & ~state["fallen"])
        return {
            **state,
            "points": select_images(accepted, points, state["points"]),
            "margin": tf.where(accepted, margin, state["margin"]),
            "images_adv": select_images(worse, points, state["images_adv"]),
            "worst_margin": tf.where(worse, margin, state["worst_margin"]),
            "fallen": state["fallen"] | wrong,
        }

    margin = margin_of(clean, labels)
    state = {
        "images": images,
        "labels": labels,
        "seeds": seeds,
        # Drawn all at once, because a draw for each image in each query would take longer than running a small network.
        "numbers": uniform(seeds, (restarts * queries, 5 + channels)),
        "points": images,
        "margin": margin,
        "images_adv": images,
        "worst_margin": margin,
        "fallen": ~is_correct(clean, labels),
    }
    loop = repeat_while_resisting if early_stop else repeat
    return tf.stop_gradient(in_graph(loop, step, state, (queries + 1) * restarts)["images_adv"])


def _sizes(queries: int, height: int, width: int, *, smallest: int) -> np.ndarray:
    """Returns the side of the square at each query, (queries,) int32; odd for patches, which are at least 3 wide."""
    shares = _FIRST_SHARE / 2.0 ** np.searchsorted(_HALVINGS, np.arange(queries))
    sizes = np.maximum(np.round(np.sqrt(shares * height * width)).astype(int), smallest)
    if smallest > 1:
        sizes += 1 - sizes % 2
    return cast(np.ndarray, np.minimum(sizes, min(height, width)).astype(np.int32))


def _signs(numbers: tf.Tensor) -> tf.Tensor:
    """Turns numbers in [0, 1) into -1 or 1."""
    return 2.0 * tf.cast(numbers >= 0.5, tf.float32) - 1.0


def _corner(numbers: tf.Tensor, size: tf.Tensor, length: int) -> tf.Tensor:
    """Returns the first row or column of a square that lies inside the image, (batch,) int32."""
    return tf.cast(numbers * tf.cast(length - size + 1, tf.float32), tf.int32)


def _square_mask(top: tf.Tensor, left: tf.Tensor, size: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Returns 1 inside the square and 0 elsewhere, (batch, height, width, 1) float32."""
    rows, columns = tf.range(height)[None] - top[:, None], tf.range(width)[None] - left[:, None]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return tf.cast(inside, tf.float32)[..., None]


def _stripes(images: tf.Tensor, epsilon: Scale, seeds: tf.Tensor) -> tf.Tensor:
    """Adds vertical stripes of +-epsilon, one pixel wide (section 3.2)."""
    _, _, width, channels = images.shape
    return tf.clip_by_value(images + epsilon * _signs(uniform(seeds, (1, width, channels))), 0.0, 1.0)


def _linf_proposal(
    images: tf.Tensor, points: tf.Tensor, epsilon: Scale, size: tf.Tensor, numbers: tf.Tensor
) -> tf.Tensor:
    """Moves each channel in a square by 2 epsilon up or down, then projects into the ball (algorithm 2)."""
    _, height, width, _ = images.shape
    mask = _square_mask(_corner(numbers[:, 0], size, height), _corner(numbers[:, 1], size, width), size, height, width)
    change = 2.0 * epsilon * _signs(numbers[:, None, None, 5:])
    return NORMS["linf"].project(points + mask * change, images, epsilon)


def _mountain(height: int, width: int, power: int) -> np.ndarray:
    """Returns concentric rectangles in an array (height, width), the k-th with weight 1 / k^power (equation (2))."""
    result = np.zeros((height, width), np.float32)
    middle_row, middle_column = height // 2, width // 2
    for k in range(max(middle_row, middle_column) + 1):
        rows = slice(max(middle_row - k, 0), middle_row + k + 1)
        columns = slice(max(middle_column - k, 0), middle_column + k + 1)
        result[rows, columns] += 1.0 / (k + 1) ** power
    return result


@functools.cache
def _patch(size: int, norm: str) -> np.ndarray:
    """Returns a patch of norm 1. One half is positive, the other negative, both of equal norm (algorithm 3)."""
    power = 2 if norm == "l2" else 4

    def length(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values).sum()) if norm == "l2" else np.abs(values).sum())

    halves = []
    for sign, rows in ((1.0, size // 2), (-1.0, size - size // 2)):
        if rows:
            half = _mountain(rows, size, power)
            halves.append(sign * half / length(half))
    patch = np.concatenate(halves)
    return (patch / length(patch)).astype(np.float32)


def _lengths(norm: str, values: tf.Tensor) -> tf.Tensor:
    """Returns the norm of each channel of each image, (batch, 1, 1, channels)."""
    if norm == "l2":
        return tf.sqrt(tf.reduce_sum(tf.square(values), axis=(1, 2), keepdims=True))
    return tf.reduce_sum(tf.abs(values), axis=(1, 2), keepdims=True)


def _into_ball(norm: str, images: tf.Tensor, perturbation: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    """Scales a perturbation to the sphere and clips to [0, 1] (l2), or projects it onto the ball within [0, 1] (l1)."""
    if norm == "l2":
        perturbation = epsilon * perturbation / (NORMS["l2"].length(perturbation) + 1e-12)
    return NORMS[norm].project(images + perturbation, images, epsilon)


_Start: TypeAlias = Callable[[tf.Tensor, Scale, tf.Tensor], tf.Tensor]
_Proposal: TypeAlias = Callable[[tf.Tensor, tf.Tensor, Scale, tf.Tensor, tf.Tensor], tf.Tensor]


def _patch_start(norm: str) -> _Start:
    """Returns a start with a grid of patches, 5 in a row, each with a random sign for each channel."""

    def start(images: tf.Tensor, epsilon: Scale, seeds: tf.Tensor) -> tf.Tensor:
        _, height, width, channels = images.shape
        size = max(min(height, width) // 5, 1)
        rows, columns = -(-height // size), -(-width // size)
        numbers = uniform(seeds, (rows, 1, columns, 1, channels + 1))
        patch = tf.constant(_patch(size, norm))
        upright, turned = patch[None, None, :, None, :, None], tf.transpose(patch)[None, None, :, None, :, None]
        patches = tf.where(numbers[..., :1] < 0.5, upright, turned) * _signs(numbers[..., 1:])
        grid = tf.reshape(patches, (-1, rows * size, columns * size, channels))[:, :height, :width]
        return _into_ball(norm, images, grid, epsilon)

    return start


def _patch_proposal(norm: str, sizes: np.ndarray) -> _Proposal:
    """Returns the proposal of algorithm 3.

    It adds a patch in one square. To stay in the ball, it clears a second square, and gives the patch the norm that
    this sets free, together with the part of epsilon that is not used yet.
    """
    distinct = np.unique(sizes)
    largest = distinct.max()
    patches = np.zeros((len(distinct), largest, largest), np.float32)
    for number, size in enumerate(distinct):
        patches[number, :size, :size] = _patch(int(size), norm)

    def placed(patch: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: tf.Tensor, shape: list[int]) -> tf.Tensor:
        """Returns the patch at its place, (batch, height, width); the values outside of the square have no meaning."""
        rows = tf.clip_by_value(tf.range(shape[0])[None] - top[:, None], 0, size - 1)
        columns = tf.clip_by_value(tf.range(shape[1])[None] - left[:, None], 0, size - 1)
        return tf.gather(tf.gather(patch, rows), columns, axis=2, batch_dims=1)

    def propose(images: tf.Tensor, points: tf.Tensor, epsilon: Scale, size: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        _, height, width, channels = images.shape
        top, left = _corner(numbers[:, 0], size, height), _corner(numbers[:, 1], size, width)
        here = _square_mask(top, left, size, height, width)
        there_top, there_left = _corner(numbers[:, 2], size, height), _corner(numbers[:, 3], size, width)
        there = _square_mask(there_top, there_left, size, height, width)
        patch = tf.gather(patches, tf.searchsorted(distinct, [size])[0])
        shape = [height, width]
        pattern = tf.where(
            numbers[:, 4, None, None] < 0.5,
            placed(patch, top, left, size, shape),
            placed(tf.transpose(patch), top, left, size, shape),
        )
        perturbation = points - images
        old = perturbation * here
        new = here * pattern[..., None] * _signs(numbers[:, None, None, 5:])
        new += old / (_lengths(norm, old) + 1e-12)
        new /= _lengths(norm, new) + 1e-12
        given = _lengths(norm, perturbation * tf.maximum(here, there))
        whole = NORMS[norm].length(perturbation)
        if norm == "l2":
            unused = tf.maximum(epsilon**2 - whole**2, 0.0)
            new *= tf.sqrt(unused / channels + given**2)
        else:
            new *= (tf.maximum(epsilon - whole, 0.0) / channels + given) * channels
        changed = new + perturbation * (1.0 - tf.maximum(here, there))
        return _into_ball(norm, images, changed, epsilon)

    return propose
