"""Robust accuracy over a list of epsilons, written down batch by batch."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from robust_tf.attacks.cascade import CLEAN, CascadeState, CompiledAttacks, cascade
from robust_tf.attacks.table import PASSES
from robust_tf.evaluation.state_file import StateFile
from robust_tf.evaluation.subject import Images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness:
    """What one attack, or one cascade of attacks, left standing at one epsilon.

    Attributes:
        attack: as the user wrote it.
        felled_by: for each image "clean", the name of the attack that felled it, or "" where it resists.
        felled_at: for each image the epsilon at which it fell: this one or a smaller one; 0 for "clean", -1 where it
            resists. A perturbation that fits into a smaller ball fits into this one, too.
        predictions: (count,) int, the class predicted for the last image that was tried.
        warnings: flag -> what makes the figure doubtful.
        kept: image id -> its last adversarial image, for some ids.
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
        """(count,) bool: what still resists."""
        return np.array([not name for name in self.felled_by])


# Called with the passes done (see `passes_of`), those of the whole as it looks now, the share of the images that still
# resist, and the attack that runs.
OnBatch = Callable[[float, float, float, str], None]


def passes_of(state: CascadeState, *, epsilons_left: int = 0) -> tuple[float, float]:
    """Forward passes behind a cascade, and those ahead of it and of as many cascades as there are epsilons left.

    The attacks to come are counted for the share of the images that has resisted the running one so far; the clean
    prediction counts nothing, or tracing it would seem to be what all passes cost.
    """
    costs = [0, *(PASSES[name] for name in state.run["attacks"])]
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
    randomised: bool,
    keep: Collection[int],
    state_file: StateFile,
    key: str,
    on_batch: OnBatch,
) -> list[Robustness]:
    """Runs the cascade at each epsilon, from the smallest; what fell at one is not attacked again at the next.

    Args:
        compiled: the attacks on the classifier.
        name: of the cascade, for the results.
        attacks: names of ATTACKS, in their order.
        epsilons: ascending, above 0.
        randomised: the classifier is known to be random.
        keep: ids whose adversarial images are wanted.
        state_file: gets the state after each batch, and the results; what it holds already is not run again.
        key: of this classifier in the state file.
        on_batch: called after each batch.
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

        # The smaller epsilons are part of the key: what fell there is missing in this run.
        radii = ",".join(f"{value:.9g}" for value in epsilons[: position + 1])
        part = f"{key}/{compiled.norm}/{'+'.join(attacks)}/{radii}"
        warnings: dict[str, str] = {}
        if left.size:
            state = _run(
                compiled,
                Images(images.ids[left], images.pixels[left], images.labels[left]),
                attacks=attacks,
                epsilon=epsilon,
                batch_size=batch_size,
                seed=seed,
                randomised=randomised,
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
    """The result at epsilon 0."""
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


def _run(
    compiled: CompiledAttacks,
    images: Images,
    *,
    attacks: Sequence[str],
    epsilon: float,
    batch_size: int,
    seed: int,
    randomised: bool,
    keep: Collection[int],
    state_file: StateFile,
    key: str,
    report: Callable[[CascadeState], None],
) -> CascadeState:
    """One cascade to its end, from where the state file has it."""
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
        randomised=randomised,
        state=last,
        image_ids=images.ids.tolist(),
        keep=keep,
    ):
        state_file.keep(key, state.to_json())
        report(state)
    state_file.finish(key, state.to_json())
    return state
