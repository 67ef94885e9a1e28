"""Small data sets with boxes and masks, and jobs on them, for tests of detection and segmentation."""

import json
import pathlib

import numpy as np
from PIL import Image

from robust_tf.config.job import JobConfig
from robust_tf.models import build_classifier, save_classifier

CLASSES = ("red", "green")
SIZE = 32
MASK_CLASSES = ("background", *CLASSES)


def write_scenes(root: pathlib.Path, *, num_train: int = 20, num_test: int = 6) -> pathlib.Path:
    """Writes a folder that detection reads as COCO and segmentation as images and masks.

    Each image has one or two rectangles, red or green, on noise. The last test image has none.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", num_train), ("test", num_test)):
        folder = root / part
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True)
        records, annotations = [], []
        for number in range(count):
            pixels = rng.integers(100, 150, (SIZE, SIZE, 3), dtype=np.uint8)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            wanted = 0 if part == "test" and number == count - 1 else int(rng.integers(1, 3))
            for column in rng.permutation(2)[:wanted]:  # one in each half, so that they do not overlap
                label = int(rng.integers(0, 2))
                height, width = rng.integers(10, 15, 2)
                top = int(rng.integers(0, SIZE - height))
                left = int(16 * column + rng.integers(0, 16 - width + 1))
                window = (slice(top, top + height), slice(left, left + width))
                pixels[window] = (220, 30, 30) if label == 0 else (30, 220, 30)
                mask[window] = label + 1
                box = [left, top, int(width), int(height)]
                annotations.append({"id": len(annotations), "image_id": number, "category_id": label + 1, "bbox": box})
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
            records.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": records, "annotations": annotations, "categories": categories}
        (folder / "annotations.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("\n".join(MASK_CLASSES))
    return root


def write_source(path: pathlib.Path) -> pathlib.Path:
    """Writes a small untrained classifier."""
    save_classifier(build_classifier("resnet8", 3, image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3), path)
    return path


def dense_job(
    task_type: str, scenes: pathlib.Path, source: pathlib.Path, workdir: pathlib.Path, /, **flags
) -> JobConfig:
    """Returns a job of two epochs with an attack of two steps."""
    settings = {
        "task": "transfer",
        "task_type": task_type,
        "dataset": f"folder:{scenes}",
        "source": str(source),
        "transfer_mode": "full_network",
        "norm": "l2",
        "epsilon": 0.5,
        "attack_steps": 2,
        "eval_steps": 2,
        "epochs": 2,
        "batch_size": 8,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "log_every_steps": 1,
        "deterministic": True,
    }
    return JobConfig.from_flags(workdir=str(workdir), **{**settings, **flags})
