"""Compares training steps on one GPU with PyTorch: images per second as ratios, peak memory, first call, largest batch.

    python -m tests.bench.gpu_step --shape=resnet50_224 --batches=128,256 [--programs=xla,graph,torch,torch_compile]
        [--precisions=bfloat16,float32] [--torch_python=python3] [--largest] [--seconds=300] [--json=figures.jsonl]

Each program runs in its own process; --torch_python is a Python with torch and torchvision, which need not be in the
environment of TensorFlow. Once all steps of a kind are compiled, they take turns, so that a busy moment of the machine
slows down all of them. `--device=CPU --shape=tiny` tries out the benchmark itself.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.step_process import StepFailure, StepProcess, StepSettings, torch_process
from tests.bench.timing import interleaved

# Architecture, classes, image size, attack steps, epsilon and step size.
SHAPES = {
    "resnet50_224": ("resnet50", 1000, 224, 3, 3.0, 2.0),
    "cifar_resnet18_32": ("cifar_resnet18", 10, 32, 7, 0.5, 0.1),
    "tiny": ("cifar_resnet18", 10, 8, 2, 0.5, 0.1),
}
# The first two are ours.
PROGRAMS = ("xla", "graph", "torch", "torch_compile")
PRECISIONS = ("bfloat16", "float32")
KINDS = ("adversarial", "standard")
_WARMUP = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """One of PROGRAMS in one precision."""

    name: str
    precision: str

    @property
    def is_torch(self) -> bool:
        return self.name.startswith("torch")

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


def main() -> None:
    arguments = _arguments()
    with Benchmark(arguments) as bench:
        for batch_size in arguments.batches:
            for kind in arguments.kinds:
                bench.compare(kind, batch_size)
        for program in arguments.largest:
            bench.search_largest(program)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed: Callable[[str], Callable[[str], list[str]]] = lambda name: functools.partial(_names, name)  # noqa: E731
    parser.add_argument("--shape", choices=SHAPES, default="resnet50_224", help="Network, image size and attack.")
    parser.add_argument("--batches", type=_sizes, default=[128], help="Batch sizes, separated by commas.")
    parser.add_argument("--programs", type=listed("programs"), default=list(PROGRAMS), help=f"Of {PROGRAMS}.")
    parser.add_argument("--precisions", type=listed("precisions"), default=list(PRECISIONS), help=f"Of {PRECISIONS}.")
    parser.add_argument("--kinds", type=listed("kinds"), default=list(KINDS), help=f"Of {KINDS}.")
    parser.add_argument("--repeats", type=int, default=7, help="Number of measured steps of each program.")
    parser.add_argument("--device", choices=("GPU", "CPU"), default="GPU")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="Command of a Python with torch and torchvision."
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="Compile all programs at the same time. This is quicker, but compilers that choose kernels by their time "
        "may choose worse ones, and the times of the first calls mean nothing.",
    )
    parser.add_argument(
        "--largest",
        type=_programs,
        nargs="?",
        const="xla bfloat16",
        default=[],
        help="Also double the batch until the adversarial step no longer fits, e.g. 'xla bfloat16,torch bfloat16'.",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="Time after which everything stops.")
    parser.add_argument("--json", type=pathlib.Path, help="File to which a line of JSON is added for each figure.")
    return parser.parse_args()


def _names(kind: str, text: str) -> list[str]:
    known = {"programs": PROGRAMS, "precisions": PRECISIONS, "kinds": KINDS}[kind]
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{kind} must be of {', '.join(known)}. Received: {unknown[0]!r}.")
    return names


def _sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a batch has at least 1 image. Received: {text}.")
    return sizes


def _programs(text: str) -> list[Program]:
    pairs = [item.split() for item in text.split(",")]
    if any(len(pair) != 2 or pair[0] not in PROGRAMS or pair[1] not in PRECISIONS for pair in pairs):
        raise argparse.ArgumentTypeError(f"a program and a precision each, such as 'xla bfloat16'. Received: {text!r}.")
    return [Program(*pair) for pair in pairs]


class Benchmark:
    """Runs the processes of the programs, and reports what they measure. Use it in a `with` block."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._processes: dict[Program, StepProcess] = {}
        self._is_over = False
        self._timer = threading.Timer(arguments.seconds, self._stop)

    def __enter__(self) -> "Benchmark":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._end_processes()

    def compare(self, kind: str, batch_size: int) -> None:
        """Measures one kind of step at one batch size in all programs, and prints a table."""
        arguments = self._arguments
        programs = [Program(name, precision) for precision in arguments.precisions for name in arguments.programs]
        for program in programs:  # all start at once, because loading a framework takes long
            self._start(program)
        rows: dict[Program, dict[str, Any]] = {program: {} for program in programs}

        def prepare(program: Program) -> None:
            """Builds a step, and runs it until it is warm."""
            try:
                process = self._processes[program]
                process.clear()
                process.build("step", self._settings(program, kind, batch_size))
                start = time.perf_counter()
                process.run("step")
                rows[program]["first_call_s"] = time.perf_counter() - start
                for _ in range(_WARMUP - 1):
                    process.run("step")
                rows[program]["peak_gib"] = process.peak_gib("step")
            except StepFailure as failure:
                rows[program] = {"failed": self._reason(failure)}
                self._end(program)

        with ThreadPoolExecutor(len(programs) if arguments.together else 1) as pool:
            list(pool.map(prepare, programs))
        ready = {str(program): program for program in programs if program in self._processes}
        cases = {name: functools.partial(self._processes[program].run, "step") for name, program in ready.items()}
        try:
            timings = interleaved(cases, repeats=arguments.repeats, warmup=1) if cases else {}
        except StepFailure as failure:
            timings = {}
            rows |= {program: {"failed": self._reason(failure)} for program in ready.values()}
        for name, timing in timings.items():
            rows[ready[name]] |= {
                "images_per_s": batch_size / timing.median,
                "s_per_step": timing.median,
                "spread_s": max(timing.repeats) - min(timing.repeats),
            }
        self._report(kind, batch_size, rows)

    def search_largest(self, program: Program) -> None:
        """Doubles the batch of the adversarial step until it no longer fits, and prints the largest that fitted."""
        self._end_processes()  # they hold memory
        largest, batch_size, reason = 0, min(self._arguments.batches), ""
        while not reason:
            try:
                process = self._start(program)
                process.build("step", self._settings(program, "adversarial", batch_size))
                process.run("step")
                process.run("step")
                largest, batch_size = batch_size, 2 * batch_size
            except StepFailure as failure:
                reason = self._reason(failure)
            # The next one starts afresh: memory that is in pieces says nothing about the next batch.
            self._end(program)
        print(f"\n{program}: {largest} images fit; at {batch_size}: {reason}", flush=True)
        self._write(program=str(program), largest_batch=largest, failed_at=batch_size, reason=reason)

    def _start(self, program: Program) -> StepProcess:
        if program not in self._processes:
            if program.is_torch:
                self._processes[program] = torch_process(self._arguments.torch_python)
            else:
                self._processes[program] = StepProcess([sys.executable, "-m", "tests.bench.keras_step"])
            if self._is_over:
                self._processes[program].kill()
        return self._processes[program]

    def _end(self, program: Program) -> None:
        self._processes.pop(program).close()

    def _end_processes(self) -> None:
        for program in list(self._processes):
            self._end(program)

    def _stop(self) -> None:
        """Ends the processes when the time is up, even while they compile. Their calls then fail."""
        self._is_over = True
        for process in list(self._processes.values()):
            process.kill()

    def _reason(self, failure: StepFailure) -> str:
        if self._is_over:
            return "out of time"
        return "out of memory" if failure.out_of_memory else str(failure)

    def _settings(self, program: Program, kind: str, batch_size: int) -> StepSettings:
        architecture, num_classes, image_size, steps, epsilon, step_size = SHAPES[self._arguments.shape]
        return StepSettings(
            architecture=architecture,
            num_classes=num_classes,
            image_size=image_size,
            batch_size=batch_size,
            steps=steps if kind == "adversarial" else 0,
            epsilon=epsilon,
            step_size=step_size,
            precision=program.precision,
            compiled=program.name in ("xla", "torch_compile"),
            device=self._arguments.device,
        )

    def _report(self, kind: str, batch_size: int, rows: dict[Program, dict[str, Any]]) -> None:
        steps = SHAPES[self._arguments.shape][3]
        name = f"PGD-{steps}" if kind == "adversarial" else kind
        print(f"\n{self._arguments.shape}, batch {batch_size}, {name} step on one {self._arguments.device}\n")
        print("| program | images/s | / torch | / torch_compile | s/step | spread | peak GiB | first call, s |")
        print("|---|---|---|---|---|---|---|---|")
        for program, row in rows.items():
            print(f"| {program} | {' | '.join(_cells(program, row, rows))} |", flush=True)
            self._write(shape=self._arguments.shape, batch=batch_size, step=name, program=str(program), **row)

    def _write(self, **figure: Any) -> None:
        if self._arguments.json is None:
            return
        rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in figure.items()}
        with self._arguments.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def _cells(program: Program, row: dict[str, Any], rows: dict[Program, dict[str, Any]]) -> list[str]:
    if "failed" in row:
        return [row["failed"].replace("\n", " ")[:120], *[""] * 6]
    ratios = []
    for name in ("torch", "torch_compile"):
        other = rows.get(Program(name, program.precision), {}).get("images_per_s")
        ratios.append(f"{row['images_per_s'] / other:.2f}" if other else "")
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    times = [f"{row['s_per_step']:.4f}", f"{row['spread_s']:.4f}", peak, f"{row['first_call_s']:.1f}"]
    return [f"{row['images_per_s']:,.0f}", *ratios, *times]


if __name__ == "__main__":
    main()
