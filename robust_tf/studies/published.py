"""Accuracies that the paper and its code published, to draw beside those of a study.

The transfer accuracies are the table of the best hyperparameters in the code of Salman et al. 2020 (arXiv 2007.08489),
microsoft/robust-models-transfer. It lists only the best epsilon of each data set, mode and architecture, chosen by the
test images, and no standard source beside it. The accuracies of the sources on ImageNet are in
`robust_tf.models.published`.
"""

import dataclasses
from typing import Literal

from robust_tf.models.published import PUBLISHED

SOURCE = "published: Salman et al. 2020, arXiv 2007.08489 (table of the best hyperparameters in the paper's code)"
_ARCHITECTURES = ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet50_4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedTransfer:
    """A published accuracy of a transfer from ImageNet with all training labels.

    Attributes:
        dataset: Data set that was transferred to, by its name in this package.
        transfer_mode: What the transfer trained.
        architecture: Architecture of the source.
        epsilon: Radius of the L2 perturbations in the training of the source, the best of ten.
        accuracy: Accuracy in [0, 1], in the data set's usual metric.
    """

    dataset: str
    transfer_mode: Literal["fixed_feature", "full_network"]
    architecture: str
    epsilon: float
    accuracy: float


# For each data set: epsilon and accuracy in percent of the four architectures, first with fixed features, then with the
# full network.
_BEST: dict[str, tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]] = {
    "sun397": (
        ((0, 51.77), (0.01, 54.88), (0, 55.70), (0.01, 58.81)),
        ((0, 59.58), (0, 62.38), (0.03, 63.52), (0.01, 65.01)),
    ),
    "aircraft": (
        ((0.5, 41.91), (1, 42.15), (0.5, 41.34), (0.05, 44.38)),
        ((0, 80.89), (0.01, 86.14), (0, 86.83), (0.25, 86.44)),
    ),
    "birdsnap": (
        ((0.01, 45.94), (0.1, 49.25), (0.03, 48.76), (0.01, 50.75)),
        ((0.01, 68.51), (0.25, 73.71), (0.01, 75.11), (0.01, 76.69)),
    ),
    "caltech101": (
        ((0.1, 89.49), (1, 91.07), (0.5, 91.80), (0.25, 92.76)),
        ((0, 92.06), (0.03, 94.61), (0.5, 95.41), (0.05, 95.69)),
    ),
    "caltech256": (
        ((0.05, 78.40), (0.05, 82.51), (0.03, 83.34), (0.03, 85.08)),
        ((0.05, 80.16), (0.05, 84.63), (0.05, 86.33), (0.05, 87.74)),
    ),
    "cifar10": (
        ((3, 91.64), (3, 94.81), (3, 95.21), (3, 95.57)),
        ((3, 97.14), (3, 98.27), (5, 98.55), (1, 98.72)),
    ),
    "cifar100": (
        ((3, 74.01), (3, 79.50), (3, 80.77), (3, 81.15)),
        ((1, 84.41), (3, 87.45), (3, 88.23), (1, 89.18)),
    ),
    "dtd": (
        ((0, 67.13), (0.01, 70.59), (0, 70.21), (0.03, 70.96)),
        ((0, 72.34), (0.01, 75.53), (0.01, 76.17), (0.03, 77.39)),
    ),
    "flowers": (
        ((0.1, 91.36), (0.1, 91.46), (0, 92.23), (0.01, 91.95)),
        ((0, 96.22), (0.01, 96.98), (0.01, 97.33), (0, 97.12)),
    ),
    "food": (
        ((0.03, 60.26), (0.05, 66.03), (0, 65.83), (0.01, 69.35)),
        ((0.01, 84.06), (0, 87.71), (0.05, 88.37), (0.1, 89.30)),
    ),
    "pets": (
        ((0, 89.78), (0.03, 91.32), (0, 92.03), (0.03, 92.23)),
        ((0, 92.05), (0.05, 93.71), (0.05, 94.51), (0.01, 94.59)),
    ),
    "cars": (
        ((0.1, 45.67), (0.5, 47.38), (0.25, 46.91), (0.01, 51.06)),
        ((0, 88.22), (0, 91.49), (0, 91.64), (0, 91.42)),
    ),
}

_MODES: tuple[Literal["fixed_feature", "full_network"], ...] = ("fixed_feature", "full_network")

PUBLISHED_TRANSFERS: tuple[PublishedTransfer, ...] = tuple(
    PublishedTransfer(
        dataset=dataset,
        transfer_mode=mode,
        architecture=architecture,
        epsilon=float(epsilon),
        accuracy=round(percent / 100, 4),
    )
    for dataset, modes in _BEST.items()
    for mode, cells in zip(_MODES, modes, strict=True)
    for architecture, (epsilon, percent) in zip(_ARCHITECTURES, cells, strict=True)
)


def published_transfer(dataset: str, transfer_mode: str, architecture: str) -> PublishedTransfer | None:
    """Returns the published accuracy of the best L2 source from ImageNet, or None if none was published.

    Args:
        dataset: Data set that was transferred to.
        transfer_mode: What the transfer trained.
        architecture: Architecture of the source.

    Example:
        >>> published_transfer("cifar10", "fixed_feature", "resnet50").accuracy
        0.9481
    """
    wanted = (dataset, transfer_mode, architecture)
    cells = (cell for cell in PUBLISHED_TRANSFERS if (cell.dataset, cell.transfer_mode, cell.architecture) == wanted)
    return next(cells, None)


def published_source_accuracy(architecture: str, norm: str, epsilon: float) -> float | None:
    """Returns the published accuracy on ImageNet of a source, in [0, 1], or None if none was published.

    Args:
        architecture: Architecture of the source.
        norm: Norm of the perturbations in its training. It does not matter if epsilon is 0.
        epsilon: Their radius, in [0, 1] pixel units.

    Example:
        >>> published_source_accuracy("resnet50", "l2", 3.0)
        0.6283
    """
    for model in PUBLISHED.values():
        same = model.architecture == architecture and abs(model.epsilon - epsilon) < 1e-9
        if same and model.dataset == "imagenet" and model.norm in (norm, "l2" if epsilon == 0 else norm):
            return None if model.clean_accuracy is None else round(model.clean_accuracy / 100, 4)
    return None
