"""The flags of `robust_tf.evaluate`, some of which take their default from the classifier."""

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
# The versions of AutoAttack. All other cascades are written with plus signs, such as apgd-ce+square.
CASCADES = {
    "autoattack" if version == "standard" else f"autoattack-{version}": attacks for version, attacks in VERSIONS.items()
}
DEFAULT_NUM_IMAGES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The flags of `robust_tf.evaluate`. See `--help` for each of them."""

    classifier: str = flag("", "Path of a .keras file, or name of a published model.")
    compare: str = flag(
        "",
        "Path or name of a second classifier, which is measured in the same way. It may have another task, for example "
        "before and after transfer.",
    )
    output: str = flag(
        "", "Folder for the results. Default: the folder evaluation next to the classifier.", formerly="output_dir"
    )
    # Data
    dataset: str = flag("", "Name of the data set. Default: the data set in the results.json next to each classifier.")
    classes: tuple[int, ...] = flag(
        (), "Labels to keep, for example 5,6,7. Default: the labels in the same results.json, or all labels."
    )
    data_dir: str = flag("", "Folder of TensorFlow Datasets. Default: ~/tensorflow_datasets.")
    num_images: int | None = flag(
        None,
        "Number of test images, which are drawn with --seed. 0 uses all. "
        f"Default: {DEFAULT_NUM_IMAGES}, or all if there are fewer.",
    )
    batch_size: int = flag(128, "Number of images in a batch.")
    seed: int = flag(0, "Seed for the choice of images, the attacks and the corruptions.")
    # Attacks
    attack: tuple[str, ...] = flag(
        ("autoattack",),
        f"Attacks to run: {NONE}, or one or more of {', '.join(CASCADES)}, {', '.join(ATTACKS)}, or cascades such as "
        "apgd-ce+square.",
    )
    norm: str = flag(
        "", f"Norm of the perturbations: {' or '.join(NORMS)}. Default: the norm that the classifier was trained for."
    )
    epsilon: tuple[float, ...] = flag(
        (),
        "Radii of the perturbations in [0, 1] pixel units, for example 0,0.25,0.5 or 0,4/255,8/255. Default: 0 and the "
        "radius that the classifier was trained for.",
    )
    # Further figures
    corruptions: bool = flag(False, "Also measure the error under the 15 common corruptions at 5 severities.")
    corruption_source: CorruptionSource = flag(
        "auto",
        "Source of the corrupted images: computed here, tfds for the corrupted test sets of TensorFlow Datasets, or "
        "auto for tfds if the set is prepared and computed if not.",
    )
    num_examples: int = flag(8, "Number of images on the sheet of examples. 0 draws no sheet.")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.classifier:
            raise UserError("--classifier must be a .keras file or the name of a published model. Received: none.")
        for name, lowest in (("batch_size", 1), ("seed", 0), ("num_examples", 0), ("num_images", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")
        self._check_attacks()
        self._check_epsilons()

    def _check_attacks(self) -> None:
        if not self.attack or (NONE in self.attack and len(self.attack) > 1):
            raise UserError(
                f"--attack must be one or more names of attacks, or {NONE} alone. Received: "
                f"{','.join(self.attack) or 'no name'}."
            )
        for name in self.attack:
            for part in attacks_of(name):
                if part not in ATTACKS:
                    raise unknown_name("attack", part, [NONE, *CASCADES, *ATTACKS])
        if len(set(self.attack)) < len(self.attack):
            raise UserError(f"--attack must name each attack only once. Received: {','.join(self.attack)}.")
        if self.norm:
            for name in self.attack:
                check_attacks(attacks_of(name), self.norm)

    def _check_epsilons(self) -> None:
        received = f"Received: --epsilon={','.join(f'{value:g}' for value in self.epsilon)}."
        if not all(math.isfinite(value) and value >= 0 for value in self.epsilon):
            raise UserError(f"--epsilon must be numbers of 0 or more, in [0, 1] pixel units. {received}")
        if len(set(self.epsilon)) < len(self.epsilon):
            raise UserError(f"--epsilon must name each radius only once. {received}")
        if self.norm == "linf" and any(value > 1 for value in self.epsilon):
            raise UserError(
                f"--epsilon must be in [0, 1] for the linf norm, like the pixels. {received} Did you mean "
                f"{max(self.epsilon):g}/255?"
            )

    @property
    def folder(self) -> pathlib.Path:
        """Folder for the results."""
        path = pathlib.Path(self.classifier)
        beside = path.parent if path.suffix == ".keras" else pathlib.Path("runs") / self.classifier
        return pathlib.Path(self.output) if self.output else beside / "evaluation"


def attacks_of(name: str) -> tuple[str, ...]:
    """Returns the keys of `ATTACKS` that one name in `--attack` stands for, in the order in which they run."""
    if name == NONE:
        return ()
    return CASCADES[name] if name in CASCADES else tuple(name.split("+"))


def is_randomised(name: str) -> bool:
    """Returns whether a name in `--attack` is the cascade for classifiers that are known to be random."""
    return name == "autoattack-rand"


def with_threat_model(config: EvaluateConfig, subjects: Sequence[Subject]) -> EvaluateConfig:
    """Returns the flags with norm and epsilons filled in from the first classifier whose training is known.

    Args:
        config: Flags, which take precedence.
        subjects: Classifiers.

    Raises:
        UserError: If the flags leave them out and no classifier knows them.
    """
    if config.attack == (NONE,):
        return dataclasses.replace(config, norm="", epsilon=())
    known = next((subject for subject in subjects if subject.epsilon), None)
    if known is None and not (config.norm and config.epsilon):
        raise UserError(
            "--norm and --epsilon are needed, because the perturbations of the classifier's training are not known. "
            f"Received: --norm={config.norm!r}, --epsilon={','.join(map(str, config.epsilon))}. Name both."
        )
    norm = config.norm or str(known.norm if known else "")
    # The epsilon of the training is only used together with its norm.
    if not config.epsilon and (known is None or known.norm != norm):
        raise UserError(
            f"--epsilon is needed, because the classifier was trained for another norm. Received: --norm={norm}. Add "
            "--epsilon."
        )
    epsilon = config.epsilon or (0.0, float(known.epsilon if known and known.epsilon else 0.0))
    return dataclasses.replace(config, norm=norm, epsilon=tuple(sorted(epsilon)))
