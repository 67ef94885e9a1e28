"""Measures what bfloat16 costs in accuracy: the Fashion-MNIST recipe for several seeds in both types, as a table.

    python -m tests.bench.precision_accuracy [--data_dir=TFDS] [--folder=runs/precision_accuracy] [--jobs=6]
        [--seeds=0,1,2] [--seconds=180]

Each cell of the table is a training with configs/fashion_mnist_l2.cfg and an evaluation: clean, under PGD-20 and under
AutoAttack. The cells run side by side and share one GPU. After an interruption, the same command goes on where
it stopped; finished cells are not run again. On two CPU cores, run two cells with one thread each (`--jobs=2`,
TF_NUM_INTRAOP_THREADS=1); `--attack=apgd-ce+apgd-t`, the first two attacks of AutoAttack, is cheaper than all four.
`--dataset=digits --epochs=1 --num_images=8 --jobs=2
--flags="--architecture=resnet8 --subset=400"` tries it out on a CPU.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "fashion_mnist_l2.cfg"
_TITLES = {"autoattack": "AutoAttack"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    precision: str
    seed: int

    def __str__(self) -> str:
        return f"{self.precision}_seed{self.seed}"


def main() -> int:
    """Runs the cells that are missing and prints the table. Returns 1 if a cell is still missing, otherwise 0."""
    arguments = _arguments()
    cells = [Cell(precision, seed) for precision in arguments.precisions for seed in arguments.seeds]
    _prepare(arguments)
    with _Programs(arguments.seconds) as programs, ThreadPoolExecutor(arguments.jobs) as pool:
        failures = list(pool.map(lambda cell: _run_cell(cell, arguments, programs), cells))
    for failure in filter(None, failures):
        print(failure, file=sys.stderr)
    print(table({cell: _measured(cell, arguments) for cell in cells}, cells))
    return int(any(failures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/precision_accuracy"), help="Folder for all files."
    )
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument(
        "--data_dir", default=os.environ.get("TFDS_DATA_DIR", ""), help="Folder of TFDS. Default: $TFDS_DATA_DIR."
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--attack", default="autoattack", help="Attack besides PGD-20, as in robust_tf.evaluate. Default: autoattack."
    )
    parser.add_argument("--num_images", type=int, default=1000, help="Number of test images that the attacks get.")
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2], help="With commas."
    )
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["float32", "mixed_bfloat16"], help="With commas."
    )
    parser.add_argument("--jobs", type=int, default=6, help="Number of cells that run at the same time.")
    parser.add_argument(
        "--flags", type=shlex.split, default=["--nodeterministic"], help="Further flags for all trainings."
    )
    parser.add_argument("--batch_size", type=int, default=500, help="Number of images in a batch of the evaluation.")
    parser.add_argument("--seconds", type=float, default=3600.0, help="Time after which everything stops.")
    return parser.parse_args()


class _Programs:
    """Runs the programs of this package, and stops them when the time is up. Use it in a `with` block."""

    def __init__(self, seconds: float) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # SIGTERM may interrupt the thread that holds it
        self._is_over = False
        self._timer = threading.Timer(seconds, self._stop)

    def __enter__(self) -> "_Programs":
        self._timer.start()
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._stop())
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        signal.signal(signal.SIGTERM, self._before)
        self._stop()

    def run(self, program: str, flags: list[str], log: pathlib.Path) -> str:
        """Runs a program with its output in a file. Returns "" or, if it did not finish, what went wrong."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            with self._lock:
                if self._is_over:
                    return f"{log}: no time was left for it"
                environment = os.environ | {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
                process = subprocess.Popen(
                    [*command(program), *flags], stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code == 0:
            return ""
        if self._is_over:
            return f"{log}: stopped when the time was up"
        return f"{log}: ended with code {code}:\n{log.read_text(encoding='utf-8', errors='replace')[-1500:]}"

    def _stop(self) -> None:
        """Ends everything that runs. Trainings save their state, from which they go on."""
        with self._lock:
            self._is_over = True
            for process in self._running:
                process.terminate()


def command(program: str) -> list[str]:
    """Returns the command of a program of this package."""
    return [sys.executable, "-m", f"robust_tf.{program}"]


def _prepare(arguments: argparse.Namespace) -> None:
    """Prepares the data set before several trainings want to."""
    folder = pathlib.Path(arguments.data_dir or "~/tensorflow_datasets").expanduser()
    if not (folder / arguments.dataset).is_dir():
        place = [f"--data_dir={arguments.data_dir}"] if arguments.data_dir else []
        subprocess.run([*command("data"), f"--prepare={arguments.dataset}", *place], check=True)


def _run_cell(cell: Cell, arguments: argparse.Namespace, programs: _Programs) -> str:
    workdir = arguments.folder / str(cell)
    data = [f"--data_dir={arguments.data_dir}"] if arguments.data_dir else []
    failure = ""
    if not (workdir / "results.json").exists():
        failure = programs.run(
            "train",
            [
                f"--flagfile={CONFIG}",
                f"--dataset={arguments.dataset}",
                f"--epochs={arguments.epochs}",
                f"--precision={cell.precision}",
                f"--seed={cell.seed}",
                f"--workdir={workdir}",
                *data,
                *arguments.flags,
            ],
            arguments.folder / f"{cell}_train.log",
        )
    evaluation = _evaluation(cell, arguments)
    if not failure and not (evaluation / "evaluation.json").exists():
        failure = programs.run(
            "evaluate",
            [
                f"--classifier={workdir / 'classifier.keras'}",
                f"--attack=pgd,{arguments.attack}",
                "--norm=l2",
                "--epsilon=1",
                f"--num_images={arguments.num_images}",
                f"--batch_size={arguments.batch_size}",
                "--num_examples=0",
                f"--output={evaluation}",
                *data,
            ],
            arguments.folder / f"{cell}_evaluate.log",
        )
    return failure


def _evaluation(cell: Cell, arguments: argparse.Namespace) -> pathlib.Path:
    folder: pathlib.Path = arguments.folder / str(cell) / f"evaluation_{arguments.attack}_{arguments.num_images}"
    return folder


def _measured(cell: Cell, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of a cell by their names in the table; empty if it is not finished."""
    try:
        results = json.loads((arguments.folder / str(cell) / "results.json").read_text(encoding="utf-8"))
        evaluation = json.loads((_evaluation(cell, arguments) / "evaluation.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    (entry,) = evaluation["classifiers"]
    (pgd,), (strong,) = (
        [attack for attack in entry["attacks"] if attack["attack"] == name] for name in ("pgd", arguments.attack)
    )
    whole = results["num_test_images"]
    number = entry["clean"]["num_images"]
    return {
        f"clean, {whole:,} images": results["clean_accuracy"],
        f"PGD-20 of the final test, {whole:,} images": results["robust_accuracy"],
        f"clean, {number:,} images": entry["clean"]["accuracy"],
        f"PGD-20, {number:,} images": pgd["accuracy"],
        f"{_TITLES.get(arguments.attack, arguments.attack)}, {number:,} images": strong["accuracy"],
    }


def table(measured: dict[Cell, dict[str, float]], cells: list[Cell]) -> str:
    """Returns the table in Markdown: a row for each accuracy, with its mean and its seeds in each precision.

    Args:
        measured: Accuracies of each cell by their names; empty where a cell is not finished.
        cells: All cells, in the order of the table.
    """
    precisions = list(dict.fromkeys(cell.precision for cell in cells))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(cell.seed for cell in cells))
    names = list(dict.fromkeys(name for figures in measured.values() for name in figures))
    heads = [f"{precision}: mean (seeds {seeds})" for precision in precisions]
    heads += [f"{precision} - {precisions[0]}, points (by seed)" for precision in precisions[1:]]
    lines = [f"| accuracy | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in names:
        columns = {
            precision: {cell.seed: measured[cell].get(name) for cell in cells if cell.precision == precision}
            for precision in precisions
        }
        parts = [_mean(list(column.values()), ".1%") for column in columns.values()]
        first = columns[precisions[0]]
        for precision in precisions[1:]:
            pairs = [(other, first.get(seed)) for seed, other in columns[precision].items()]
            parts.append(_mean([None if None in pair else 100 * (pair[0] - pair[1]) for pair in pairs], "+.1f"))
        lines.append(f"| {name} | {' | '.join(parts)} |")
    return "\n".join(lines)


def _mean(values: list[Any], form: str) -> str:
    """Returns the mean and, in parentheses, the values. There is no mean while one of them is missing."""
    shown = ", ".join("missing" if value is None else format(value, form) for value in values)
    return f"{'' if None in values else format(statistics.mean(values), form)} ({shown})".strip()


if __name__ == "__main__":
    sys.exit(main())
