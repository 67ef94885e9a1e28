"""Evaluates a classifier: clean and robust accuracy, calibration and common corruptions, in numbers and pictures.

    python -m robust_tf.evaluate --classifier=runs/robust/classifier.keras --attack=autoattack --epsilon=0,0.25,0.5,1

Several epsilons give a robustness curve. If the program is stopped or killed, the same command continues where it
stopped and ends with the same evaluation.json. You can add attacks, epsilons and corruptions to a finished evaluation.

    python -m robust_tf.evaluate --classifier=runs/robust/classifier.keras --artifact=exports/pets/1,exports/pets/onnx

This also measures exports of the classifier, in any format of `robust_tf.export`, or a running server by its address.
"""

import sys
from collections.abc import Sequence

from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.environment import start_tensorflow, use_xla_cache
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.files import cache_folder
from robust_tf.flags import parse_flags


def main(argv: Sequence[str]) -> None:
    """Runs the program: reads the flags, then writes evaluation.json and pictures and prints a table."""
    config, rest = parse_flags(EvaluateConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    if config.jit_compile != "false":
        use_xla_cache(cache_folder(None), tf32=config.tf32)
    start_tensorflow()  # which takes seconds, so only after the flags have been checked
    from robust_tf.evaluation.run import run_evaluation

    run_evaluation(config)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
