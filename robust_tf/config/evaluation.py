"""The flags of `robust_tf.evaluate`."""

import dataclasses
import math
import pathlib
from typing import Literal

from robust_tf.config.checks import check_choices, check_ranges
from robust_tf.config.names import ATTACK_NAMES, AUTOATTACK_VERSIONS, NORM_NAMES
from robust_tf.config.optimization import JitCompile
from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import flag

# The value of --attack that stands for no attack at all.
NO_ATTACK = "none"
# Attacks if the flag is left out: on a classifier, and on a network for detection or segmentation.
DEFAULT_ATTACK = "autoattack"
DENSE_ATTACK = "pgd"
DEFAULT_NUM_IMAGES = 1000
DEFAULT_BATCH_SIZE = 128
GPU_BATCH_SIZE = 512  # of images whose sides have at most SMALL_IMAGE pixels
SMALL_IMAGE = 64

CorruptionSource = Literal["auto", "computed", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure, on which images, and where to write the results."""

    classifier: str = flag("", "Classifier to evaluate: the path of a .keras file or the name of a published model.")
    compare: str = flag(
        "",
        "Second classifier to evaluate in the same way and to compare with the first. It may have been trained on "
        "another data set.",
    )
    artifact: tuple[str, ...] = flag(
        (),
        "Exports of the classifier to measure, separated by commas: version folders, model.onnx or model.tflite, or "
        "the address of a server such as http://localhost:8501/MODEL. Those attacks of --attack that follow gradients "
        "run on the classifier, and their adversarial images are transferred. Square then queries the export itself.",
    )
    queries: int = flag(5000, "Number of queries that Square makes about each image to an --artifact.")
    output: str = flag(
        "", "Folder to write to. By default, the folder evaluation/ next to the classifier.", formerly="output_dir"
    )
    # Data
    dataset: str = flag(
        "", "Data set to evaluate on. By default, the one named in the results.json next to each classifier."
    )
    classes: tuple[int, ...] = flag(
        (), "Labels to keep. By default, those in the results.json next to each classifier, or all of them."
    )
    data_dir: str = flag("", "Folder of TensorFlow Datasets. By default, the library's own default folder.")
    num_images: int | None = flag(
        None,
        f"Number of test images, drawn at random with --seed. 0 takes all. By default, {DEFAULT_NUM_IMAGES}, or all "
        "images if there are fewer.",
    )
    batch_size: int | None = flag(
        None,
        f"Largest number of images in a batch. By default, {DEFAULT_BATCH_SIZE}, or {GPU_BATCH_SIZE} on a GPU if the "
        f"images have at most {SMALL_IMAGE} x {SMALL_IMAGE} pixels. The verdicts do not depend on it.",
    )
    seed: int = flag(0, "Seed for the choice of test images, the attacks and the corruptions.")
    # Attacks
    attack: tuple[str, ...] = flag(
        (),
        f"Attacks to run, separated by commas: {NO_ATTACK}, {', '.join(AUTOATTACK_VERSIONS)}, "
        f"{', '.join(ATTACK_NAMES)}, or a cascade of several such as apgd-ce+square. By default {DEFAULT_ATTACK}. A "
        f"network for detection or segmentation is attacked through its own loss, by {DENSE_ATTACK} only.",
    )
    attack_steps: int = flag(20, f"Number of steps of {DENSE_ATTACK} on a network for detection or segmentation.")
    norm: str = flag(
        "", f"Norm of the perturbations: {', '.join(NORM_NAMES)}. By default, the norm that was used in training."
    )
    epsilon: tuple[float, ...] = flag(
        (),
        "Radii of the perturbations in [0, 1] pixel units, separated by commas, e.g. 0,0.25,0.5 or 0,4/255,8/255. By "
        "default, 0 and the radius that was used in training.",
    )
    jit_compile: JitCompile = flag(
        "auto",
        "Whether XLA compiles the attacks. auto uses XLA on a GPU if it can compile the classifier. On a CPU, XLA is "
        "usually slower.",
    )
    tf32: bool = flag(
        False,
        "Let NVIDIA GPUs since Ampere multiply float32 numbers in TF32, which is faster. It rounds the factors to 10 "
        "bits of mantissa, so the verdicts may differ from those of a CPU. Nothing changes on a CPU.",
    )
    # Further measurements
    corruptions: bool = flag(False, "Also measure the error under the 15 common corruptions at 5 severities.")
    corruption_source: CorruptionSource = flag(
        "auto",
        "Source of the corrupted images. computed: compute them from the test images. tfds: read the corrupted test "
        "sets of TensorFlow Datasets. auto: tfds if they are prepared, otherwise computed.",
    )
    num_examples: int = flag(8, "Number of images in the picture of examples. 0 draws no picture.")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.classifier:
            raise UserError("--classifier must be a .keras file or the name of a published model. Received: none.")
        for name, lowest in (("batch_size", 1), ("seed", 0), ("num_examples", 0), ("num_images", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")
        check_ranges(self, ("queries", "attack_steps"), lowest=1)
        if self.artifact and self.compare:
            raise UserError(
                f"--artifact measures exports of --classifier alone. Received: --compare={self.compare} as well. Run "
                "the program once for each classifier."
            )
        if len(set(self.artifact)) < len(self.artifact):
            raise UserError(f"--artifact must name each export only once. Received: {','.join(self.artifact)}.")
        self._check_attacks()
        self._check_epsilons()

    def _check_attacks(self) -> None:
        if self.norm and self.norm not in NORM_NAMES:
            raise unknown_name("value of --norm", self.norm, NORM_NAMES)
        if NO_ATTACK in self.attack and len(self.attack) > 1:
            raise UserError(
                f"--attack must be the names of one or more attacks, or {NO_ATTACK} alone. Received: "
                f"{','.join(self.attack)}."
            )
        for name in self.attack:
            for part in name.split("+"):
                if part not in ATTACK_NAMES and name not in (NO_ATTACK, *AUTOATTACK_VERSIONS):
                    raise unknown_name("attack", part, [NO_ATTACK, *AUTOATTACK_VERSIONS, *ATTACK_NAMES])
        if len(set(self.attack)) < len(self.attack):
            raise UserError(f"--attack must name each attack only once. Received: {','.join(self.attack)}.")

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
        """Folder that everything is written to."""
        path = pathlib.Path(self.classifier)
        beside = path.parent if path.suffix == ".keras" else pathlib.Path("runs") / self.classifier
        return pathlib.Path(self.output) if self.output else beside / "evaluation"
