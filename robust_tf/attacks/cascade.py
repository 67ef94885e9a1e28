"""Attacks one after the other, each on the images that still resist, with a state to stop and go on from."""

import base64
import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import (
    check_at_least,
    check_images,
    check_labels,
    check_logits,
    check_threat_model,
    flat_labels,
)
from robust_tf.attacks.losses import Model, logits_of
from robust_tf.attacks.outputs import callable_in_graphs, with_classes
from robust_tf.attacks.seeds import image_seeds
from robust_tf.attacks.table import ATTACKS, check_attacks
from robust_tf.attacks.threat_models import NORMS
from robust_tf.attacks.warning_flags import find_warnings, square_beats_the_others
from robust_tf.errors import UserError, unknown_name

CLEAN = "clean"  # fells the images that the classifier gets wrong without any attack


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeState:
    """Where an evaluation stands: small, and enough to go on from.

    Attributes:
        run: what the figures belong to: attacks, norm, epsilon, seed, batch_size, num_images and a digest of images
            and labels. A state of another run is refused.
        felled_by: for each image what felled it: "clean", an attack's name, or "" while it resists.
        attack: position in ("clean", *attacks) of what is running; past the end when all is done.
        images_done: images that the running attack has behind it, of those that it was given.
        images_to_do: how many it was given.
        predictions: (num_images,) int, predicted class on the last image that was tried (clean or adversarial).
        seconds: time spent, per attack.
        warnings: flag -> what is suspicious about this evaluation; see `warning_flags`.
        kept: image id -> its last adversarial image (the one that felled it, if one did), (height, width, channels)
            float32, of the ids that were asked for.
    """

    run: dict[str, Any]
    felled_by: tuple[str, ...]
    attack: int = 0
    images_done: int = 0
    images_to_do: int = 0
    predictions: tuple[int, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether all attacks have run."""
        return self.attack > len(self.run["attacks"])

    @property
    def running(self) -> str:
        """Name of the running attack; the last one when all is done."""
        names = (CLEAN, *self.run["attacks"])
        return names[min(self.attack, len(names) - 1)]

    @property
    def robust(self) -> np.ndarray:
        """(num_images,) bool: what still resists."""
        return np.array([not name for name in self.felled_by])

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that still resist."""
        return float(self.robust.mean())

    def accuracy_after(self, attack: str) -> float:
        """Share of all images that no attack up to this one, nor the clean prediction, has felled."""
        names = (CLEAN, *self.run["attacks"])
        if attack not in names:
            raise unknown_name("attack of this run", attack, names)
        fallen = set(names[: names.index(attack) + 1])
        return sum(name not in fallen for name in self.felled_by) / len(self.felled_by)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON has it; `from_json` takes it back."""
        content = dataclasses.asdict(self)
        content["kept"] = {
            str(number): {"shape": list(image.shape), "float32": base64.b64encode(image.tobytes()).decode()}
            for number, image in self.kept.items()
        }
        return content

    @classmethod
    def from_json(cls, content: Any) -> "CascadeState":
        """The state that `to_json` gave. Raises UserError when it is something else."""
        try:
            kept = {
                int(number): np.frombuffer(base64.b64decode(image["float32"]), np.float32).reshape(image["shape"])
                for number, image in content["kept"].items()
            }
            state = cls(
                **{
                    **content,
                    "kept": kept,
                    "felled_by": tuple(content["felled_by"]),
                    "predictions": tuple(content["predictions"]),
                }
            )
            complete = (
                len(state.felled_by) == len(state.predictions) == state.run["num_images"]
                and isinstance(state.run["attacks"], list)
                and all(isinstance(n, int) and n >= 0 for n in (state.attack, state.images_done, state.images_to_do))
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"This is not the state of a cascade of attacks: {type(error).__name__}: {error}."
            ) from None
        if not complete:
            raise UserError("This is not the state of a cascade of attacks: its parts don't fit together.")
        return state


class CompiledAttacks:
    """The attacks on one model, each traced once and kept for all batches, epsilons and data sets.

    Args:
        model: any callable from [0, 1] images to logits.
        norm: "linf", "l2" or "l1".
    """

    def __init__(self, model: Model, norm: str) -> None:
        check_threat_model(norm, 0.0)
        self.model = model
        self.norm = norm
        self._functions: dict[str, Any] = {}

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(batch, classes) float32 of (batch, height, width, channels) float32."""
        if CLEAN not in self._functions:
            first = tf.constant(images[:1])
            model = callable_in_graphs(self.model, first)
            outputs = logits_of(model, first)
            check_logits(outputs.numpy(), num_images=1)
            # In a graph a tf.numpy_function or the like would not say how many classes there are.
            self.model = with_classes(model, outputs.shape[-1])
            signature = [tf.TensorSpec([None, *images.shape[1:]], tf.float32)]
            function = tf.function(lambda x: logits_of(self.model, x), input_signature=signature, autograph=False)
            self._functions[CLEAN] = function.get_concrete_function()
        return self._functions[CLEAN](tf.constant(images)).numpy()

    def attack(
        self, name: str, images: np.ndarray, labels: np.ndarray, *, epsilon: float, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adversarial images (batch, height, width, channels) float32 and the logits there (batch, classes) float32.

        Whatever the attack gives, the images are in the ball and in [0, 1].
        """
        if name not in self._functions:
            self._functions[name] = self._compile(name, images.shape[1:])
        images_adv, logits = self._functions[name](
            tf.constant(images), tf.constant(labels), tf.constant(epsilon, tf.float32), tf.constant(seeds)
        )
        return images_adv.numpy(), logits.numpy()

    def _compile(self, name: str, image_shape: tuple[int, ...]) -> Any:
        attack = ATTACKS[name]

        # The batch size is free: a smaller batch is no reason to trace again.
        @tf.function(
            input_signature=[
                tf.TensorSpec([None, *image_shape], tf.float32),
                tf.TensorSpec([None], tf.int32),
                tf.TensorSpec([], tf.float32),
                tf.TensorSpec([None, 2], tf.int32),
            ],
            autograph=False,
        )
        def run(
            images: tf.Tensor, labels: tf.Tensor, epsilon: tf.Tensor, seeds: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            images_adv = attack(self.model, images, labels, norm=self.norm, epsilon=epsilon, seed=seeds)
            images_adv = NORMS[self.norm].project(images_adv, images, epsilon)
            return images_adv, logits_of(self.model, images_adv)

        return run.get_concrete_function()


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
    randomised: bool = False,
) -> Iterator[CascadeState]:
    """Runs the attacks one after the other on the images that still resist; wrong clean predictions fall first.

    Random numbers depend on the seed, the attack and the image's id, never on the batch or on what ran before.

    Args:
        model: any callable from [0, 1] images to logits, or its `CompiledAttacks` of this norm, which saves tracing
            again for another epsilon.
        images: (num_images, height, width, channels), float, in [0, 1].
        labels: (num_images,) integers.
        attacks: names of `ATTACKS`.
        norm: "linf", "l2" or "l1".
        epsilon: radius, in [0, 1] pixel units.
        batch_size: most images at once.
        seed: of all random numbers.
        state: of an interrupted run with the same arguments: goes on from there and ends with the same result.
        image_ids: (num_images,) numbers of the images in their data set, for the random numbers and `keep`;
            None: 0, 1, 2, …
        keep: ids of the images whose last adversarial image is kept in the state.
        randomised: the model is known to be random (the warning flag for it is left out).

    Yields:
        The state after each (attack, batch); the last one has `done`. When `state` is done already, it alone.

    Raises:
        UserError: an argument is out of its range, the state is of another run, or the model gives NaN.
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
        warnings = find_warnings(
            compiled.model, images[:batch_size], data.labels[:batch_size], attacks=attacks, randomised=randomised
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
        # What the running attack was given: what it has felled itself so far was among it.
        given = np.array([i for i, felled in enumerate(state.felled_by) if felled in ("", state.running)], int)
        batch = given[state.images_done : state.images_done + batch_size]
        if batch.size:
            state = _after_batch(state, compiled, data, batch)
        if state.images_done == len(given):
            state = _after_attack(state)
        yield state


class _Data(NamedTuple):
    """What is attacked: images, labels, ids of all images, and the ids whose adversarial images are kept."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    keep: frozenset[int]


def _after_batch(state: CascadeState, compiled: CompiledAttacks, data: _Data, batch: np.ndarray) -> CascadeState:
    """The state when the running attack has seen these images (their positions, in order)."""
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
    """The state at the start of the next attack."""
    warnings = state.warnings
    if state.running == "square" and state.attack > 1:  # behind attacks with gradients, which it may show up
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
        raise UserError(f"image_ids are {len(images)} different integers, one for each image. Received: {ids}.")


def _check_same_run(stored: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuses to go on from the state of another run, and says what differs."""
    if stored != run:
        differences = [f"{name}: {stored.get(name)} -> {run[name]}" for name in run if stored.get(name) != run[name]]
        raise UserError(
            f"The stored state is of another run. It differs in {'; '.join(differences)}. Go on with the arguments it "
            "was made with, or remove it to start anew."
        )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
