"""Checks that XLA with deterministic kernels gives the same weights in every run, on a GPU.

    python tests/gpu_checks.py

Trains the source of the quickstart for a few epochs in bfloat16: twice, with programs that XLA compiles independently,
and once more in two parts, with the programs of the first run from XLA's cache. All weights must be equal bit for bit.
SMOKE_DEVICE=CPU tries out the script without a GPU, on a smaller network in float32. Exits with 0 if all is well.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import zipfile

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--architecture=resnet8", "--image_size=8", "--subset=100", "--batch_size=24", "--attack_steps=2"]
SMALL += ["--eval_steps=2"]


def start(work: pathlib.Path, name: str, cache: str, device: str) -> subprocess.Popen[str]:
    """Starts a job, whose output goes into a pipe."""
    flags = ["--flagfile=configs/quickstart_source.cfg", "--epochs=3", "--alarm_every_epochs=100", "--deterministic"]
    flags += [f"--workdir={work / name}", f"--cache_dir={work / cache}"]
    flags += ["--precision=mixed_bfloat16"] if device == "GPU" else ["--jit_compile=true", *SMALL]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    if device == "CPU":
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    command = [sys.executable, "-u", "-m", "robust_tf.train", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(name: str, process: subprocess.Popen[str], *, code: int = 0, before: str = "") -> str:
    """Waits for a job, prints its most important lines, and returns its output."""
    output = before + (process.stdout.read() if process.stdout else "")
    if process.wait() != code:
        sys.exit(f"FAILED: {name} ended with {process.returncode} instead of {code}.\n{output}")
    if "The training step is compiled with XLA" not in output or "deterministic kernels" not in output:
        sys.exit(f"FAILED: {name} does not use XLA with deterministic kernels.\n{output}")
    for line in output.splitlines():
        if re.match(r"The (first|training)|epoch|Continuing", line):
            print(f"{name}: {line}", flush=True)
    return output


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all weights of the classifier of a finished job."""
    found: dict[str, np.ndarray] = {}
    with (
        zipfile.ZipFile(workdir / "classifier.keras") as archive,
        archive.open("model.weights.h5") as file,
        h5py.File(file) as content,
    ):
        content.visititems(lambda path, item: found.update({path: item[()]} if hasattr(item, "dtype") else {}))
    return found


def check_equal(work: pathlib.Path, name: str) -> None:
    """Ends the program if the weights of a job differ from those of the first."""
    ours, theirs = weights(work / name), weights(work / "first")
    different = [path for path in theirs if not np.array_equal(ours[path], theirs[path])]
    if different or not theirs:
        largest = max((float(np.abs(ours[path] - theirs[path]).max()) for path in different), default=0.0)
        sys.exit(f"FAILED: {name}: {len(different)} of {len(theirs)} weights differ, by up to {largest:g}.")
    print(f"{name}: all {len(theirs)} weights equal those of the first run bit for bit.", flush=True)


def main() -> None:
    """Runs all checks."""
    device = os.environ.get("SMOKE_DEVICE", "GPU")
    with tempfile.TemporaryDirectory(prefix="gpu_checks-") as folder:
        work = pathlib.Path(folder)
        jobs = {name: start(work, name, f"cache-{name}", device) for name in ("first", "second")}
        for name, process in jobs.items():
            finish(name, process)
        check_equal(work, "second")
        process, seen = start(work, "parts", "cache-first", device), ""
        for line in process.stdout or []:
            seen += line
            if line.startswith("epoch 1/") and "loss" in line:
                process.send_signal(signal.SIGTERM)
                break
        finish("parts", process, code=128 + signal.SIGTERM, before=seen)
        if "Continuing after" not in finish("parts", start(work, "parts", "cache-first", device)):
            sys.exit("FAILED: parts did not continue after its first epoch.")
        check_equal(work, "parts")
    print(f"XLA with deterministic kernels gives the same weights in every run on this {device}.")


if __name__ == "__main__":
    main()
