"""Measures the robust accuracy for a list of epsilons, and saves its progress after every batch."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from robust_tf.attacks.cascade import CLEAN, CascadeState, CompiledAttacks, cascade
from robust_tf.attacks.table import ATTACKS
from robust_tf.evaluation.state_file import StateFile
from robust_tf.evaluation.subject import Images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness:
    """The result of one attack, or one cascade of attacks, at one epsilon.

    Attributes:
        attack: Name of the attack or the cascade, as the user wrote it.
        norm: Norm of the perturbations: "linf", "l2" or "l1".
        epsilon: Radius of the perturbations, in [0, 1] pixel units.
        felled_by: For each image, the name of the attack that succeeded (an attack "fells" an image if it finds a
            misclassified perturbation), "clean" if the image is misclassified without an attack, or "" if it resisted.
        felled_at: For each image, the smallest epsilon at which an attack succeeded, 0 for "clean", or -1 if no attack
            succeeded. A perturbation that is allowed at a smaller epsilon is allowed at this one, too.
        predictions: Class predicted for the last version of each image that was tried, (count,) int.
        warnings: Reasons to doubt the result, by the name of the warning flag.
        kept: Last adversarial image of some images, by image id.
    """

    attack: str
    norm: str
    epsilon: float
    felled_by: tuple[str, ...]
    felled_at: tuple[float, ...]
    predictions: tuple[int, ...]
    warnings: dict[str, str]
    kept: dict[int, np.ndarray]

    @property
    def robust(self) -> np.ndarray:
        """Whether no attack succeeded, for each image, (count,) bool."""
        return np.array([not name for name in self.felled_by])


# Called with the number of forward passes so far (see `passes_of`), the expected total, the share of the images that
# still resist, and the name of the running attack.
OnBatch = Callable[[float, float, float, str], None]


def passes_of(state: CascadeState, *, epsilons_left: int = 0) -> tuple[float, float]:
    """Returns the number of forward passes that a cascade has made, and the number that it is still expected to make.

    The estimate assumes that the share of images that resist the running attack stays the same to its end, and that the
    later attacks run on the images that resist. The clean prediction does not count as a pass, because the time for
    tracing it would distort the estimate of the remaining time.

    Args:
        state: State of the cascade.
        epsilons_left: Number of epsilons whose cascades come after this one.
    """
    costs = [0, *(ATTACKS[name].forward_passes for name in state.run["attacks"])]
    names = (CLEAN, *state.run["attacks"])
    given, done = len(state.felled_by), 0.0
    for name, cost in zip(names[: state.attack], costs, strict=False):
        done += given * cost
        given -= state.felled_by.count(name)
    if state.done:
        return done, given * epsilons_left * sum(costs)
    resisting = state.images_done - state.felled_by.count(state.running)
    expected = given * resisting / state.images_done if state.images_done else given
    running = costs[state.attack]
    ahead = (given - state.images_done) * running + expected * sum(costs[state.attack + 1 :])
    return done + state.images_done * running, ahead + expected * epsilons_left * sum(costs)


def attack_epsilons(
    compiled: CompiledAttacks,
    images: Images,
    *,
    name: str,
    attacks: Sequence[str],
    epsilons: Sequence[float],
    batch_size: int,
    seed: int,
    randomized: bool,
    keep: Collection[int],
    state_file: StateFile,
    key: str,
    on_batch: OnBatch,
) -> list[Robustness]:
    """Runs a cascade at each epsilon, and attacks only the images that resisted all smaller epsilons.

    Args:
        compiled: Compiled attacks on the classifier.
        images: Test images.
        name: Name of the cascade, for the results.
        attacks: Keys of `ATTACKS`, in the order in which they run.
        epsilons: Radii in [0, 1] pixel units, above 0 and in ascending order.
        batch_size: Number of images in a batch.
        seed: Seed for the attacks.
        randomized: Whether the classifier is known to be random.
        keep: Ids of the images whose adversarial images the results keep.
        state_file: File for the state after each batch and for the results. Finished parts in it are not run again.
        key: Key of this classifier in the state file.
        on_batch: Function that is called after each batch.

    Returns:
        One result for each epsilon.
    """
    count = len(images.ids)
    felled_by, felled_at = np.full(count, "", object), np.full(count, -1.0)
    predictions = np.full(count, -1)
    kept: dict[int, np.ndarray] = {}
    results = []
    done_before = 0.0
    for position, epsilon in enumerate(epsilons):
        left = np.flatnonzero(felled_by == "")

        def report(state: CascadeState, *, before: float = done_before, position: int = position) -> None:
            done, ahead = passes_of(state, epsilons_left=len(epsilons) - position - 1)
            on_batch(before + done, before + done + ahead, int(state.robust.sum()) / count, state.running)

        # The smaller epsilons are part of the key, because this run leaves out the images on which an attack succeeded
        # at one of them.
        radii = ",".join(f"{value:.9g}" for value in epsilons[: position + 1])
        part = f"{key}/{compiled.norm}/{'+'.join(attacks)}/{radii}"
        warnings: dict[str, str] = {}
        if left.size:
            state = run_cascade(
                compiled,
                Images(images.ids[left], images.pixels[left], images.labels[left]),
                attacks=attacks,
                epsilon=epsilon,
                batch_size=batch_size,
                seed=seed,
                randomized=randomized,
                keep=keep,
                state_file=state_file,
                key=part,
                report=report,
            )
            fallen = ~state.robust
            felled_by[left] = state.felled_by
            felled_at[left[fallen]] = [0.0 if by == CLEAN else epsilon for by in np.array(state.felled_by)[fallen]]
            predictions[left] = state.predictions
            done_before += passes_of(state)[0]
            warnings, kept = state.warnings, {**kept, **state.kept}
        results.append(
            Robustness(
                attack=name,
                norm=compiled.norm,
                epsilon=epsilon,
                felled_by=tuple(felled_by),
                felled_at=tuple(felled_at.tolist()),
                predictions=tuple(predictions.tolist()),
                warnings=warnings,
                kept=kept,
            )
        )
    return results


def unattacked(images: Images, logits: np.ndarray, *, name: str, norm: str) -> Robustness:
    """Returns the result at epsilon 0, for which no attack runs.

    Args:
        images: Test images.
        logits: Logits of the images, (count, num_classes).
        name: Name of the attack, for the result.
        norm: Norm of the attack, for the result.
    """
    wrong = logits.argmax(axis=1) != images.labels
    return Robustness(
        attack=name,
        norm=norm,
        epsilon=0.0,
        felled_by=tuple(CLEAN if fell else "" for fell in wrong),
        felled_at=tuple(0.0 if fell else -1.0 for fell in wrong),
        predictions=tuple(logits.argmax(axis=1).tolist()),
        warnings={},
        kept={},
    )


def run_cascade(
    compiled: CompiledAttacks,
    images: Images,
    *,
    attacks: Sequence[str],
    epsilon: float,
    batch_size: int,
    seed: int,
    randomized: bool,
    keep: Collection[int],
    state_file: StateFile,
    key: str,
    report: Callable[[CascadeState], None],
) -> CascadeState:
    """Runs one cascade to its end, beginning with the state in the state file if it has one.

    Args:
        compiled: Compiled attacks on a model.
        images: Images to attack.
        attacks: Keys of `ATTACKS`, in the order in which they run.
        epsilon: Radius in [0, 1] pixel units.
        batch_size: Number of images in a batch.
        seed: Seed for the attacks.
        randomized: Whether the model is known to be random.
        keep: Ids of the images whose adversarial images the state keeps.
        state_file: File for the state after each batch.
        key: Key of this cascade in the state file.
        report: Function that is called after each batch.
    """
    finished, unfinished = state_file.finished(key), state_file.unfinished(key)
    if finished is not None:
        state = CascadeState.from_json(finished)
        report(state)
        return state
    last = None if unfinished is None else CascadeState.from_json(unfinished)
    if last is not None:
        report(last)
    for state in cascade(
        compiled,
        images.pixels,
        images.labels,
        attacks=attacks,
        norm=compiled.norm,
        epsilon=epsilon,
        batch_size=batch_size,
        seed=seed,
        randomized=randomized,
        state=last,
        image_ids=images.ids.tolist(),
        keep=keep,
    ):
        state_file.keep(key, state.to_json())
        report(state)
    state_file.finish(key, state.to_json())
    return state
