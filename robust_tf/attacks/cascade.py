"""A cascade of attacks, each on the images that still resist, which can be interrupted and continued."""

import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_tf.attacks.cascade_state import CLEAN, CascadeState
from robust_tf.attacks.checks import (
    check_at_least,
    check_images,
    check_labels,
    check_logits,
    check_threat_model,
    flat_labels,
)
from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.losses import Model
from robust_tf.attacks.seeds import image_seeds
from robust_tf.attacks.table import ATTACKS, check_attacks
from robust_tf.attacks.warning_flags import find_warnings, square_beats_the_others
from robust_tf.errors import UserError


def cascade(
    model: Model | CompiledAttacks,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    attacks: Sequence[str],
    norm: str,
    epsilon: float,
    batch_size: int = 128,
    seed: int = 0,
    state: CascadeState | None = None,
    image_ids: Sequence[int] | None = None,
    keep: Collection[int] = (),
    randomized: bool = False,
) -> Iterator[CascadeState]:
    """Runs attacks one after the other, each on the images that still resist, and yields the state after each batch.

    Images whose clean prediction is already wrong are not attacked. Random numbers depend on the seed, the attack and
    the image's id, but not on the batch or on what ran before, so a run that was interrupted and continued ends with
    the same result.

    Args:
        model: Callable from images in [0, 1] to logits (batch, classes), or its `CompiledAttacks` for this norm, so
            that the attacks are not traced again for another radius.
        images: Float images (num_images, height, width, channels) in [0, 1].
        labels: Integer labels, (num_images,) or (num_images, 1).
        attacks: Names in `ATTACKS`, in the order in which they run.
        norm: Norm of the ball, "linf", "l2" or "l1".
        epsilon: Radius of the ball, in [0, 1] pixel units.
        batch_size: Largest number of images in a batch. Long attacks get fewer, see `CompiledAttacks.images_at_once`.
        seed: Seed for all random numbers.
        state: State of an interrupted run with the same arguments, from which to continue.
        image_ids: Numbers of the images in their data set, (num_images,) integers. The random numbers depend on them,
            and `keep` refers to them. None means 0, 1, 2, ...
        keep: Ids of the images whose last adversarial image the state keeps.
        randomized: Whether the model is known to be random. If it is, there is no warning about it.

    Yields:
        The state after each batch of each attack. The last one is `done`. If `state` is already done, it is the only
        one.

    Raises:
        UserError: An argument is out of range, the state belongs to another run, or the model returns NaN.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import cascade
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images, labels = np.full((4, 8, 8, 3), 0.45, np.float32), np.array([0, 0, 0, 1])
        >>> for state in cascade(dark_or_bright, images, labels, attacks=["fgsm"], norm="linf", epsilon=0.1):
        ...     print(state.attack, state.robust_accuracy, state.felled_by)
        1 0.75 ('', '', '', 'clean')
        2 0.0 ('fgsm', 'fgsm', 'fgsm', 'clean')
    """
    compiled = model if isinstance(model, CompiledAttacks) else CompiledAttacks(model, norm)
    images, labels = np.asarray(images), np.asarray(labels)
    ids = np.arange(len(images)) if image_ids is None else np.asarray(image_ids)
    _check_arguments(compiled, images, ids, attacks=attacks, norm=norm, epsilon=epsilon, batch_size=batch_size)
    images = images.astype(np.float32, copy=False)
    logits = compiled.logits(images[:1])
    labels = flat_labels(labels)
    check_labels(labels, num_images=len(images), num_classes=logits.shape[1])
    data = _Data(images, labels.astype(np.int32), ids, frozenset(keep))
    run = {
        "attacks": list(attacks),
        "norm": norm,
        "epsilon": float(epsilon),
        "seed": int(seed),
        "batch_size": int(batch_size),
        "num_images": len(images),
        "digest": _digest(images, data.labels, ids),
    }
    if state is None:
        losses = {loss for name in attacks if (loss := ATTACKS[name].loss)}
        warnings = find_warnings(
            compiled.model, images[:batch_size], data.labels[:batch_size], losses=losses, randomized=randomized
        )
        state = CascadeState(
            run=run,
            felled_by=("",) * len(images),
            images_to_do=len(images),
            predictions=(-1,) * len(images),
            warnings=warnings,
        )
    else:
        _check_same_run(state.run, run)
        if state.done:
            yield state
    while not state.done:
        # The running attack was given the images that still resist and the images that it has felled so far.
        given = np.array([i for i, felled in enumerate(state.felled_by) if felled in ("", state.running)], int)
        size = batch_size
        if state.running != CLEAN and given.size:
            # All at once now, because the attacks to come have no more images than this one.
            compiled.prepare(attacks[state.attack - 1 :], images[given[:batch_size]], batch_size=batch_size)
            size = compiled.images_at_once(state.running, images.shape[1:], batch_size=batch_size)
        batch = given[state.images_done : state.images_done + size]
        if batch.size:
            state = _after_batch(state, compiled, data, batch)
        if state.images_done == len(given):
            state = _after_attack(state)
        yield state


