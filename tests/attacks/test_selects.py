"""Every choice between images has inputs of the images' rank, because TensorFlow's layout optimizer fails on others.

The optimizer runs on a GPU only. It transposes all inputs of a `SelectV2` as if they had four axes.
"""

from collections.abc import Callable, Iterator

import pytest
import tensorflow as tf
from tensorflow.python.ops import gen_math_ops  # where `tf.where` finds its operation

from robust_tf.attacks import NORMS, apgd, fab, fgsm, pgd, square
from robust_tf.config.attack import AttackConfig
from robust_tf.training.objectives.free import moved_perturbation

ATTACKS: dict[str, Callable[..., tf.Tensor]] = {
    "pgd": lambda *args, **kwargs: pgd(*args, steps=2, random_start=True, **kwargs),
    "pgd-last": lambda *args, **kwargs: pgd(*args, steps=2, use_best=False, **kwargs),
    "pgd-early": lambda *args, **kwargs: pgd(*args, steps=2, early_stop=True, **kwargs),
    "pgd-restarts": lambda *args, **kwargs: pgd(*args, steps=2, restarts=2, targeted=True, **kwargs),
    "fgsm": lambda *args, seed, **kwargs: fgsm(*args, **kwargs),
    "apgd": lambda *args, **kwargs: apgd(*args, steps=5, restarts=2, **kwargs),
    "apgd-targets": lambda *args, **kwargs: apgd(*args, steps=5, loss="dlr", targets=2, early_stop=True, **kwargs),
    "fab": lambda *args, **kwargs: fab(*args, steps=2, restarts=2, **kwargs),
    "fab-targets": lambda *args, **kwargs: fab(*args, steps=2, targets=2, early_stop=True, **kwargs),
    "square": lambda *args, **kwargs: square(*args, queries=3, restarts=2, **kwargs),
}


@pytest.fixture
def ranks(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """Collects the ranks of condition, images and others of all choices between images while a graph is traced."""
    found: list[tuple[int, ...]] = []
    select = gen_math_ops.select_v2

    def recorded(*values: tf.Tensor, name: str | None = None, **named: tf.Tensor) -> tf.Tensor:
        result = select(*values, name=name, **named)
        if result.shape.rank == 4:
            found.append(tuple(tf.convert_to_tensor(value).shape.rank for value in (*values, *named.values())))
        return result

    monkeypatch.setattr(gen_math_ops, "select_v2", recorded)
    yield found


def classifier(images: tf.Tensor) -> tf.Tensor:
    filters = tf.reshape(tf.range(3.0 * 3 * 3 * 5), (3, 3, 3, 5)) / 135
    return tf.reduce_mean(tf.nn.conv2d(images, filters, 1, "SAME"), axis=(1, 2))


CASES = [
    (name, norm)
    for name in ATTACKS
    for norm in NORMS
    if norm != "l1" or name.partition("-")[0] in ("apgd", "fab", "square")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_choices_between_images_have_inputs_of_their_rank(name, norm, ranks):
    def run(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return ATTACKS[name](classifier, images, labels, norm=norm, epsilon=0.5, seed=1)

    signature = (tf.TensorSpec((4, 8, 8, 3)), tf.TensorSpec((4,), tf.int32))
    tf.function(run, autograph=False).get_concrete_function(*signature)
    # One step in linf, and the last of several, choose nothing.
    assert set(ranks) == (set() if norm == "linf" and name in ("fgsm", "pgd-last") else {(4, 4, 4)})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_choices_in_free_training_have_inputs_of_their_rank(norm, ranks):
    attack = AttackConfig(norm=norm, epsilon=0.5, step_size=0.1, steps=1)
    images = tf.TensorSpec((4, 8, 8, 3))
    moved = tf.function(lambda points, gradient: moved_perturbation(points, gradient, attack), autograph=False)
    moved.get_concrete_function(images, images)
    assert set(ranks) == {(4, 4, 4)}
