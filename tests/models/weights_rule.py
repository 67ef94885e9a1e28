"""Deterministic weights by checkpoint key and deterministic images, in NumPy.

The PyTorch reference was run with the same weights; its outputs are stored in fixtures/reference_outputs.npz.
"""

import re
import zlib

import numpy as np

# Scales of BatchNorm's gamma that keep activations of order one: for all, and for the last one of a residual branch.
BASIC = r"layer\d\.\d+\.bn2\.weight"
BOTTLENECK = r"layer\d\.\d+\.bn3\.weight"
GAMMA = {
    "resnet18": (0.85, 0.3, BASIC),
    "resnet50": (0.8, 0.3, BOTTLENECK),
    "wide_resnet50_2": (0.8, 0.3, BOTTLENECK),
    "wide_resnet50_4": (0.8, 0.3, BOTTLENECK),
    "resnext50_32x4d": (0.8, 0.3, BOTTLENECK),
    "mobilenet_v2": (1.0, 0.75, r"features\.(1\.conv\.2|\d+\.conv\.3)\.weight"),
    "mnasnet1_0": (0.9, 0.5, r"layers\.\d+\.\d+\.layers\.7\.weight"),
    "densenet161": (0.9, 1.0, r"$"),
    "shufflenet_v2_x1_0": (0.83, 1.0, r"$"),
    "vgg16_bn": (0.85, 1.0, r"$"),
}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def weight(key: str, shape: tuple[int, ...], *, architecture: str = "", seed: int = 1) -> np.ndarray:
    """Returns the array of a core key, float32, or an int64 zero for num_batches_tracked.

    Without an architecture gamma is not scaled.
    """
    rng = np.random.default_rng(zlib.crc32(key.encode("ascii")) + seed)
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "weight" and len(shape) > 1:
        values = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:], dtype=np.int64))
    elif leaf == "weight":
        scale, branch_scale, branch = GAMMA.get(architecture, (1.0, 1.0, r"$"))
        values = rng.uniform(0.5, 1.5, shape) * scale
        if re.fullmatch(branch, key):
            values = values * branch_scale
    elif leaf == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) * 0.1
    return values.astype(np.float32)


def images(seed: int = 7) -> np.ndarray:
    """Returns two images of noise and two of 7x7 uniform squares, (4, 224, 224, 3) float32 in [0, 1]."""
    noise = np.random.default_rng(seed).random((2, 3, 224, 224))
    squares = np.random.default_rng(seed + 1000).random((2, 3, 7, 7)).repeat(32, axis=2).repeat(32, axis=3)
    return np.concatenate([noise, squares]).astype(np.float32).transpose(0, 2, 3, 1)
