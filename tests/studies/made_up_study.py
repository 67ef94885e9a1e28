"""Made-up studies: cells with accuracies that follow a smooth curve over epsilon, with noise of seeds and draws."""

import itertools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from robust_tf.studies.records import Cell


def cell(epsilon: float | None, seed: int | None, draw: int, accuracy: float, **changes) -> Cell:
    """Returns a cell of a small study, with a name that follows from its place."""
    values = {
        "source": f"sources/eps{epsilon}-seed{seed}",
        "source_architecture": "resnet20",
        "source_norm": "l2",
        "source_dataset": "digits",
        "source_classes": "0,1,2,3,4",
        "dataset": "digits",
        "classes": "5,6,7,8,9",
        "transfer_mode": "fixed_feature",
        "examples_per_class": 20,
        **changes,
    }
    name = f"eps{epsilon}-seed{seed}-draw{draw}-{zlib.crc32(repr(values).encode()):08x}"
    return Cell(
        cell=name, source_epsilon=epsilon, source_seed=seed, seed=draw, accuracy=accuracy, num_test_images=500, **values
    )


def study(
    *,
    epsilons: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0),
    seeds: Sequence[int | None] = range(5),
    draws: Sequence[int] = range(5),
    gain: float = 0.06,
    **axes: Sequence,
) -> list[Cell]:
    """Returns the cells of a study.

    Args:
        epsilons: Radii of the sources.
        seeds: Source seeds.
        draws: Draws of the labels.
        gain: Largest difference between a robust and the standard source.
        **axes: Values of further fields of a cell; names that are no field become flags that vary.
    """
    cells = []
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        varied = {name: str(value) for name, value in place.items() if name not in Cell.__dataclass_fields__}
        fields = {name: value for name, value in place.items() if name in Cell.__dataclass_fields__}
        fields |= {"robust_norm": "l2", "robust_epsilon": 0.5, "varied": varied}
        noise = np.random.default_rng(zlib.crc32(repr(sorted(place.items(), key=str)).encode()))
        level = 0.9 - 0.5 / math.sqrt(fields.get("examples_per_class") or 400) - 0.1 * noise.random()
        peak = noise.uniform(-1.0, 1.5)
        of_draw = {draw: noise.normal(scale=0.01) for draw in draws}
        for epsilon, seed in itertools.product(epsilons, seeds):
            of_seed = noise.normal(scale=0.015)
            scaled = epsilon * (90 if fields.get("source_norm") == "linf" else 1)
            curve = 0.0 if epsilon == 0 else gain * math.exp(-((math.log(scaled + 1e-9) - peak) ** 2) / 2)
            for draw in draws:
                accuracy = level + curve + of_seed + of_draw[draw] + noise.normal(scale=0.01)
                robust = 0.75 * accuracy * (1 - math.exp(-1.5 * scaled)) + 0.02 * noise.random()
                cells.append(
                    cell(
                        epsilon,
                        seed,
                        draw,
                        round(min(accuracy, 1.0) * 500) / 500,
                        validation_value=round((accuracy + noise.normal(scale=0.02)) * 100) / 100,
                        robust_accuracy=round(robust * 500) / 500,
                        source_accuracy=0.97 - 0.05 * scaled**0.5 + 0.005 * noise.normal(),
                        seconds=1.2,
                        robust_tf="0.1.0",
                        tensorflow="2.21.0",
                        keras="3.15.0",
                        **fields,
                    )
                )
    return cells
