"""Kills exporters at random moments (kill -9), and checks that every published version is complete.

python -m tests.serving.kill --kills=50
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from robust_tf.serving.model.folders import version_folders
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.warmup import replay_warmup

_EXPORTER = """
import sys, keras
from robust_tf.serving.publish.export import export_classifier
images = keras.Input((8, 8, 3), name="images")
features = keras.layers.Flatten(name="features")(images)
model = keras.Model(images, keras.layers.Dense(2, name="logits")(features))
while True:
    print("exporting", flush=True)
    export_classifier(model, sys.argv[1], "m", model_card={})
"""
_FILES = {
    "saved_model.pb",
    "model_card.json",
    "assets/labels.txt",
    "assets.extra/tf_serving_warmup_requests",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
}


def run(*, kills: int, seed: int) -> dict:
    """Kills exporters, then loads whatever has been published, and returns figures.

    A first exporter publishes one version undisturbed, which shows how long that takes on this machine. Each of the
    others is killed at a random moment of its first export or soon after.

    Args:
        kills: Number of exporters to kill.
        seed: Seed for the moments.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        duration = 0.0
        for number in range(kills + 1):
            command = [sys.executable, "-c", _EXPORTER, folder]
            exporter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            exporter.stdout.readline()
            if number == 0:
                start = time.monotonic()
                exporter.stdout.readline()
                duration = time.monotonic() - start
            else:
                time.sleep(rng.uniform(0, 1.5 * duration))
            exporter.kill()
            exporter.wait()
        base = pathlib.Path(folder) / "m"
        versions = version_folders(base)
        unfinished = len(list(base.glob(".export-*"))) if base.is_dir() else 0
        broken = [number for number, path in versions.items() if not _is_whole(path)]
    return {"kills": kills, "published": len(versions), "unfinished": unfinished, "broken": broken}


def _is_whole(path: pathlib.Path) -> bool:
    if not all((path / file).is_file() for file in _FILES):
        return False
    model = LoadedModel(path)
    try:
        return replay_warmup(model) == 6
    finally:
        model.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    figures = run(**vars(parser.parse_args()))
    print(json.dumps(figures, indent=2))
    return int(bool(figures["broken"]))


if __name__ == "__main__":
    sys.exit(main())
