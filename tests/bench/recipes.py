"""Compares the recipes of adversarial training: time, clean accuracy and AutoAttack accuracy, as a Markdown table.

    python -m tests.bench.recipes [--data_dir=TFDS] [--epochs=12] [--folder=runs/recipes] [--quick]

The recipes are trained one after the other, each by `robust_tf.train` in a new process. Then `robust_tf.evaluate`
attacks each of them. After an interruption, the same command continues where it stopped, and recipes that are finished
are not run again. The seconds are for the training steps alone, at the median speed of the epochs, without validation
and without the first step, which includes tracing. `--quick --dataset=digits` takes minutes.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

# The flags of each recipe. Those that all recipes share are in `_train`.
RECIPES: dict[str, list[str]] = {
    "PGD-7": [],
    "FGSM": ["--fast=fgsm"],
    "free": ["--fast=free"],
    "epsilon_warmup": ["--fast=epsilon_warmup"],
    "TRADES": ["--objective=trades"],
    "AWP": ["--objective=awp"],
}
QUICK = ["--epochs=2", "--subset=256", "--attack_steps=2"]
QUICK_IMAGES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--data_dir", default="", help="Folder of TFDS. Default: the one that TFDS uses.")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/recipes"), help="Folder for all files."
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="Names of recipes, separated by commas.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--subset", default="", help="Number or share of the training images. Default: all.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--norm", default="l2")
    parser.add_argument("--epsilon", default="1")
    parser.add_argument("--num_images", type=int, default=1000, help="Number of test images that AutoAttack attacks.")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--quick", action="store_true", help="Train briefly on few images, only to see that it runs.")
    arguments = parser.parse_args()
    names = arguments.recipes.split(",")
    for name in names:
        if name not in RECIPES:
            parser.error(f"--recipes: one of {', '.join(RECIPES)}. Received: {name!r}.")
    for name in names:
        _train(name, arguments.folder / name, arguments)
    rows = {name: _row(arguments.folder / name, arguments) for name in names}
    print("\n" + _table(rows))


def _train(name: str, workdir: pathlib.Path, arguments: argparse.Namespace) -> None:
    one_step = name in ("FGSM", "free")
    common = [
        f"--workdir={workdir}",
        f"--dataset={arguments.dataset}",
        f"--data_dir={arguments.data_dir}",
        "--architecture=resnet20",
        f"--norm={arguments.norm}",
        f"--epsilon={arguments.epsilon}",
        f"--batch_size={arguments.batch_size}",
        f"--learning_rate={arguments.batch_size / 640:g}",  # 0.2 at 128
        "--lr_schedule=cyclic",
        "--weight_decay=5e-4",
        f"--precision={arguments.precision}",
        "--eval_epsilon=0",  # AutoAttack measures the robustness
        f"--epochs={arguments.epochs}",
        *([f"--subset={arguments.subset}"] if arguments.subset else []),
        *([] if one_step else ["--attack_steps=7"]),
    ]
    quick = [flag for flag in QUICK if not (one_step and flag.startswith("--attack_steps"))]
    _run("train", [*common, *RECIPES[name], *(quick if arguments.quick else [])])


def _row(workdir: pathlib.Path, arguments: argparse.Namespace) -> dict[str, Any]:
    num_images = QUICK_IMAGES if arguments.quick else arguments.num_images
    output = workdir / f"autoattack_{num_images}"
    flags = [f"--classifier={workdir / 'classifier.keras'}", f"--data_dir={arguments.data_dir}"]
    flags += ["--attack=autoattack", f"--norm={arguments.norm}", f"--epsilon={arguments.epsilon}"]
    flags += [f"--num_images={num_images}", f"--output={output}"]
    if not (output / "evaluation.json").exists():
        _run("evaluate", flags)
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["classifiers"][0]
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    images = results["epochs"] * results["num_train_images"]
    return {"results": results, "seconds": images / _speed(workdir), "autoattack": evaluation["attacks"][0]}


def _speed(workdir: pathlib.Path) -> float:
    """Training speed in images per second, the median over the epochs."""
    events = EventAccumulator(str(workdir / "tensorboard" / "train"), size_guidance={"tensors": 0}).Reload()
    epochs = events.Tensors("epoch/images_per_second")
    return statistics.median(float(tensor_util.make_ndarray(epoch.tensor_proto)) for epoch in epochs)


def _run(program: str, flags: list[str]) -> None:
    print(f"\n$ python -m robust_tf.{program} {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, "-m", f"robust_tf.{program}", *flags], check=True)


def _table(rows: dict[str, dict[str, Any]]) -> str:
    first = next(iter(rows.values()))
    results, autoattack = first["results"], first["autoattack"]
    lines = [
        f"{results['architecture']} on {results['dataset']}, {results['num_train_images']} training images, "
        f"{autoattack['norm']} {autoattack['epsilon']:.4g}. Gradients: forward and backward passes for each training "
        "image over the whole training. Intervals: 95 % (Wilson).",
        "",
        f"| recipe | training steps, s | ratio to {next(iter(rows))} | gradients | best epoch "
        f"| clean accuracy ({results['num_test_images']} images) "
        f"| AutoAttack accuracy ({autoattack['num_images']} images) | alarms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        job, attack = row["results"], row["autoattack"]
        cells = [
            name,
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{job['epochs'] * job['gradients_per_image']:g}",
            f"{job['best_epoch']} of {job['epochs']}",
            _share(job["clean_accuracy"], job["clean_accuracy_interval"]),
            _share(attack["accuracy"], attack["interval"]),
            str(len(job["alarms"])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(value: float, interval: list[float]) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


if __name__ == "__main__":
    main()
