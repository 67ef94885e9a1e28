"""Compares training the head of a frozen backbone on images and on cached features, in time and in accuracy.

    python -m tests.bench.features --source=SOURCE.keras [--dataset=digits] [--views=4] [--seeds=3] [--epochs=150]

The recipe is the reference's: SGD, batch 64, a learning rate of 0.01 that is divided by 10 every 50 epochs,
momentum 0.9 and weight decay 5e-4 (Salman et al. 2020, appendix A.2). The jobs run one after the other, as with
`train`. The features are computed again for each seed, and this time counts. The jobs called "features stored" then
find them in the cache.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.job.run import run_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="The classifier.keras of a finished job.")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=150)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in range(arguments.seeds):
            for name, flags in _cases(arguments.views).items():
                rows.setdefault(name, []).append(_run(arguments, pathlib.Path(folder), name, seed, flags))
    _report(rows, arguments)


def _cases(views: int) -> dict[str, dict[str, Any]]:
    cached = {"features": "cached", "views": views}
    return {
        "images, SGD": {},
        "features, SGD": cached,
        "features stored, SGD": cached,
        "features stored, L-BFGS": {**cached, "head": "lbfgs"},
        "features stored, ridge": {**cached, "head": "ridge"},
    }


def _run(
    arguments: argparse.Namespace, folder: pathlib.Path, name: str, seed: int, flags: dict[str, Any]
) -> dict[str, Any]:
    workdir = folder / f"{name} {seed}"
    config = JobConfig.from_flags(
        task="transfer",
        source=arguments.source,
        dataset=arguments.dataset,
        data_dir=arguments.data_dir,
        workdir=str(workdir),
        cache_dir=str(folder / "cache"),
        seed=seed,
        epochs=arguments.epochs,
        batch_size=64,
        learning_rate=0.01,
        lr_schedule="step",
        lr_step_epochs=50,
        **flags,
    )
    start = time.perf_counter()
    run_job(config)
    seconds = time.perf_counter() - start
    return {**json.loads((workdir / "results.json").read_text(encoding="utf-8")), "job_seconds": seconds}


def _report(rows: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    first = rows["images, SGD"]
    print(
        f"\n{arguments.dataset}, {first[0]['num_train_images']} training and {first[0]['num_test_images']} test "
        f"images, {first[0]['architecture']} at {first[0]['image_size']} pixels, {arguments.epochs} epochs, "
        f"{arguments.views} views, mean of {arguments.seeds} seeds"
    )
    print(f"{'':26}{first[0]['metric']:>24}{'difference':>12}{'training s':>12}{'speed-up':>12}{'whole job s':>13}")
    for name, results in rows.items():
        value, reference = (_mean(each, _metric_key(each[0])) for each in (results, first))
        seconds, reference_seconds = _mean(results, "seconds"), _mean(first, "seconds")
        print(
            f"{name:26}{value:24.2%}{100 * (value - reference):+12.2f}{seconds:12.1f}"
            f"{reference_seconds / max(seconds, 1e-9):12.1f}{_mean(results, 'job_seconds'):13.1f}"
        )


def _metric_key(results: dict[str, Any]) -> str:
    return {"accuracy": "clean_accuracy"}.get(results["metric"], results["metric"])


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


if __name__ == "__main__":
    main()
