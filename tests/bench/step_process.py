"""Training steps in other processes: each framework in its own environment, and both take turns under one clock.

The process of a framework calls `serve` with a function that builds a step. The benchmark starts it as a `StepProcess`.
They exchange one line of JSON per call. This module needs nothing but Python's standard library, because one of the
frameworks is missing on either side.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """A training step that every framework can build.

    Attributes:
        architecture: Name of the network, as in `robust_tf.models`.
        num_classes: Number of classes.
        image_size: Height and width of the images.
        batch_size: Number of images.
        steps: Number of attack steps. 0 is a standard training step.
        norm: Norm of the attack, "l2" or "linf".
        epsilon: Radius of the attack, in [0, 1] pixel units.
        step_size: Step size of the attack, in the same unit.
        use_best: Whether the attack keeps the iterate with the highest loss.
        precision: Number format of the layers. float32 means TF32 on a GPU.
        compiled: Whether to compile the step: with XLA, or with `torch.compile`.
        device: Where the step runs.
    """

    architecture: str
    num_classes: int
    image_size: int
    batch_size: int
    steps: int
    norm: str = "l2"
    epsilon: float
    step_size: float
    use_best: bool = True
    precision: Literal["bfloat16", "float32"]
    compiled: bool
    device: Literal["CPU", "GPU"]


class Step(Protocol):
    """A training step that is ready to run."""

    def run(self) -> None:
        """Makes one step, and returns when the device has done it."""

    def peak_gib(self) -> float | None:
        """Returns the largest memory of the device since the step was built, in GiB. None if it is not known."""


class StepFailure(Exception):
    """A step could not be built or run. The message says why."""

    @property
    def out_of_memory(self) -> bool:
        """Whether the device had too little memory."""
        text = str(self).lower().replace(" ", "").replace("_", "")
        return "outofmemory" in text or "resourceexhausted" in text


def serve(build: Callable[[StepSettings], Step]) -> None:
    """Builds and runs steps, as `StepProcess` asks on stdin, until stdin ends. What they print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["call"] == "build":
                steps[request["name"]] = build(StepSettings(**request["settings"]))
            elif request["call"] == "run":
                steps[request["name"]].run()
            elif request["call"] == "peak_gib":
                answer["peak_gib"] = steps[request["name"]].peak_gib()
            else:
                steps.clear()
                gc.collect()
        except Exception as error:  # noqa: BLE001  # whatever stops a step is what the benchmark reports
            answer["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class StepProcess:
    """The process of one framework. It runs until `close`.

    Args:
        command: Command that runs `serve`, such as `[sys.executable, "-m", "tests.bench.torch_step"]`.
        without: Names of environment variables that the process must not inherit.
        environment: Further environment variables.
    """

    def __init__(
        self, command: Sequence[str], *, without: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # see `close`
        self._read = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
            # Otherwise the first process takes all memory of a GPU.
            env={name: value for name, value in os.environ.items() if name not in without}
            | {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
            | dict(environment or {}),
        )

    def close(self) -> None:
        """Ends the process and waits for it."""
        self.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that it has not read
                    file.close()

    def build(self, name: str, settings: StepSettings) -> None:
        """Builds a step under a name. It is not run, and so neither traced nor compiled."""
        self._ask(call="build", name=name, settings=dataclasses.asdict(settings))

    def run(self, name: str) -> None:
        """Makes one step."""
        self._ask(call="run", name=name)

    def peak_gib(self, name: str) -> float | None:
        """Returns the largest memory since the step was built, in GiB; None on a CPU."""
        value: float | None = self._ask(call="peak_gib", name=name)["peak_gib"]
        return value

    def clear(self) -> None:
        """Frees all steps."""
        self._ask(call="clear")

    def new_output(self) -> str:
        """Returns what the process has printed since the last call."""
        # `pread` leaves the position of the file alone, at which the process goes on writing.
        content = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size - self._read, self._read)
        self._read += len(content)
        return content.decode("utf-8", "replace")

    def kill(self) -> None:
        """Ends the process at once. A call that waits for it fails."""
        self._process.kill()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise StepFailure(f"The process ended with code {code}. {self._log.read()[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise StepFailure(answer["failed"])
        return answer


def torch_process(python: str, *, environment: Mapping[str, str] | None = None) -> StepProcess:
    """Starts the process of PyTorch.

    Args:
        python: Command of a Python with torch and torchvision.
        environment: Further environment variables.
    """
    # The libraries that TensorFlow's environment may name there are other versions than PyTorch's.
    return StepProcess(
        [*shlex.split(python), "-m", "tests.bench.torch_step"],
        without=("PYTHONPATH", "LD_LIBRARY_PATH"),
        environment=environment,
    )
