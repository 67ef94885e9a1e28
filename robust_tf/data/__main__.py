"""Lists the data sets on this machine, checks them, and downloads and prepares them.

python -m robust_tf.data --check                      # a table of all data sets that have a name
python -m robust_tf.data --check pets folder:photos   # these two in detail; exit code 1 if one is not ready
python -m robust_tf.data --prepare=pets               # download and prepare a data set
python -m robust_tf.data --check --task_type=detection folder:trees   # images with boxes
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from robust_tf.config.checks import check_choices
from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag, parse_flags

if TYPE_CHECKING:
    from robust_tf.data.dataset_check import CheckResult


TaskType = Literal["classification", "detection", "segmentation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The flags of this program. See `--help` for each of them."""

    check: bool = flag(False, "Check the data sets named after the flags, or list all of them if none is named.")
    prepare: str = flag(
        "", "Name of a data set to download and prepare. A data set that is already prepared is left unchanged."
    )
    task_type: TaskType = flag(
        "classification",
        "What the data sets are for. Detection needs images with boxes, and segmentation images with masks.",
    )
    data_dir: str = flag("", "Folder of TensorFlow Datasets. Default: ~/tensorflow_datasets.")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.check == bool(self.prepare):
            raise UserError("Either --check or --prepare=NAME is needed. Use --help for more.")


def main(argv: list[str]) -> int:
    """Runs the command line.

    Args:
        argv: Name of the program and its arguments.

    Returns:
        The exit code: 1 if one of the named data sets is not ready, otherwise 0.
    """
    flags, names = parse_flags(DataFlags, argv, usage=__doc__ or "")

    # Only now, so that `--help` and a wrong flag do not wait for TensorFlow.
    start_tensorflow()
    from robust_tf.data.boxes.open_boxes import open_boxes
    from robust_tf.data.dataset_check import check_dataset
    from robust_tf.data.datasets import DATASETS
    from robust_tf.data.masks.open_masks import open_masks
    from robust_tf.data.open_dataset import data_folder, open_dataset

    data_dir = data_folder(flags.data_dir)
    if flags.prepare:
        if names:
            raise UserError(f"--prepare takes one data set. Received: {' '.join([flags.prepare, *names])}.")
        openers: dict[str, Callable[..., object]] = {
            "classification": open_dataset,
            "detection": open_boxes,
            "segmentation": open_masks,
        }
        openers[flags.task_type](flags.prepare, data_dir)
        names = [flags.prepare]
    if not names and flags.task_type != "classification":
        raise UserError(
            f"--task_type={flags.task_type} needs the names of data sets to check. Received: none. Add folder:/path or "
            "tfds:NAME."
        )
    if not names:
        _print_table(
            (check_dataset(name, data_dir, thorough=False) for name in DATASETS), width=max(map(len, DATASETS)) + 2
        )
        return 0
    ready = True
    for name in names:
        result = check_dataset(name, data_dir, task_type=flags.task_type)
        print(_text(result), flush=True)  # at once, since the next data set may take a while
        ready = ready and result.state == "ready"
    return 0 if ready else 1


def _print_table(results: "Iterable[CheckResult]", *, width: int) -> None:
    """Prints one line for each data set. `width` is the width of the first column, in characters."""
    print(f"{'name':{width}}{'state':14}size")
    for result in results:
        print(f"{result.name:{width}}{result.state:14}{result.size}".rstrip(), flush=True)
    print("\nDetails and what to do: python -m robust_tf.data --check NAME ...")


def _text(result: "CheckResult") -> str:
    from robust_tf.data.records import printable

    lines = [f"{result.name}: {result.state}", *(f"    {fact}" for fact in result.facts if fact)]
    return "\n".join(map(printable, [*lines, *(f"  - {line}" for line in result.advice)]))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv))
