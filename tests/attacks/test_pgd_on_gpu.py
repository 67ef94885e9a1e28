"""PGD on a GPU compared with the same attack on a CPU. `tests/gpu_smoke.sh` runs it on a GPU.

The tests run without TF32 (`conftest.py`). With it, the images would differ by up to 0.03 in L2, and signs would flip
in Linf.
"""

import numpy as np
import pytest
import tensorflow as tf
from smallcnn import build_smallcnn, inputs
from test_pgd import CASES

from robust_tf.attacks import pgd


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The images have values from:robust_tf.errors.AttackWarning")  # the cases "oob"
@pytest.mark.parametrize("case", CASES)
def test_images_on_gpu_equal_those_on_the_cpu(case):
    norm, epsilon, step_size, steps = CASES[case]
    data, targeted = inputs(), case.endswith("targeted")
    found = []
    for place in ("CPU", "GPU"):
        with tf.device(f"/{place}:0"):
            images_adv = pgd(
                build_smallcnn(),
                data["images_oob" if case.endswith("oob") else "images"],
                data["targets" if targeted else "labels"],
                norm=norm,
                epsilon=epsilon,
                step_size=step_size,
                steps=steps,
                targeted=targeted,
            )
        assert place in images_adv.device
        found.append(images_adv.numpy())
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-6)  # measured on an H200: 1.2e-7
