"""Compares the attacks of robust_tf with public PyTorch implementations, on the same weights and images.

    python -m tests.parity.compare --classifier=classifier.keras --dataset=fashion_mnist --data_dir=… \
        --norm=l2 --epsilon=1 --num_images=200 [--attacks=pgd,apgd-ce,apgd-t,fab-t,square] [--queries=5000]

All programs run in one process. The PyTorch programs attack the Keras classifier through a wrapper, so no weights are
converted and only the attacks differ. Apart from robust_tf the comparison needs torch, and torchattacks or autoattack
(github.com/fra31/auto-attack, on PYTHONPATH); a program that is not installed is left out. The result is a Markdown
table.
"""

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import pathlib  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf import attacks as ours  # noqa: E402
from robust_tf.config.data import DataConfig  # noqa: E402
from robust_tf.data import load_task  # noqa: E402
from robust_tf.flags import parse_number  # noqa: E402

Attacked = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images, labels -> images_adv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--classes", default="", help="Labels to keep, separated by commas.")
    parser.add_argument("--data_dir", type=pathlib.Path)
    parser.add_argument("--norm", choices=("l2", "linf", "l1"), default="l2")
    parser.add_argument("--epsilon", type=parse_number, required=True)
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--attacks", default="pgd,apgd-ce,apgd-t,fab-t,square")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--queries", type=int, default=5000, help="Number of queries of Square.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the attacks. The images do not depend on it.")
    arguments = parser.parse_args()
    classifier = keras.saving.load_model(arguments.classifier)
    images, labels = _images(arguments)
    right = _predictions(classifier, images) == labels
    print(f"{len(images)} images, {arguments.norm} epsilon {arguments.epsilon:g}; clean accuracy {right.mean():.1%}")
    print("| attack | program | robust accuracy | same verdict as ours | seconds |\n|---|---|---|---|---|", flush=True)
    for name in arguments.attacks.split(","):
        verdicts: dict[str, np.ndarray] = {}
        for program, attack in _programs(classifier, name, arguments).items():
            start = time.perf_counter()
            robust = right.copy()
            robust[right] = _resists(classifier, attack, images[right], labels[right], arguments)
            seconds = time.perf_counter() - start
            verdicts[program] = robust
            same = np.mean(robust == verdicts["robust_tf"])
            print(f"| {name} | {program} | {robust.mean():.1%} | {same:.1%} | {seconds:.0f} |", flush=True)


