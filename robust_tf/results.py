"""What a training job's `results.json` tells the other programs, read by name and checked in one place.

The file holds the figures and flags of a job; `JobRecord` has what decides how its classifier is to be used.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from robust_tf.config.data import AlphaBackground, Exif
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.flags import flat_values, parse_flags

FILE_NAME = "results.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """How a classifier was made. What the file doesn't tell has the value below.

    Attributes:
        dataset: name of the data set.
        classes: labels that were kept, in the order of the logits; empty: all.
        class_names: in the order of the logits.
        image_size: side of the images, in pixels.
        resize_size: what the shorter side of an image is resized to before the centre crop.
        downscale: what the shorter side is reduced to before everything else.
        split_seed: which images of a folder without a test part are one.
        skip_bad_images: images that cannot be decoded were left out.
        exif, alpha_background: how EXIF rotation and transparency are treated, as in the flags of these names.
        norm, epsilon: of the attack that it was evaluated under.
    """

    dataset: str = ""
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    image_size: int | None = None
    resize_size: int | None = None
    downscale: int | None = None
    split_seed: int = 0
    skip_bad_images: bool = False
    exif: Exif = "ignore"
    alpha_background: AlphaBackground = "none"
    norm: str | None = None
    epsilon: float | None = None

    def check_image_size(self, image_size: int | None, path: pathlib.Path) -> None:
        """Refuses a record beside a classifier, at `path`, that takes images of another size."""
        if None not in (image_size, self.image_size) and image_size != self.image_size:
            raise UserError(
                f"The {FILE_NAME} beside a classifier must be of the same job. Received: {path} for images of "
                f"{image_size} pixels a side, and a {FILE_NAME} that says {self.image_size}. Move one of the two away."
            )


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Everything that a `results.json` holds; empty when there is no such file.

    Raises:
        UserError: it can't be read, or is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(f"{type(error).__name__}: {error}", path) from error
    if not isinstance(results, dict):
        raise _wrong(type(results).__name__, path)
    return results


def read_job_record(path: pathlib.Path) -> JobRecord:
    """The record in a `results.json`; an empty one when there is no such file.

    Raises:
        UserError: the file is not what a training job writes.
    """
    return job_record(read_results(path), path)


def job_record(results: Mapping[str, Any], path: pathlib.Path | str = FILE_NAME) -> JobRecord:
    """The record in what a `results.json` holds. `path` is for messages.

    Raises:
        UserError: a value is of another type than a training job writes.
    """
    flags = functools.cache(functools.partial(_flags, results, path))

    def value(name: str, is_right: Callable[[Any], bool]) -> Any:
        # The keys of the file go first; flags without a key stand in its list of all flags.
        found = results[name] if name in results else flags().get(name)
        if found is not None and not is_right(found):
            raise _wrong(f"{name}={found!r}", path)
        return found

    attack = value("robust_accuracy_attack", lambda found: isinstance(found, Mapping)) or {}
    norm, epsilon = attack.get("norm"), attack.get("epsilon")
    if not (norm is None or isinstance(norm, str)) or not (epsilon is None or _is_number(epsilon)):
        raise _wrong(f"robust_accuracy_attack={attack!r}", path)
    return JobRecord(
        dataset=value("dataset", _is_text) or "",
        classes=tuple(value("classes", _all(_is_count)) or ()),
        class_names=tuple(value("class_names", _all(_is_text)) or ()),
        image_size=value("image_size", _is_count),
        resize_size=value("resize_size", _is_count),
        downscale=value("downscale", _is_count),
        split_seed=value("split_seed", _is_count) or 0,
        skip_bad_images=bool(value("skip_bad_images", lambda found: isinstance(found, bool))),
        exif=value("exif", lambda found: found in ("ignore", "apply")) or "ignore",
        alpha_background=value("alpha_background", lambda found: found in ("none", "white", "black")) or "none",
        norm=norm,
        epsilon=epsilon,
    )


def _flags(results: Mapping[str, Any], path: pathlib.Path | str) -> dict[str, Any]:
    """The flags of the job by name, empty where the file has none."""
    if "flags" not in results:
        return {}
    try:
        config, _ = parse_flags(JobConfig, ["train", *results["flags"]], announce_former_names=False)
    except (UserError, TypeError) as error:
        raise _wrong(f"flags that this version does not know: {error}", path) from error
    return flat_values(config)


def _wrong(received: str, path: pathlib.Path | str) -> UserError:
    return UserError(
        f"{path} is not what a training job writes. Received: {received}. Move it away, and tell by flags what it "
        "told (--dataset, --labels)."
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _all(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and all(map(is_right, values))
