"""Shows where the time of a training step goes on a CPU: the kernels of oneDNN, here and in PyTorch.

    python -m tests.bench.kernels --case=resnet18_64 --precision=bfloat16 --steps=3 --torch_python=python3

Both frameworks run the same kinds of kernels, and oneDNN reports each with its time (ONEDNN_VERBOSE). The steps take
turns. The table has a row for each kind of kernel: the number of calls in a step and their time in ms, as the median of
the steps. The last rows are the whole step and what no kernel of oneDNN accounts for. TensorFlow may run two kernels at
the same time, and this rest is then too small. With TF_NUM_INTEROP_THREADS=1 it runs one after the other.
"""

import argparse
import collections
import contextlib
import dataclasses
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests.bench.step_process import StepProcess, StepSettings, torch_process

_VERBOSE = {"ONEDNN_VERBOSE": "1"}
_STEP = "step"
# What two frameworks call the same pass.
_PASSES = {
    "forward_training": "forward",
    "forward_inference": "forward",
    "forward": "forward",
    "backward_data": "gradient of the input",
    "backward_weights": "gradient of the weights",
    "backward": "gradient",
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of one step.

    Attributes:
        seconds: Time of the whole step.
        calls: Number of calls, by kind of kernel.
        milliseconds: Their time, by kind of kernel.
    """

    seconds: float
    calls: Counter[str]
    milliseconds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="resnet18_64", help="Name of a model in tests/bench/adversarial_step.py.")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="Steps of the attack. 0 is a standard training step.")
    parser.add_argument("--last_iterate", action="store_true", help="Let the attack return its last iterate.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--torch_python", default=sys.executable, help="Command of a Python with torch and torchvision."
    )
    arguments = parser.parse_args()
    settings = _settings(arguments)
    with contextlib.ExitStack() as stack:
        ours = StepProcess([sys.executable, "-m", "tests.bench.keras_step"], environment=_VERBOSE)
        processes = [ours, torch_process(arguments.torch_python, environment=_VERBOSE)]
        for process in processes:
            stack.enter_context(contextlib.closing(process))
            process.build(_STEP, settings)
            for _ in range(3):
                process.run(_STEP)
        runs: list[list[Kernels]] = [[], []]
        for _ in range(arguments.repeats):
            for process, found in zip(processes, runs, strict=True):
                found.append(_measured(process))
    print(f"{arguments.case}, {arguments.precision}, PGD-{arguments.steps}, median of {arguments.repeats}")
    print("\n".join(table(*runs)))


def _settings(arguments: argparse.Namespace) -> StepSettings:
    from tests.bench.adversarial_step import SHAPES  # imports TensorFlow

    shape = SHAPES[arguments.case]
    return StepSettings(
        architecture=shape.architecture,
        num_classes=shape.num_classes,
        image_size=shape.image_size,
        batch_size=shape.batch_size,
        steps=arguments.steps,
        epsilon=shape.epsilon,
        step_size=shape.step_size,
        use_best=not arguments.last_iterate,
        precision=arguments.precision,
        compiled=False,
        device="CPU",
    )


def _measured(process: StepProcess) -> Kernels:
    process.new_output()
    start = time.perf_counter()
    process.run(_STEP)
    seconds = time.perf_counter() - start
    return kernels_of(process.new_output().splitlines(), seconds=seconds)


def kernels_of(lines: Iterable[str], *, seconds: float) -> Kernels:
    """Reads the lines that oneDNN prints for a step.

    Args:
        lines: Lines such as "onednn_verbose,v1,primitive,exec,cpu,convolution,brg_conv_fwd:avx512_core_bf16,...,0.87".
            Others are ignored.
        seconds: Time of the step.

    Returns:
        The kernels, by primitive and pass.
    """
    calls, milliseconds = Counter[str](), collections.defaultdict[str, float](float)
    for line in lines:
        fields = line.split(",")
        if not line.startswith("onednn_verbose") or "exec" not in fields:
            continue
        at = fields.index("exec") + 2  # behind the device
        primitive, kind = fields[at], fields[at + 2]
        name = f"{primitive}, {_PASSES[kind]}" if kind in _PASSES else primitive
        calls[name] += 1
        milliseconds[name] += float(fields[-1])
    if not calls:
        raise ValueError("oneDNN has printed nothing. Is it built without ONEDNN_VERBOSE?")
    return Kernels(seconds, calls, milliseconds)


def table(ours: list[Kernels], torch: list[Kernels]) -> list[str]:
    """Returns the lines of the table, with the kinds of kernels in order of their difference."""
    medians = [_medians(runs) for runs in (ours, torch)]
    names = {name for each in medians for name in each if name != _STEP}
    none = (0.0, 0.0)
    lines = [f"{'':44}{'robust_tf: calls, ms':>22}{'PyTorch: calls, ms':>22}{'more ms':>9}"]

    def row(name: str, first: tuple[float, float], second: tuple[float, float]) -> str:
        cells = [f"{calls or '':>10} {milliseconds:11.1f}" for calls, milliseconds in (first, second)]
        return f"{name:44}{''.join(cells)}{first[1] - second[1]:9.1f}"

    pairs = {name: (medians[0].get(name, none), medians[1].get(name, none)) for name in names}
    for name, (first, second) in sorted(pairs.items(), key=lambda pair: pair[1][1][1] - pair[1][0][1]):
        lines.append(row(name, first, second))
    sums = [sum(value for name, (_, value) in each.items() if name != _STEP) for each in medians]
    totals = [each[_STEP][1] for each in medians]
    rests = [total - kernels for total, kernels in zip(totals, sums, strict=True)]
    for name, (our_value, other_value) in (
        ("all kernels", sums),
        ("the step", totals),
        ("the step without its kernels", rests),
    ):
        lines.append(row(name, (0.0, our_value), (0.0, other_value)))
    return lines


def _medians(runs: list[Kernels]) -> dict[str, tuple[float, float]]:
    """Returns the number of calls and their time in ms, by kind of kernel, and for the whole step."""
    names = {name for run in runs for name in run.calls}
    found: dict[str, tuple[float, float]] = {
        name: (
            statistics.median(run.calls[name] for run in runs),
            statistics.median(run.milliseconds[name] for run in runs),
        )
        for name in names
    }
    return found | {_STEP: (0, 1000 * statistics.median(run.seconds for run in runs))}


if __name__ == "__main__":
    main()
