"""The flags of `robust_tf.evaluate`, and what they leave to the classifier."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from robust_tf.attacks import NORMS
from robust_tf.attacks.autoattack import VERSIONS
from robust_tf.attacks.table import ATTACKS, check_attacks
from robust_tf.config.checks import check_choices
from robust_tf.errors import UserError, unknown_name
from robust_tf.evaluation.corruption_error import CorruptionSource
from robust_tf.evaluation.subject import Subject
from robust_tf.flags import flag

NONE = "none"
# AutoAttack's versions; any other cascade is written with plus signs.
CASCADES = {
    "autoattack" if version == "standard" else f"autoattack-{version}": attacks for version, attacks in VERSIONS.items()
}
DEFAULT_NUM_IMAGES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The flags of this program."""

    classifier: str = flag("", "Path of a .keras file, or name of a published model.")
    compare: str = flag(
        "", "A second classifier, measured in the same way; the tasks may differ (before, after transfer)."
    )
    output: str = flag(
        "", "Folder for what is written. Default: evaluation/ beside the classifier.", formerly="output_dir"
    )
    # Data
    dataset: str = flag("", "Data set. Default: that of the results.json beside each classifier.")
    classes: tuple[int, ...] = flag((), "Labels to keep. Default: those of the same results.json, else all.")
    data_dir: str = flag("", "TFDS folder. Default: TFDS's own.")
    num_images: int | None = flag(
        None, f"Test images, drawn by --seed; 0 takes all. Default: {DEFAULT_NUM_IMAGES}, or all when there are fewer."
    )
    batch_size: int = flag(128, "Images at once.")
    seed: int = flag(0, "Of the choice of images, the attacks and the corruptions.")
    # Attacks
    attack: tuple[str, ...] = flag(
        ("autoattack",),
        f"One or more of {NONE}, {', '.join(CASCADES)}, {', '.join(ATTACKS)}, or a cascade such as apgd-ce+square.",
    )
    norm: str = flag("", f"{', '.join(NORMS)}. Default: that of the classifier's training.")
    epsilon: tuple[float, ...] = flag(
        (), "Radii in [0, 1] pixel units, e.g. 0,0.25,0.5 or 0,4/255,8/255. Default: 0 and that of the training."
    )
    # Further figures
    corruptions: bool = flag(False, "Also measure the error under the 15 common corruptions in 5 severities.")
    corruption_source: CorruptionSource = flag(
        "auto", "computed here, tfds (its corrupted test sets), or tfds where it is prepared."
    )
    num_examples: int = flag(8, "Images on the sheet of examples; 0: no sheet.")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.classifier:
            raise UserError("--classifier is needed: a .keras file or the name of a published model. Received: none.")
        for name, lowest in (("batch_size", 1), ("seed", 0), ("num_examples", 0), ("num_images", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")
        self._check_attacks()
        self._check_epsilons()

    def _check_attacks(self) -> None:
        if not self.attack or (NONE in self.attack and len(self.attack) > 1):
            raise UserError(
                f"--attack takes names of attacks, or {NONE} alone. Received: {','.join(self.attack) or 'none'}."
            )
        for name in self.attack:
            for part in attacks_of(name):
                if part not in ATTACKS:
                    raise unknown_name("attack", part, [NONE, *CASCADES, *ATTACKS])
        if len(set(self.attack)) < len(self.attack):
            raise UserError(f"--attack takes each attack once. Received: {','.join(self.attack)}.")
        if self.norm:
            for name in self.attack:
                check_attacks(attacks_of(name), self.norm)

    def _check_epsilons(self) -> None:
        received = f"Received: --epsilon={','.join(f'{value:g}' for value in self.epsilon)}."
        if not all(math.isfinite(value) and value >= 0 for value in self.epsilon):
            raise UserError(f"--epsilon takes numbers of 0 or more, in [0, 1] pixel units. {received}")
        if len(set(self.epsilon)) < len(self.epsilon):
            raise UserError(f"--epsilon takes each radius once. {received}")
        if self.norm == "linf" and any(value > 1 for value in self.epsilon):
            raise UserError(
                f"epsilon of the linf norm must be in [0, 1], since pixels are. {received} Did you mean "
                f"{max(self.epsilon):g}/255?"
            )

    @property
    def folder(self) -> pathlib.Path:
        """Where everything goes."""
        path = pathlib.Path(self.classifier)
        beside = path.parent if path.suffix == ".keras" else pathlib.Path("runs") / self.classifier
        return pathlib.Path(self.output) if self.output else beside / "evaluation"


def attacks_of(name: str) -> tuple[str, ...]:
    """The attacks of ATTACKS that a name of `--attack` stands for."""
    if name == NONE:
        return ()
    return CASCADES[name] if name in CASCADES else tuple(name.split("+"))


def is_randomised(name: str) -> bool:
    """Whether a name of `--attack` is the cascade for classifiers that are known to be random."""
    return name == "autoattack-rand"


def with_threat_model(config: EvaluateConfig, subjects: Sequence[Subject]) -> EvaluateConfig:
    """The config with norm and epsilons: those of the first classifier that knows them where the flags leave them out.

    Raises:
        UserError: they are left out and unknown.
    """
    if config.attack == (NONE,):
        return dataclasses.replace(config, norm="", epsilon=())
    known = next((subject for subject in subjects if subject.epsilon), None)
    if known is None and not (config.norm and config.epsilon):
        raise UserError(
            "Nothing tells what perturbations the classifier was trained for. "
            f"Received: --norm={config.norm!r}, --epsilon={','.join(map(str, config.epsilon))}. Name both."
        )
    norm = config.norm or str(known.norm if known else "")
    # Only with the norm that it belongs to.
    if not config.epsilon and (known is None or known.norm != norm):
        raise UserError(f"The classifier was trained for another norm. Received: --norm={norm}. Add --epsilon.")
    epsilon = config.epsilon or (0.0, float(known.epsilon if known and known.epsilon else 0.0))
    return dataclasses.replace(config, norm=norm, epsilon=tuple(sorted(epsilon)))
