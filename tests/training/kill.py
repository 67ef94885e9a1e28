"""Kills a training run at random moments and restarts it: it ends bit for bit like an uninterrupted run.

python -m tests.training.kill --kills=30
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

_FLAGS = [
    "--dataset=digits --classes=0,1,2 --architecture=resnet8 --image_size=8 --norm=l2 --epsilon=0.5 --attack_steps=2",
    "--random_start --eval_steps=2 --batch_size=24 --learning_rate=0.05 --ema_decay=0.9 --deterministic",
    "--checkpoint_every_steps=2 --alarm_every_epochs=10",
]


def run(*, kills: int, seed: int, epochs: int) -> dict:
    """Kills processes, one in five while it starts and the others soon after they have saved a new state.

    Returns:
        The number of killed processes (smaller than `kills` if the run finishes earlier), the newest state that each
        left, and the names of everything that differs from the uninterrupted run.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "parts"
        _start(whole, epochs).communicate()
        states: list[str] = []
        while len(states) < kills:
            process = _start(parts, epochs)
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 10))
            else:
                before = _newest(parts)
                while _newest(parts) == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 1))
            process.kill()
            process.communicate()
            if (parts / "results.json").exists():
                break
            states.append(_newest(parts))
            print(f"kill {len(states)} of {kills}: {states[-1] or 'nothing is saved'}", file=sys.stderr, flush=True)
        _start(parts, epochs).communicate()
        return {"killed": len(states), "states": states, "different": _differences(whole, parts)}


def _newest(workdir: pathlib.Path) -> str:
    return max((path.stem for path in (workdir / "checkpoints").glob("epoch*.npz")), default="")


def _start(workdir: pathlib.Path, epochs: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "robust_tf.train", *" ".join(_FLAGS).split()]
    command += [f"--workdir={workdir}", f"--data_dir={workdir.parent}/tfds", f"--epochs={epochs}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _differences(whole: pathlib.Path, parts: pathlib.Path) -> list[str]:
    figures = [json.loads((workdir / "results.json").read_text()) for workdir in (whole, parts)]
    different = [
        f"results.json: {name}"
        for name in figures[0]
        if name not in ("seconds", "images_per_second", "flags") and figures[0][name] != figures[1][name]
    ]
    for path in sorted((whole / "checkpoints").glob("*.npz")):
        if not (parts / "checkpoints" / path.name).exists():
            if not path.stem.endswith("step0000000"):
                continue  # which states exist within an epoch depends on when the run was killed
            different.append(path.name)
            continue
        with np.load(path) as ours, np.load(parts / "checkpoints" / path.name) as theirs:
            names = [name for name in ours.files if name not in ("progress", "sha256")]
            different += [f"{path.name}: {name}" for name in names if not np.array_equal(ours[name], theirs[name])]
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    figures = run(**vars(parser.parse_args()))
    print(json.dumps(figures, indent=2))
    return int(bool(figures["different"]))


if __name__ == "__main__":
    sys.exit(main())
