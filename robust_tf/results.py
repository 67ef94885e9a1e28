"""The record of a training job in `results.json`: how the classifier was made, and its accuracies.

Every program that writes or reads this file uses `JobResults`. Nothing here imports TensorFlow.
"""

import dataclasses
import json
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from robust_tf.config.data import AlphaBackground, Exif, TaskType
from robust_tf.config.job import JobConfig, JobKind
from robust_tf.errors import UserError
from robust_tf.files import write_json
from robust_tf.flags import flat_values, parse_flags
from robust_tf.json_records import Record, WrongValueError, from_json
from robust_tf.statistics import Interval, PairedDifference, in_words

FILE_NAME = "results.json"
# Number of the file format. Increase it when programs that know only the older format would misread the file.
FORMAT = 1
# Subfolder of a workdir for the baseline: the same job, run from the standard source.
BASELINE = "baseline"

# What the intervals of a comparison over several draws cover.
DRAWS_NOTE = (
    "These intervals cover other draws of the labeled images and other test images, but for this one pair of sources: "
    "sources trained with other seeds may differ by more, or by less."
)

FigureName = Literal["clean_accuracy", "mean_per_class_accuracy", "robust_accuracy", "clean", "robust"]
# Titles of the metrics of detection and segmentation.
_METRIC_TITLES = {"average_precision": "average precision", "mean_iou": "mean IoU"}
# Older versions did not write these keys, and listed their values only among the flags of the job.
_ALSO_FLAGS = "dataset classes image_size downscale split_seed skip_bad_images exif alpha_background".split()
# Flags on which absl acts immediately: it prints a text and exits, or reads another file.
_FLAGS_OF_ABSL = re.compile(r"--?(help|h|flagfile|undefok)(=|$)")
# Keys that the results of a finished job always have, whichever version wrote them.
_OF_EVERY_FINISHED_JOB = (
    "task dataset architecture image_size metric clean_accuracy clean_accuracy_interval mean_per_class_accuracy "
    "num_train_images num_validation_images num_test_images validation_value trainable_parameters total_parameters "
    "seconds seed"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredAttack(Record):
    """The attack under which the robust accuracy was measured. A value is None if the file does not hold it.

    Attributes:
        name: Name of the attack, such as "PGD-20 (highest-loss iterate)".
        norm: Norm of the perturbations, "linf" or "l2".
        epsilon: Radius of the ball, in [0, 1] pixel units.
        step_size: Length of a step, in the same norm and unit.
        steps: Number of gradient steps.
    """

    name: str | None = None
    norm: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None

    @property
    def in_words(self) -> str:
        """The attack with its threat model, such as "PGD-20 (highest-loss iterate), l2 0.5"."""
        # Versions that wrote no name always ran this attack.
        name = self.name or f"PGD-{self.steps} (highest-loss iterate)"
        return name if self.epsilon is None else f"{name}, {self.norm or 'unknown norm'} {self.epsilon:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Returns the record as an object that `json.dump` accepts, without the values that are unknown."""
        content = super().to_json().items()
        return {name: value for name, value in content if value is not None or name in self.extra}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures(Record):
    """The metric of a network for detection or segmentation, in [0, 1], or the difference between two networks.

    Attributes:
        value: Average precision (COCO, over IoU 0.5 to 0.95) or mean IoU. None if there was nothing to measure.
        interval: 95 % bootstrap interval over images; None if there are too few.
        others: Related figures by name, such as "ap50" or "pixel_accuracy".
        per_class: The metric of each class by its name. Classes that do not occur are left out.
    """

    value: float | None = None
    interval: Interval | None = None
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_class: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureCache(Record):
    """How a job with `--features=cached` used the store of features.

    Attributes:
        hits: Number of rows of features (one image in one view) that were in the store.
        misses: Number of rows that were computed.
        seconds: Time until all features were available.
    """

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class AccuracyDifference(PairedDifference):
    """Paired difference between the accuracy of a job and the accuracy of its baseline.

    Attributes:
        draws: Number of draws of the labeled images whose mean this is.
        claimed: Whether the documentation of the experiment names this accuracy, see `--claims`.
    """

    draws: int = 1
    claimed: bool = False

    @classmethod
    def of(cls, compared: PairedDifference, *, draws: int = 1) -> Self:
        """Returns a difference with the number of its draws."""
        return cls(compared.difference, compared.interval, compared.p_value, draws)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawMeans(Record):
    """Mean accuracies over several draws of the labeled images, in [0, 1].

    Attributes:
        draws: Number of draws, including the job itself.
        clean_accuracy: Mean clean accuracy.
        mean_per_class_accuracy: Mean of the mean-per-class accuracies.
        robust_accuracy: Mean robust accuracy; None without an attack.
    """

    draws: int = 1
    clean_accuracy: float | None = None
    mean_per_class_accuracy: float | None = None
    robust_accuracy: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """Paired differences between a job and its baseline on the same test images.

    Attributes:
        clean_accuracy: Difference between the clean accuracies.
        mean_per_class_accuracy: Difference between the mean-per-class accuracies; None if that is not the metric.
        robust_accuracy: Difference between the robust accuracies; None if one of the two was not attacked.
    """

    clean_accuracy: AccuracyDifference | None = None
    mean_per_class_accuracy: AccuracyDifference | None = None
    robust_accuracy: AccuracyDifference | None = None

    @property
    def draws(self) -> int:
        """Number of draws of the labeled images that were compared."""
        return self.clean_accuracy.draws if self.clean_accuracy else 1

    def with_claims(self, claims: Sequence[str]) -> Self:
        """Returns the same differences, of which those with these names are marked as claimed."""
        named = {name: getattr(self, name) for name in claims}
        claimed = {name: dataclasses.replace(each, claimed=True) for name, each in named.items() if each is not None}
        return dataclasses.replace(self, **claimed)


class Figure(NamedTuple):
    """One accuracy of a job.

    Attributes:
        name: Its key in the file.
        title: Its name in text, such as "accuracy under PGD-20 (highest-loss iterate), l2 0.5".
        short_title: Its name as the heading of a column, such as "PGD-20 (highest-loss iterate), l2 0.5".
        value: The accuracy in [0, 1], None if it was not measured.
        interval: Its 95 % confidence interval, None if it has none.
    """

    name: FigureName
    title: str
    short_title: str
    value: float | None
    interval: Interval | None

    @property
    def in_words(self) -> str:
        """The accuracy in percent, such as "80.0% (71.1% to 86.7%)"."""
        if self.value is None:
            return "not measured"
        return f"{self.value:.1%} ({self.interval.in_words})" if self.interval else f"{self.value:.1%}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResults(Record):
    """The content of a `results.json`.

    The results of a finished job have every value that applies to it. A file may hold fewer values if an older version
    or a user wrote it. The missing values get the defaults below, where None means "unknown or does not apply".

    Attributes:
        task: Kind of job, "pretrain" or "transfer".
        task_type: What the network predicts; the value of the flag of this name.
        dataset: Name of the data set.
        classes: Labels that were kept, in the order of the logits; empty if all were.
        class_names: Names of the classes, in the order of the logits.
        architecture: Name of the classifier's architecture.
        image_size: Side of the images in pixels.
        resize_size: Length in pixels to which the shorter side is resized before the center crop.
        downscale: Length in pixels to which the shorter side is reduced before everything else.
        exif: Whether the EXIF orientation is applied; the value of the flag of this name.
        alpha_background: Color behind transparent pixels; the value of the flag of this name.
        split_seed: Seed that chooses the test images of a folder without a test part.
        skip_bad_images: Whether images that cannot be decoded were left out.
        source: Classifier that a transfer started from; the value of the flag of this name.
        transfer_mode: What a transfer trained; the value of the flag of this name.
        head: How a transfer found its head; the value of the flag of this name.
        views: Number of views of each training image whose features were stored.
        feature_cache: Use of the stored features, for a job that had any.
        head_penalty: L2 penalty of the head, where it was chosen on the validation part.
        metric: The data set's usual metric, "accuracy" or "mean_per_class_accuracy"; "average_precision" for detection
            and "mean_iou" for segmentation.
        clean_accuracy: Share of the test images that are classified correctly, in [0, 1].
        clean_accuracy_interval: 95 % Wilson interval of the clean accuracy.
        mean_per_class_accuracy: Mean of the classes' clean accuracies, in [0, 1].
        robust_accuracy: Share of the test images that are classified correctly both before and after the attack.
        robust_accuracy_interval: 95 % Wilson interval of the robust accuracy.
        robust_accuracy_attack: Attack under which the robust accuracy was measured; None if none was run.
        clean: Metric on the test images; only for detection and segmentation, which have no accuracies.
        robust: Metric on the adversarial test images; only for detection and segmentation.
        num_train_images: Number of training images.
        num_validation_images: Number of validation images.
        num_test_images: Number of test images.
        skipped_images: Images that were left out because they cannot be decoded.
        objective: What training minimized; the value of the flag of this name.
        fast: Fast training recipe; the value of the flag of this name.
        epochs: Number of planned passes over the training images.
        gradients_per_image: Mean number of forward and backward passes for an image in one epoch.
        epochs_done: Number of epochs that were run.
        stopped_early: Whether `--patience` ended the training.
        best_epoch: Epoch whose weights were kept, counted from 1; 0 if there was no choice.
        alarms: Warnings about the training.
        validation_value: Validation metric of the epoch that was kept.
        trainable_parameters: Number of parameters that were trained.
        total_parameters: Number of parameters of the classifier.
        weights_sha256: SHA-256 of the classifier's weights.
        seconds: Seconds spent in training, including validation and checkpoints.
        images_per_second: Speed of the training steps in images per second, the median over the epochs.
        seed: Seed of the job.
        versions: Version of each package on which the results depend, by its name.
        flags: All flags of the job, one "--name=value" each.
        baseline: Results of the same job from the standard source.
        comparison: Paired differences between this job and the baseline.
        draw_means: Mean accuracies over the draws of a job with `--draws`; all other values are those of the first.
    """

    task: JobKind | None = None
    task_type: TaskType = "classification"
    dataset: str = ""
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    architecture: str | None = None
    image_size: int | None = None
    resize_size: int | None = None
    downscale: int | None = None
    exif: Exif = "ignore"
    alpha_background: AlphaBackground = "none"
    split_seed: int = 0
    skip_bad_images: bool = False
    source: str | None = None
    transfer_mode: str | None = None
    head: str | None = None
    views: int | None = None
    feature_cache: FeatureCache | None = None
    head_penalty: float | None = None
    metric: str | None = None
    clean_accuracy: float | None = None
    clean_accuracy_interval: Interval | None = None
    mean_per_class_accuracy: float | None = None
    robust_accuracy: float | None = None
    robust_accuracy_interval: Interval | None = None
    robust_accuracy_attack: MeasuredAttack | None = None
    clean: Measures | None = None
    robust: Measures | None = None
    num_train_images: int | None = None
    num_validation_images: int | None = None
    num_test_images: int | None = None
    skipped_images: tuple[str, ...] = ()
    objective: str | None = None
    fast: str | None = None
    epochs: int | None = None
    gradients_per_image: float | None = None
    epochs_done: int | None = None
    stopped_early: bool = False
    best_epoch: int = 0
    alarms: tuple[str, ...] = ()
    validation_value: float | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    weights_sha256: str | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    seed: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    baseline: "JobResults | None" = None
    comparison: Comparison | None = None
    draw_means: DrawMeans | None = None

    @classmethod
    def read(cls, path: pathlib.Path) -> Self | None:
        """Returns the record in a file, or None if there is no such file.

        Raises:
            UserError: The file cannot be read, or is not what a training job writes.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise _wrong(f"{type(error).__name__}: {error}", path) from error
        return cls.from_json(content, path)

    @classmethod
    def from_json(cls, content: Any, path: pathlib.Path | str = FILE_NAME) -> Self:
        """Returns the record in the content of a file.

        Args:
            content: Object that was read from the file.
            path: Path of the file, for messages.

        Raises:
            UserError: A value has another type than a training job writes, or a newer version wrote the file.

        Example:
            >>> results = JobResults.from_json({"clean_accuracy": 0.8, "clean_accuracy_interval": [0.711, 0.867]})
            >>> results.figure("clean_accuracy").in_words
            '80.0% (71.1% to 86.7%)'
        """
        if not isinstance(content, Mapping):
            raise _wrong(type(content).__name__, path)
        _check_format(content, path)
        try:
            return from_json(cls, content)
        except (WrongValueError, RecursionError) as error:
            raise _wrong(str(error), path) from error

    def write(self, path: pathlib.Path) -> None:
        """Writes the record to a file, atomically.

        Raises:
            UserError: The file cannot be written.
        """
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file: an object with the number of its format and all keys."""
        return {"format": FORMAT, **super().to_json(), "classes": list(self.classes) or None}

    def figure(self, name: FigureName) -> Figure:
        """Returns one accuracy with its titles and its interval."""
        if name == "clean_accuracy":
            return Figure(name, "clean accuracy", "clean accuracy", self.clean_accuracy, self.clean_accuracy_interval)
        if name == "mean_per_class_accuracy":
            return Figure(name, "mean-per-class accuracy", "mean per class", self.mean_per_class_accuracy, None)
        attack = self.robust_accuracy_attack.in_words if self.robust_accuracy_attack else "attack"
        if name in ("clean", "robust"):
            measures = (self.clean if name == "clean" else self.robust) or Measures()
            title = metric_title(self.metric or "metric")
            clean = name == "clean"
            return Figure(
                name,
                f"clean {title}" if clean else f"{title} under {attack}",
                f"clean {title}" if clean else attack,
                measures.value,
                measures.interval,
            )
        return Figure(name, f"accuracy under {attack}", attack, self.robust_accuracy, self.robust_accuracy_interval)

    def figures(self) -> list[Figure]:
        """Returns the accuracies that were measured. Mean-per-class accuracy is left out unless it is the metric."""
        if self.task_type != "classification":
            return [self.figure("clean"), *([self.figure("robust")] if self.robust else [])]
        names: list[FigureName] = ["clean_accuracy"]
        if self.metric == "mean_per_class_accuracy":
            names.append("mean_per_class_accuracy")
        if self.robust_accuracy is not None:
            names.append("robust_accuracy")
        return [self.figure(name) for name in names]

    def by_source(self, alone: str) -> dict[str, "JobResults"]:
        """Returns, by title, this job and its baseline (titled by their sources), or this job (titled `alone`)."""
        if self.baseline is None:
            return {alone: self}
        return {"from the robust source": self, "from the standard source": self.baseline}

    def rows(self, alone: str) -> list[tuple[str, list[str]]]:
        """Returns the rows of the table of results: the title of each and its accuracies, in the order of `figures`.

        There is one row for each of `by_source(alone)`, and one with its mean if there are several draws.
        """
        names, rows = [figure.name for figure in self.figures()], []
        for title, results in self.by_source(alone).items():
            rows.append((title, [results.figure(name).in_words for name in names]))
            if means := results.draw_means:
                values = [getattr(means, name) for name in names]
                cells = ["not measured" if value is None else f"{value:.1%}" for value in values]
                rows.append((f"{title}, mean of {means.draws} draws", cells))
        return rows

    def comparison_in_words(self) -> list[str]:
        """Returns a line for each paired difference between a job and its baseline; none without a baseline."""
        if self.baseline is None:
            return []
        if self.comparison is None:
            return [
                "There are no paired differences between the two sources: either their test images differ, or one of "
                "the jobs has no predictions.csv, because an older version ran it."
            ]
        differences = {name: getattr(self.comparison, name, None) for name in typing.get_args(FigureName)}
        draws = self.comparison.draws
        mean = f", mean of {draws} draws" if draws > 1 else ""
        lines = [
            f"{self.figure(name).title}, robust minus standard source{mean}: {in_words(difference)}"
            for name, difference in differences.items()
            if difference is not None
        ]
        return [*lines, DRAWS_NOTE] if draws > 1 else lines

    def check_image_size(self, image_size: int | None, path: pathlib.Path) -> None:
        """Refuses a classifier that takes images of another size, because it must be from another job.

        Args:
            image_size: Side of the classifier's images in pixels; None if it takes any size.
            path: Path of the classifier, for the message.

        Raises:
            UserError: The two sizes differ.
        """
        if None not in (image_size, self.image_size) and image_size != self.image_size:
            raise UserError(
                f"The {FILE_NAME} beside a classifier must be from the same job. Received: {path}, which takes images "
                f"of {image_size} pixels a side, and a {FILE_NAME} that says {self.image_size}. Move one of the two "
                "files to another folder."
            )

    def check_finished(self, path: pathlib.Path) -> None:
        """Refuses a record that lacks values that every finished job has.

        Args:
            path: Path of the file that it was read from, for the message.

        Raises:
            UserError: Keys are missing. The message names them.
        """
        names = _OF_EVERY_FINISHED_JOB
        if self.task_type != "classification":
            names = ["clean", *(name for name in names if "accuracy" not in name)]
        missing = [name for name in names if getattr(self, name) in (None, "")]
        if missing:
            raise UserError(
                f"The {FILE_NAME} of a workdir must have the figures of a finished job. Received: {path} without "
                f"{', '.join(missing)}. Choose another --workdir, or delete this file to run the job again."
            )

    @classmethod
    def completed(cls, content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Returns the object without its format number. Missing keys get their values from the flags that it lists."""
        content = {name: value for name, value in content.items() if name != "format"}
        missing = [name for name in _ALSO_FLAGS if name not in content]
        if missing and content.get("flags") is not None:
            flags = _values_of(content["flags"], where)
            content |= {name: flags[name] for name in missing}
        return content


def metric_title(metric: str) -> str:
    """Returns what a metric of detection or segmentation is called in text."""
    return _METRIC_TITLES.get(metric, metric)


def _check_format(content: Mapping[str, Any], path: pathlib.Path | str) -> None:
    """Refuses a file in a newer format. Files of older versions have no format number."""
    number = content.get("format", FORMAT)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise _wrong(f"format={number!r}", path)
    if number > FORMAT:
        raise UserError(
            f"{path} was written by a newer version of robust_tf: this one reads {FILE_NAME} up to format {FORMAT}. "
            f"Received: format={number}. Update robust_tf."
        )


def _values_of(flags: Any, where: str) -> dict[str, Any]:
    """Returns the values of all flags of a job, by name, from the list of flags in a file."""
    name = f"{where}flags"
    if not isinstance(flags, list | tuple) or not all(isinstance(each, str) for each in flags):
        raise WrongValueError(f"{name}={flags!r}")
    try:
        if any(_FLAGS_OF_ABSL.match(each) for each in flags):
            raise UserError("a job lists neither --help nor --flagfile")
        config, _ = parse_flags(JobConfig, ["train", *flags], announce_former_names=False)
    except UserError as error:
        raise WrongValueError(f"{name} that this version does not know: {error}") from error
    return flat_values(config)


def _wrong(received: str, path: pathlib.Path | str) -> UserError:
    return UserError(
        f"{path} is not what a training job writes. Received: {received}. Move the file to another folder, and pass "
        "its values as flags (--dataset, --labels)."
    )
