"""Measures deployed artifacts of a classifier: accuracy, agreement with it, and robust accuracy.

An artifact has no gradient, so two kinds of attack are combined. Gradient attacks on the classifier give adversarial
images, which are transferred to the artifact. Square then queries the artifact itself about the images that are left.
An image counts as robust only if none of them succeeds. The classifier goes through the same attacks, as the yardstick.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import tensorflow as tf

from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.seeds import image_seeds
from robust_tf.attacks.table import ATTACKS
from robust_tf.errors import UserError
from robust_tf.evaluation.prediction import Predict
from robust_tf.evaluation.robustness import run_cascade
from robust_tf.evaluation.state_file import StateFile
from robust_tf.evaluation.subject import Images, Subject
from robust_tf.serving.artifacts import Artifact, open_artifact

CLASSIFIER = "classifier"
_DEFAULT_ATTACK = "apgd-ce"
# FGSM has no early stop. FAB looks for the nearest image that is misclassified, which another rounding may classify
# correctly again; images of high loss transfer better.
_NOT_TRANSFERRED = ("fab-t", "fab-x5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """An artifact to measure, or the classifier itself.

    Attributes:
        name: Name of the format, or "classifier".
        location: Path or address, as the user wrote it.
        key: Text that identifies the artifact and its content, for the state file.
        model: Callable from images to logits, which the attacks query.
        predict: Function from images (count, size, size, 3) float32 to logits (count, classes) float32.
        card: Content of the artifact's model card; empty for the classifier and for a server.
    """

    name: str
    location: str
    key: str
    model: Callable[[Any], Any]
    predict: Predict
    card: dict[str, Any]

    @classmethod
    def of_classifier(cls, subject: Subject, predict: Predict) -> Self:
        """Returns the classifier as a target."""
        return cls(
            name=CLASSIFIER,
            location=subject.name,
            key=f"{CLASSIFIER}/{subject.weights_sha256[:16]}",
            model=subject.classifier,
            predict=predict,
            card={},
        )

    @classmethod
    def of_artifact(cls, location: str, artifact: Artifact, images: np.ndarray) -> Self:
        """Returns an open artifact as a target. Its key holds the digests of its files, or what it predicts."""
        files = artifact.card.get("files") or artifact.logits(images).argmax(axis=1).tolist()
        digest = hashlib.sha256(f"{location if not artifact.card else ''}{files}".encode()).hexdigest()
        return cls(
            name=artifact.name,
            location=location,
            key=f"{artifact.name}/{digest[:16]}",
            model=lambda images: artifact.logits(np.asarray(images, np.float32)),
            predict=artifact.logits,
            card=artifact.card,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackedTarget:
    """The result of all attacks on a target at one epsilon.

    Attributes:
        epsilon: Radius of the perturbations, in [0, 1] pixel units.
        transferred: Whether each image resists the adversarial image of one attack on the classifier, (count,) bool, by
            the name of the attack.
        robust: Whether each image resists all of these and Square, here and at all smaller epsilons, (count,) bool.
    """

    epsilon: float
    transferred: dict[str, np.ndarray]
    robust: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredTarget:
    """All results of a target.

    Attributes:
        target: The artifact, or the classifier.
        predictions: Predicted classes of the clean images, (count,) int.
        attacked: Results at each epsilon, in ascending order.
    """

    target: Target
    predictions: np.ndarray
    attacked: list[AttackedTarget]


@contextlib.contextmanager
def opened_artifacts(locations: Sequence[str], subject: Subject, images: Images) -> Iterator[list[Target]]:
    """Opens artifacts and checks that they are exports of a classifier.

    Args:
        locations: Paths or addresses, see `open_artifact`.
        subject: The classifier.
        images: Test images, on which a server is recognized in a later run.

    Yields:
        The targets, in the order of the locations.

    Raises:
        UserError: An artifact cannot be opened, or belongs to another classifier.
    """
    with contextlib.ExitStack() as stack:
        targets = []
        for location in locations:
            artifact = stack.enter_context(open_artifact(location))
            _check_same_classifier(location, artifact, subject)
            targets.append(Target.of_artifact(location, artifact, images.pixels[:32]))
        yield targets


def _check_same_classifier(location: str, artifact: Artifact, subject: Subject) -> None:
    rule = "An artifact must be an export of --classifier."
    ours = (subject.task.image_size, subject.classifier.output_shape[-1])
    theirs = (artifact.image_size, len(artifact.labels))
    if ours != theirs:
        raise UserError(
            f"{rule} Received: {location}, for images of {theirs[0]} pixels a side and {theirs[1]} classes instead of "
            f"{ours[0]} pixels and {ours[1]} classes."
        )
    weights = artifact.card.get("weights_sha256", subject.weights_sha256)  # not in cards of older versions
    if weights != subject.weights_sha256:
        raise UserError(
            f"{rule} Received: {location}, exported from weights with the SHA-256 {weights[:16]}... instead of "
            f"{subject.weights_sha256[:16]}.... Name its own classifier, or export this one again."
        )


def attacks_to_transfer(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the attacks whose adversarial images are transferred: those of a list that follow a gradient, except FAB.

    If the list has none, it is APGD on the cross-entropy, which supports all norms.

    Args:
        names: Names in `ATTACKS`.

    Example:
        >>> attacks_to_transfer(["apgd-ce", "apgd-t", "fab-t", "square"])
        ('apgd-ce', 'apgd-t')
    """
    with_gradient = [name for name in dict.fromkeys(names) if ATTACKS[name].loss and name not in _NOT_TRANSFERRED]
    return tuple(with_gradient) or (_DEFAULT_ATTACK,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """The attacks on all targets.

    Attributes:
        transferred: Gradient attacks on the classifier, see `attacks_to_transfer`.
        norm: Norm of the perturbations.
        epsilons: Radii in [0, 1] pixel units, above 0 and in ascending order.
        queries: Number of queries that Square makes about each image.
        batch_size: Number of images in a batch.
        seed: Seed for the attacks.
        jit_compile: Whether XLA compiles the attacks on the classifier, see `CompiledAttacks`.
    """

    transferred: tuple[str, ...]
    norm: str
    epsilons: Sequence[float]
    queries: int
    batch_size: int
    seed: int
    jit_compile: bool | Literal["auto"]

    def key(self, position: int) -> str:
        """Returns the part of a key in the state file for Square at one epsilon, which runs on what the rest left."""
        radii = ",".join(f"{value:.9g}" for value in self.epsilons[: position + 1])
        return f"{self.norm}/{'+'.join(self.transferred)}/square-{self.queries}/{radii}"


# Called with the share of the work that is done and what is running.
OnProgress = Callable[[float, str], None]


def measure_targets(
    targets: Sequence[Target],
    subject: Subject,
    images: Images,
    plan: AttackPlan,
    *,
    state_file: StateFile,
    on_progress: OnProgress,
) -> list[MeasuredTarget]:
    """Measures all targets on the same images with the same adversarial images.

    Args:
        targets: The classifier and its artifacts.
        subject: The classifier, on which the gradient attacks run.
        images: Test images.
        plan: The attacks.
        state_file: File for the state after each batch and for the results. Finished parts in it are not run again.
        on_progress: Function that is called after each batch.

    Raises:
        UserError: An artifact fails, for example because its server has stopped.
    """
    measured = [
        MeasuredTarget(target=target, predictions=target.predict(images.pixels).argmax(axis=1), attacked=[])
        for target in targets
    ]
    if not plan.epsilons:
        return measured
    # Without early stop, an image keeps the point of highest loss, which transfers better than the first wrong one.
    deep = {name: {"early_stop": False} for name in plan.transferred if name != "fgsm"}
    gradient = CompiledAttacks(subject.classifier, plan.norm, jit_compile=plan.jit_compile, settings=deep)
    square = [
        CompiledAttacks(
            target.model,
            plan.norm,
            jit_compile=plan.jit_compile if target.name == CLASSIFIER else False,
            settings={"square": {"queries": plan.queries}},
        )
        for target in targets
    ]
    parts = _Parts(len(plan.epsilons) * (len(plan.transferred) + len(targets)), on_progress)
    robust = [each.predictions == images.labels for each in measured]
    for position, epsilon in enumerate(plan.epsilons):
        transferred: list[dict[str, np.ndarray]] = [{} for _ in targets]
        for name in plan.transferred:
            found = _transferred(gradient, targets, images, plan, name, epsilon, state_file, parts)
            for number, predictions in enumerate(found):
                right = (measured[number].predictions == images.labels) & (predictions == images.labels)
                transferred[number][name] = right
                robust[number] = robust[number] & right
        for number, each in enumerate(measured):
            robust[number] = _squared(
                square[number], each.target, images, robust[number], plan, position, state_file, parts
            )
            each.attacked.append(
                AttackedTarget(epsilon=epsilon, transferred=transferred[number], robust=robust[number])
            )
    return measured


class _Parts:
    """Reports the progress of equal parts of the work, one after the other."""

    def __init__(self, count: int, on_progress: OnProgress) -> None:
        self._count, self._done, self._on_progress = count, 0, on_progress

    def report(self, share: float, running: str) -> None:
        self._on_progress((self._done + share) / self._count, running)

    def next(self) -> None:
        self._done += 1


def _transferred(
    gradient: CompiledAttacks,
    targets: Sequence[Target],
    images: Images,
    plan: AttackPlan,
    name: str,
    epsilon: float,
    state_file: StateFile,
    parts: _Parts,
) -> list[np.ndarray]:
    """Returns what each target predicts for the adversarial images of one attack, (count,) int.

    The adversarial images are not stored, because those of a large evaluation would fill the disk. They are computed
    once for all targets, and again for an artifact that is added later.
    """
    count = len(images.ids)
    keys = [f"{target.key}/{plan.norm}/{name}/{epsilon:.9g}" for target in targets]
    known: list[list[int]] = [state_file.finished(key) or state_file.unfinished(key) or [] for key in keys]
    size = gradient.images_at_once(name, images.pixels.shape[1:], batch_size=plan.batch_size)
    for start in range(0, count, size):
        stop = min(start + size, count)
        missing = [number for number, predictions in enumerate(known) if len(predictions) < stop]
        if missing:
            batch = slice(start, stop)
            seeds = image_seeds(plan.seed, name, images.ids[batch])
            images_adv, _ = gradient.attack(
                name, images.pixels[batch], images.labels[batch], epsilon=epsilon, seeds=seeds
            )
            for number in missing:
                known[number] = known[number][:start] + targets[number].predict(images_adv).argmax(axis=1).tolist()
                save = state_file.finish if stop == count else state_file.keep
                save(keys[number], known[number])
        parts.report(stop / count, f"{name} on the classifier")
    parts.next()
    return [np.array(predictions) for predictions in known]


def _squared(
    square: CompiledAttacks,
    target: Target,
    images: Images,
    robust: np.ndarray,
    plan: AttackPlan,
    position: int,
    state_file: StateFile,
    parts: _Parts,
) -> np.ndarray:
    """Returns which of the images that are robust so far also resist Square by queries, (count,) bool."""
    robust = robust.copy()
    left = np.flatnonzero(robust)
    if left.size:
        with _artifact_errors():
            state = run_cascade(
                square,
                Images(images.ids[left], images.pixels[left], images.labels[left]),
                attacks=("square",),
                epsilon=plan.epsilons[position],
                batch_size=plan.batch_size,
                seed=plan.seed,
                randomized=True,  # no warnings about rounding that differs from call to call
                keep=(),
                state_file=state_file,
                key=f"{target.key}/{plan.key(position)}",
                report=lambda state: parts.report(
                    state.images_done / max(state.images_to_do, 1) if state.attack else 0.0, f"square on {target.name}"
                ),
            )
        robust[left] = state.robust
    parts.next()
    return robust


@contextlib.contextmanager
def _artifact_errors() -> Iterator[None]:
    """Turns the error of an artifact back into a UserError. TensorFlow, which calls the artifact, has wrapped it."""
    try:
        yield
    except tf.errors.OpError as error:
        line = next((line for line in (error.message or "").splitlines() if "UserError: " in line), "")
        if not line:
            raise
        raise UserError(line.partition("UserError: ")[2]) from None
