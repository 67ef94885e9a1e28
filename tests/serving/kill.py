"""Kills exporters at random moments (kill -9), and checks that every published version is complete.

    python -m tests.serving.kill --kills=50
    python -m tests.serving.kill --kills=50 --format=savedmodel,onnx,litert

The model is published in all formats at once. A killed exporter may leave a version in some of them only, but each that
is there has to be complete.
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

from robust_tf.serving.artifacts.card import FORMATS, SAVED_MODEL_FORMAT
from robust_tf.serving.artifacts.opening import open_artifact
from robust_tf.serving.model.folders import version_folders
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.warmup import replay_warmup
from robust_tf.serving.publish.staging import format_folder

_EXPORTER = """
import sys, keras
from robust_tf.serving.publish.export import export_classifier
images = keras.Input((8, 8, 3), name="images")
features = keras.layers.Flatten(name="features")(images)
model = keras.Model(images, keras.layers.Dense(2, name="logits")(features))
while True:
    print("exporting", flush=True)
    export_classifier(model, sys.argv[1], "m", model_card={}, formats=sys.argv[2].split(","))
"""
_FILES = {
    "saved_model.pb",
    "model_card.json",
    "assets/labels.txt",
    "assets.extra/tf_serving_warmup_requests",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
}


def run(*, kills: int, seed: int, formats: tuple[str, ...] = (SAVED_MODEL_FORMAT,)) -> dict:
    """Kills exporters, then loads whatever has been published, and returns figures.

    A first exporter publishes one version undisturbed, which shows how long that takes on this machine. Each of the
    others is killed at a random moment of its first export or soon after.

    Args:
        kills: Number of exporters to kill.
        seed: Seed for the moments.
        formats: Formats in which the exporters publish the model.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        duration = 0.0
        for number in range(kills + 1):
            command = [sys.executable, "-c", _EXPORTER, folder, ",".join(formats)]
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
        versions = {name: version_folders(format_folder(base, name)) for name in formats}
        unfinished = len(list(base.rglob(".export-*")))
        broken = [
            f"{name}/{number}"
            for name, paths in versions.items()
            for number, path in paths.items()
            if not _is_whole(name, path)
        ]
    published = {name: len(paths) for name, paths in versions.items()}
    return {"kills": kills, "published": published, "unfinished": unfinished, "broken": broken}


def _is_whole(name: str, path: pathlib.Path) -> bool:
    if name != SAVED_MODEL_FORMAT:
        if {file.name for file in path.iterdir()} != {FORMATS[name].file, "labels.txt", "model_card.json"}:
            return False
        with open_artifact(str(path)) as artifact:  # compares the files with the digests in the card
            return bool(np.isfinite(artifact.logits(np.zeros((2, 8, 8, 3), np.float32))).all())
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
    parser.add_argument("--format", default=SAVED_MODEL_FORMAT, help="Formats, separated by commas.")
    arguments = parser.parse_args()
    figures = run(kills=arguments.kills, seed=arguments.seed, formats=tuple(arguments.format.split(",")))
    print(json.dumps(figures, indent=2))
    return int(bool(figures["broken"]))


if __name__ == "__main__":
    sys.exit(main())
