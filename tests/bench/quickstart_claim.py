"""Measures over several source seeds whether the quickstart's robust source transfers better than its standard source.

    python -m tests.bench.quickstart_claim [--seeds=4,5,6,7,8,9] [--epsilons=0,2] [--draws=5] [--folder=runs/claim]

For each source seed it trains the source of configs/quickstart_source.cfg for each epsilon; epsilon 0 is its standard
twin. Then it fits heads for several draws of the labeled images, as configs/quickstart.cfg does, and measures the clean
accuracy on all draws and the accuracy under the attack on the first `--attacked` ones. Jobs that are finished are not
run again. The interval of a mean is a t-interval over the means of the source seeds, so it covers other seeds of the
source, but not other test images. TensorFlow reads the number of its threads and TF_ENABLE_ONEDNN_OPTS from the
environment: give each setting its own --folder.
"""

import argparse
import pathlib
import statistics
import time

import numpy as np
import tensorflow as tf
from scipy import stats

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.job.run import run_job
from robust_tf.sharing import sharing

CONFIGS = pathlib.Path("configs")
MEASURES = ("clean_accuracy", "robust_accuracy")
# Accuracies by (source seed, epsilon, draw).
Accuracies = dict[tuple[int, float, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="4,5,6,7,8,9", help="Seeds of the sources.")
    parser.add_argument("--epsilons", default="0,2", help="Epsilons of the sources; 0 is the standard twin.")
    parser.add_argument("--draws", type=int, default=5, help="Number of draws of the labeled images.")
    parser.add_argument("--attacked", type=int, default=2, help="Number of draws that are attacked.")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/claim"))
    arguments = parser.parse_args()
    tf.config.experimental.enable_op_determinism()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    epsilons = [float(epsilon) for epsilon in arguments.epsilons.split(",")]
    accuracies: dict[str, Accuracies] = {name: {} for name in MEASURES}
    with sharing():
        for seed in seeds:
            for epsilon in epsilons:
                start = time.perf_counter()
                workdir = _source(arguments.folder, seed, epsilon)
                trained = time.perf_counter()
                for draw in range(arguments.draws):
                    accuracies["clean_accuracy"][seed, epsilon, draw] = _clean(arguments.folder, workdir, draw)
                for draw in range(arguments.attacked):
                    accuracies["robust_accuracy"][seed, epsilon, draw] = _robust(arguments.folder, workdir, draw)
                seconds = f"{trained - start:.0f} s and {time.perf_counter() - trained:.0f} s"
                print(f"CLAIM source seed {seed}, epsilon {epsilon:g}: {seconds}", flush=True)
            for epsilon in epsilons:
                if epsilon:
                    report(accuracies, epsilon)


def _source(folder: pathlib.Path, seed: int, epsilon: float) -> pathlib.Path:
    workdir = folder / f"source{seed}_eps{epsilon:g}"
    source = read_flag_file(CONFIGS / "quickstart_source.cfg").with_flags(seed=seed, workdir=str(workdir))
    source = source.with_flags(outputs="classifier")
    run_job(source.with_flags(epsilon=epsilon) if epsilon else source.standard_twin())
    return workdir


def _transfer(folder: pathlib.Path, source: pathlib.Path, name: str, draw: int) -> JobConfig:
    return read_flag_file(CONFIGS / "quickstart.cfg").with_flags(
        source=str(source / "classifier.keras"),
        workdir=str(folder / f"{source.name}_{name}{draw}"),
        cache_dir=str(folder / "cache"),
        seed=draw,
        outputs="results",
        baseline=False,
        export_dir="",
    )


def _clean(folder: pathlib.Path, source: pathlib.Path, draw: int) -> float:
    accuracy = run_job(_transfer(folder, source, "clean", draw).with_flags(eval_epsilon=0.0)).clean_accuracy
    assert accuracy is not None
    return accuracy


def _robust(folder: pathlib.Path, source: pathlib.Path, draw: int) -> float:
    accuracy = run_job(_transfer(folder, source, "robust", draw)).robust_accuracy
    assert accuracy is not None
    return accuracy


def report(accuracies: dict[str, Accuracies], epsilon: float) -> None:
    """Prints the paired differences between the sources of one epsilon and the standard sources."""
    print(f"CLAIM epsilon {epsilon:g} minus epsilon 0, in points:")
    for name, values in accuracies.items():
        pairs = {
            (seed, draw): (value, values[seed, 0.0, draw])
            for (seed, each, draw), value in values.items()
            if each == epsilon and (seed, 0.0, draw) in values
        }
        if not pairs:
            continue
        by_seed: dict[int, list[float]] = {}
        for (seed, _), (ours, theirs) in pairs.items():
            by_seed.setdefault(seed, []).append(100 * (ours - theirs))
        means = [statistics.fmean(each) for each in by_seed.values()]
        half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5 if means[1:] else np.nan
        ours, theirs = (statistics.fmean(column) for column in zip(*pairs.values(), strict=True))
        wins = sum(first > second for first, second in pairs.values())
        print(
            f"CLAIM   {name}: {ours:.1%} and {theirs:.1%}, {statistics.fmean(means):+.1f} +- {half:.1f} over "
            f"{len(means)} source seeds, {wins} wins of {len(pairs)}; by source seed "
            f"{', '.join(f'{seed}: {statistics.fmean(each):+.1f}' for seed, each in by_seed.items())}",
            flush=True,
        )


if __name__ == "__main__":
    main()
