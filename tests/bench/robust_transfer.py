"""Attacks the classifiers of configs/study_robust_transfer.cfg with AutoAttack and compares the two recipes.

    python -m robust_tf.study --flagfile=configs/study_robust_transfer.cfg --workers=2
    python -m tests.bench.robust_transfer [--folder=runs/study_robust_transfer] [--num_images=500] [--epsilons=0.5]

For each cell of the study it runs `robust_tf.evaluate --attack=autoattack`, whose finished attacks are not run again.
Each line gives the mean over the source seeds with its 95 % t-interval. The differences are paired by source seed.
"""

import argparse
import collections
import csv
import json
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import stats

RECIPES = {"fixed_feature": "head first, then everything", "full_network": "everything from the start"}
MEASURES = ("clean_accuracy", "robust_accuracy")
# Accuracies by (epsilon of the source, transfer mode), then by source seed.
Table = dict[tuple[str, str], dict[int, float]]


def main() -> None:
    """Evaluates all classifiers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/study_robust_transfer"))
    parser.add_argument("--num_images", type=int, default=500, help="number of test images")
    parser.add_argument("--epsilons", default="0.5", help="L2 radius of the attack")
    parser.add_argument("--source_epsilons", default="", help="only these sources, separated by commas; all by default")
    parser.add_argument("--data_dir", default="", help="folder of TensorFlow Datasets")
    parser.add_argument("--at_once", type=int, default=2, help="number of evaluations that run side by side")
    arguments = parser.parse_args()
    with (arguments.folder / "cells.csv").open(encoding="utf-8") as file:
        cells = [row for row in csv.DictReader(file) if row["accuracy"]]
    only = arguments.source_epsilons.split(",") if arguments.source_epsilons else []
    cells = [cell for cell in cells if not only or cell["source_epsilon"] in only]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        measured = list(pool.map(lambda cell: evaluated(arguments, cell), cells))
    tables: dict[str, Table] = {name: collections.defaultdict(dict) for name in MEASURES}
    for cell, values in zip(cells, measured, strict=True):
        for name in MEASURES:
            key = cell["source_epsilon"], cell["transfer_mode"]
            tables[name][key][int(cell["source_seed"])] = 100 * values[name]
    for name, table in tables.items():
        print(f"TRANSFER {name}, {arguments.num_images} images, L2 {arguments.epsilons}, in %:")
        for (epsilon, mode), by_seed in sorted(table.items()):
            print(f"TRANSFER   source epsilon {epsilon}, {RECIPES[mode]}: {in_words(by_seed)}")
        for epsilon in sorted({epsilon for epsilon, _ in table}):
            first, second = (table[epsilon, mode] for mode in RECIPES)
            difference = {seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}
            print(f"TRANSFER   source epsilon {epsilon}, first recipe minus second: {in_words(difference, sign='+')}")


def evaluated(arguments: argparse.Namespace, cell: dict[str, str]) -> dict[str, float]:
    """Attacks the classifier of a cell and returns its accuracies, as fractions."""
    workdir = arguments.folder / "cells" / cell["cell"]
    command = [sys.executable, "-m", "robust_tf.evaluate", f"--classifier={workdir / 'classifier.keras'}"]
    command += ["--attack=autoattack", "--norm=l2", f"--epsilon={arguments.epsilons}", "--num_examples=0"]
    command += [f"--num_images={arguments.num_images}", f"--data_dir={arguments.data_dir}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    evaluation = json.loads((workdir / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    (entry,) = evaluation["classifiers"]
    return {"clean_accuracy": entry["clean"]["accuracy"], "robust_accuracy": entry["attacks"][-1]["accuracy"]}


def in_words(by_seed: dict[int, float], *, sign: str = "") -> str:
    """Returns a mean over source seeds with its t-interval and the values."""
    values = np.array([by_seed[seed] for seed in sorted(by_seed)])
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if values[1:].size else np.nan
    each = ", ".join(f"{value:{sign}.1f}" for value in values)
    return f"{values.mean():{sign}.1f} +- {half:.1f} ({each})"


if __name__ == "__main__":
    main()
