"""Draws what a classifier looks at, on its own or next to another one.

    python -m robust_tf.visualize --classifier=robust.keras --compare=standard.keras --kind=gradients --output=x.png

--kind=gradients draws the gradient of the loss with respect to each pixel. --kind=inversion draws noise that was
optimized until it has the features of the image. --kind=perturbations draws adversarial examples with a large epsilon.
With a robust classifier, all three show the objects in the images.
"""

import sys
from collections.abc import Sequence

from robust_tf.config.visualization import VisualizeConfig
from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import parse_flags


def main(argv: Sequence[str]) -> None:
    """Runs the program: reads the flags, then draws and writes one picture."""
    config, rest = parse_flags(VisualizeConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    start_tensorflow()  # which takes seconds, so only after the flags have been checked
    from robust_tf.evaluation.visualization import run_visualization

    run_visualization(config)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