def _images(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    classes = tuple(int(label) for label in arguments.classes.split(",") if label)
    task = load_task(
        DataConfig(dataset=arguments.dataset, data_dir=arguments.data_dir, classes=classes), batch_size=100
    )
    images, labels = zip(*task.test.as_numpy_iterator(), strict=True)
    chosen = np.random.default_rng(0).permutation(len(np.concatenate(labels)))[: arguments.num_images]
    return np.concatenate(images)[chosen], np.concatenate(labels)[chosen].astype(np.int32)


def _predictions(classifier: keras.Model, images: np.ndarray) -> np.ndarray:
    return classifier.predict(images, verbose=0).argmax(axis=-1)


def _resists(
    classifier: keras.Model, attack: Attacked, images: np.ndarray, labels: np.ndarray, arguments: argparse.Namespace
) -> np.ndarray:
    """Returns which images keep their label, after checking that the adversarial images are in the ball."""
    size = arguments.batch_size
    images_adv = np.concatenate(
        [attack(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]
    )
    lengths = ours.NORMS[arguments.norm].length(tf.constant(images_adv - images)).numpy()
    if lengths.max() > arguments.epsilon * 1.001 + 1e-6 or images_adv.min() < 0 or images_adv.max() > 1:
        print(f"(out of the ball: {lengths.max():g}, {images_adv.min():g}..{images_adv.max():g})")
    return _predictions(classifier, images_adv) == labels


def _programs(classifier: keras.Model, name: str, arguments: argparse.Namespace) -> dict[str, Attacked]:
    programs = {"robust_tf": _ours(classifier, name, arguments)}
    if importlib.util.find_spec("torch"):
        if importlib.util.find_spec("autoattack") and (attack := _autoattack(classifier, name, arguments)):
            programs["auto-attack"] = attack
        if importlib.util.find_spec("torchattacks") and (attack := _torchattacks(classifier, name, arguments)):
            programs["torchattacks"] = attack
    return programs


def _ours(classifier: keras.Model, name: str, arguments: argparse.Namespace) -> Attacked:
    attack: Any = ours.ATTACKS[name]
    options = {"seed": arguments.seed} | ({"queries": arguments.queries} if name == "square" else {})
    threat_model: dict[str, Any] = {"norm": arguments.norm, "epsilon": arguments.epsilon}
    run = tf.function(lambda x, y: attack(classifier, x, y, **threat_model, **options), reduce_retracing=True)
    return lambda images, labels: run(tf.constant(images), tf.constant(labels)).numpy()


def _torch_model(classifier: keras.Model) -> Any:
    """Returns the classifier as a PyTorch module of images (batch, channels, height, width), with its gradient."""
    import torch

    forward = tf.function(lambda x: classifier(x, training=False), reduce_retracing=True)

    @tf.function(reduce_retracing=True)
    def pulled_back(images: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = classifier(images, training=False)
        return tape.gradient(logits, images, output_gradients=upstream)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, images: Any) -> Any:
            context.images = tf.constant(images.detach().permute(0, 2, 3, 1).contiguous().numpy())
            return torch.tensor(forward(context.images).numpy())

        @staticmethod
        def backward(context: Any, upstream: Any) -> Any:
            gradient = pulled_back(context.images, tf.constant(upstream.contiguous().numpy())).numpy()
            return torch.tensor(gradient).permute(0, 3, 1, 2).contiguous()

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1))  # torchattacks looks up the device of the parameters

        def forward(self, images: Any) -> Any:
            return Forward.apply(images)

    return Classifier().eval()


def _through_torch(attack: Callable[[Any, Any], Any]) -> Attacked:
    import torch

    def attacked(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        images_adv = attack(torch.tensor(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels.astype(np.int64)))
        return images_adv.detach().numpy().transpose(0, 2, 3, 1).astype(np.float32)

    return attacked


def _autoattack(classifier: keras.Model, name: str, arguments: argparse.Namespace) -> Attacked | None:
    if name not in ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"):
        return None
    from autoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[arguments.norm]
    program = AutoAttack(
        _torch_model(classifier), norm=norm, eps=arguments.epsilon, seed=arguments.seed, device="cpu", verbose=False
    )
    targets = min(classifier.output_shape[-1] - 1, program.apgd_targeted.n_target_classes)
    program.apgd_targeted.n_target_classes = targets
    program.fab.n_target_classes = min(classifier.output_shape[-1] - 1, 9)
    program.square.n_queries = arguments.queries
    program.attacks_to_run = [name]
    return _through_torch(lambda images, labels: program.run_standard_evaluation(images, labels, bs=len(images)))


def _torchattacks(classifier: keras.Model, name: str, arguments: argparse.Namespace) -> Attacked | None:
    import torchattacks

    model, epsilon, classes = _torch_model(classifier), arguments.epsilon, classifier.output_shape[-1]
    norm = {"linf": "Linf", "l2": "L2"}.get(arguments.norm)
    if norm is None:
        return None
    if name == "pgd":
        kind = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
        return _through_torch(kind(model, eps=epsilon, alpha=2.5 * epsilon / 20, steps=20, random_start=False))
    settings: dict[str, Any] = {"norm": norm, "eps": epsilon, "n_restarts": 1, "seed": arguments.seed}
    makers = {
        "apgd-ce": lambda: torchattacks.APGD(model, steps=100, loss="ce", **settings),
        "apgd-dlr": lambda: torchattacks.APGD(model, steps=100, loss="dlr", **settings),
        "apgd-t": lambda: torchattacks.APGDT(model, steps=100, n_classes=classes, **settings),
        "fab-t": lambda: torchattacks.FAB(model, steps=100, n_classes=classes, multi_targeted=True, **settings),
        "square": lambda: torchattacks.Square(model, n_queries=arguments.queries, **settings),
    }
    return _through_torch(makers[name]()) if name in makers else None


if __name__ == "__main__":
    main()
