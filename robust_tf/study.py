"""Runs a study: a grid of transfer jobs, with statistics that say whether robust sources transfer better.

    python -m robust_tf.study --flagfile=configs/study_digits.cfg [--workdir=W] [any flag of the study or its jobs]

Finished cells are kept, so that the same command continues a study that was stopped.
"""

import pathlib
import sys
from collections.abc import Sequence

from robust_tf.config.study import StudyConfig
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag_file_name, parse_flags


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and runs the study that they describe."""
    study, rest = parse_flags(StudyConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    workdir = pathlib.Path(study.job.run.workdir or pathlib.Path("runs") / (flag_file_name(argv) or "study"))
    # TensorFlow is imported only now, so that --help and error messages about flags do not have to wait for it.
    from robust_tf.studies.program import run

    if code := run(study, argv[1:], workdir):
        raise SystemExit(code)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
