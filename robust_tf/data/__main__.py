"""Data sets on this machine: what is there and in order, and getting what is not.

python -m robust_tf.data --check                      # a table of all that have a name
python -m robust_tf.data --check pets folder:photos   # these in detail, with exit code 1 if one is not ready
python -m robust_tf.data --prepare=pets               # download and prepare
"""

import dataclasses
import sys
from collections.abc import Iterable

from absl import logging

from robust_tf.data.dataset_check import Diagnosis, diagnose
from robust_tf.data.datasets import DATASETS
from robust_tf.data.open_dataset import data_folder, open_dataset
from robust_tf.data.records import shown
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag, parse_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What to do. See `--help` for each field."""

    check: bool = flag(False, "Examine the data sets that are named, or all.")
    prepare: str = flag("", "Name of a data set to download and prepare; one that is prepared is left as it is.")
    data_dir: str = flag("", "TFDS folder. Default: TFDS's own.")

    def __post_init__(self) -> None:
        if self.check == bool(self.prepare):
            raise UserError("Either --check or --prepare=NAME is needed. Use --help for more.")


def main(argv: list[str]) -> int:
    """Runs the command line; the exit code is 1 if a data set that was named is not ready."""
    flags, names = parse_flags(DataFlags, argv, usage=__doc__ or "")
    data_dir = data_folder(flags.data_dir)
    if flags.prepare:
        if names:
            raise UserError(f"--prepare takes one data set. Received: {' '.join([flags.prepare, *names])}.")
        open_dataset(flags.prepare, data_dir)
        names = [flags.prepare]
    if not names:
        _print_table(diagnose(name, data_dir, thorough=False) for name in DATASETS)
        return 0
    ready = True
    for name in names:
        diagnosis = diagnose(name, data_dir)
        print(_text(diagnosis), flush=True)  # some take their time
        ready = ready and diagnosis.state == "ready"
    return 0 if ready else 1


def _print_table(diagnoses: Iterable[Diagnosis]) -> None:
    """One line for each data set; what to do about it is told for a name."""
    width = max(map(len, DATASETS)) + 2
    print(f"{'name':{width}}{'state':14}size")
    for diagnosis in diagnoses:
        print(f"{diagnosis.name:{width}}{diagnosis.state:14}{diagnosis.size}".rstrip(), flush=True)
    print("\nDetails and what to do: python -m robust_tf.data --check NAME ...")


def _text(diagnosis: Diagnosis) -> str:
    lines = [f"{diagnosis.name}: {diagnosis.state}", *(f"    {fact}" for fact in diagnosis.facts if fact)]
    return "\n".join(map(shown, [*lines, *(f"  - {line}" for line in diagnosis.advice)]))


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS warns of folders that are not there yet
    with exit_on_user_error():
        sys.exit(main(sys.argv))
