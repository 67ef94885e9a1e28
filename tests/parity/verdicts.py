"""Compares the verdicts of two evaluations of the same classifier, such as one on a GPU and one on a CPU.

    python -m robust_tf.evaluate --output=cpu --jit_compile=false [the other flags]
    python -m robust_tf.evaluate --output=gpu [the same flags]
    python -m tests.parity.verdicts cpu gpu

A verdict is whether an image resists a cascade of attacks at one epsilon. The program exits with 1 if more of them
differ than `--allowed` says. It also counts the images that another attack of the cascade has felled. That is no
difference in verdict, and it depends on rounding.
"""

import argparse
import json
import pathlib
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each attack and epsilon, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=pathlib.Path, help="folders that robust_tf.evaluate wrote")
    parser.add_argument("--allowed", type=int, default=0, help="number of differing verdicts up to which all is well")
    options = parser.parse_args(argv)
    one, other = (json.loads((each / "evaluation.json").read_text())["classifiers"] for each in options.folders)
    differing = 0
    compared = 0
    for left, right in zip(one, other, strict=True):
        for key in ("weights_sha256", "image_ids"):
            if left[key] != right[key]:
                print(f"The two evaluations cannot be compared: {key} differs.")
                return 2
        rows = {(row["attack"], row["norm"], row["epsilon"]): row for row in right["attacks"]}
        for row in left["attacks"]:
            name = (row["attack"], row["norm"], row["epsilon"])
            if name not in rows:
                continue
            before, after = felled_by(row), felled_by(rows[name])
            flipped = sorted(before.keys() ^ after.keys())
            by_another = sum(before[image] != after[image] for image in before.keys() & after.keys())
            print(
                f"{left['classifier']}, {name[0]}, {name[1]} {name[2]:g}: accuracy {row['accuracy']:.4f} and "
                f"{rows[name]['accuracy']:.4f} of {len(left['image_ids'])} images; {len(flipped)} verdicts differ"
                f"{f' (images {flipped})' if flipped else ''}; {by_another} images fell to another attack"
            )
            differing += len(flipped)
            compared += 1
    if not compared:
        print("The two evaluations have no attack in common.")
        return 2
    return int(differing > options.allowed)


def felled_by(row: dict[str, Any]) -> dict[int, str]:
    """Returns the name of the attack for each image that does not resist."""
    return {image: name for attacks in row["fell"].values() for name, images in attacks.items() for image in images}


if __name__ == "__main__":
    sys.exit(main())