class _Data(NamedTuple):
    """All images with their labels and ids, and the ids of those whose adversarial images are kept."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    keep: frozenset[int]


def _after_batch(state: CascadeState, compiled: CompiledAttacks, data: _Data, batch: np.ndarray) -> CascadeState:
    """Returns the state after the running attack has seen the images at these positions."""
    name = state.running
    images, labels, ids = data.images[batch], data.labels[batch], data.ids[batch]
    start = time.perf_counter()
    if name == CLEAN:
        images_adv, logits = images, compiled.logits(images)
    else:
        seeds = image_seeds(state.run["seed"], name, ids)
        images_adv, logits = compiled.attack(name, images, labels, epsilon=state.run["epsilon"], seeds=seeds)
    seconds = time.perf_counter() - start
    check_logits(logits, ids)
    felled_by, predictions, kept = list(state.felled_by), list(state.predictions), dict(state.kept)
    for i, image_adv, prediction in zip(batch, images_adv, logits.argmax(axis=-1), strict=True):
        predictions[i] = int(prediction)
        if prediction != data.labels[i]:
            felled_by[i] = name
        if int(data.ids[i]) in data.keep:
            kept[int(data.ids[i])] = image_adv
    return dataclasses.replace(
        state,
        felled_by=tuple(felled_by),
        predictions=tuple(predictions),
        images_done=state.images_done + len(batch),
        seconds={**state.seconds, name: state.seconds.get(name, 0.0) + seconds},
        kept=kept,
    )


def _after_attack(state: CascadeState) -> CascadeState:
    """Returns the state at the start of the next attack."""
    warnings = state.warnings
    if state.running == "square" and state.attack > 1:  # it may reveal that the attacks before it failed
        warnings = {**warnings, **square_beats_the_others(state.felled_by)}
    resisting = state.felled_by.count("")
    return dataclasses.replace(state, attack=state.attack + 1, images_done=0, images_to_do=resisting, warnings=warnings)


def _check_arguments(
    compiled: CompiledAttacks,
    images: np.ndarray,
    ids: np.ndarray,
    *,
    attacks: Sequence[str],
    norm: str,
    epsilon: float,
    batch_size: int,
) -> None:
    check_threat_model(norm, epsilon)
    if norm != compiled.norm:
        raise UserError(f"The attacks were compiled for norm {compiled.norm!r}. Received: norm={norm!r}.")
    check_attacks(attacks, norm)
    check_at_least(1, batch_size=batch_size)
    check_images(images)
    if ids.shape != (len(images),) or len(set(ids.tolist())) != len(images):
        raise UserError(f"image_ids must be {len(images)} different integers, one for each image. Received: {ids}.")


def _check_same_run(stored: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuses the state of another run, and says what differs."""
    if stored != run:
        differences = [f"{name}: {stored.get(name)} -> {run[name]}" for name in run if stored.get(name) != run[name]]
        raise UserError(
            f"The stored state belongs to another run. It differs in {'; '.join(differences)}. Continue with the same "
            "arguments as before, or remove the state to start again."
        )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
