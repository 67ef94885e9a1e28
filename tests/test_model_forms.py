"""Every form of a Keras classifier in every program that reads a `.keras` file.

Each pair either works, with the probabilities that the user's own model gives, or ends in a message of one line that
says what was found and what to do.
"""

import functools
import json
import pathlib
from typing import Any

import keras
import numpy as np
import pytest

from robust_tf import evaluate, export, train
from robust_tf.attacks import AttackConfig, AttackWarning, pgd
from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.config.job import JobConfig
from robust_tf.config.visualization import VisualizeConfig
from robust_tf.errors import UserError
from robust_tf.evaluation import run
from robust_tf.evaluation.state_file import StateFile
from robust_tf.evaluation.subject import draw_images
from robust_tf.evaluation.visualization import run_visualization
from robust_tf.job.run import build_job
from robust_tf.models import features_of, load_classifier, save_classifier
from robust_tf.serving.model.session import LoadedModel
from robust_tf.training import AdversarialTrainer
from tests.model_forms import FORMS, SIZE, Form, softmax

IMAGES = np.random.default_rng(1).random((6, SIZE, SIZE, 3)).astype(np.float32)
TAKEN = [name for name, form in FORMS.items() if not form.refusal]
# The fast tests run a program with these forms, the slow tests with the others.
USUAL = {"sequential", "nested", "sigmoid"}
# The fast tests train these forms: a plain one, and those that differ in their inputs, outputs or precision.
TRAINED = {
    "sequential",
    "one logit",
    "two inputs",
    "output called logits",
    "softmax in half precision",
    "channels_first",
}
REFUSED = [name for name, form in FORMS.items() if form.refusal]


class Saved:
    """A form in a file, and the probabilities that the model in memory gave before it was saved."""

    def __init__(self, form: Form, folder: pathlib.Path) -> None:
        keras.utils.set_random_seed(3)
        model = form.build()
        self.form, self.path = form, folder / "mine.keras"
        if not form.refusal:
            inputs: Any = {"image": IMAGES} if isinstance(getattr(model, "input", None), dict) else IMAGES
            self.probabilities = form.probabilities(keras.tree.map_structure(np.float32, model(inputs)))
        model.save(self.path)

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(range(self.form.num_classes))


@pytest.fixture
def saved(request, tmp_path) -> Saved:
    return Saved(FORMS[request.param], tmp_path)


def run_evaluate(saved: Saved, data_dir: pathlib.Path) -> None:
    config = EvaluateConfig(
        classifier=str(saved.path),
        dataset="digits",
        classes=saved.classes,
        data_dir=str(data_dir),
        num_images=12,
        num_examples=0,
        attack=("fgsm",),
        norm="l2",
        epsilon=(2.0,),
    )
    subject = run.load(config, config.classifier)
    images = draw_images(subject.task, count=12, seed=0)
    state_file = StateFile(saved.path.with_name("state.json"), {})
    measured = run.measure(config, subject, images, state_file)
    assert measured.logits.shape == (12, saved.form.num_classes)
    (attacked,) = measured.robustness
    assert not set(attacked.warnings) & {"zero_gradients", "probabilities"}


def run_visualize(saved: Saved, data_dir: pathlib.Path) -> None:
    run_visualization(
        VisualizeConfig(
            classifier=str(saved.path),
            dataset="digits",
            classes=saved.classes,
            data_dir=str(data_dir),
            kind="inversion",
            num_images=2,
            steps=2,
        )
    )
    assert saved.path.with_name("inversion.png").exists()


def run_export(saved: Saved, data_dir: pathlib.Path) -> None:
    folder = saved.path.with_name("exports")
    flags = [f"--classifier={saved.path}", f"--export_dir={folder}", "--model_name=m", "--attack_probe", "--norm=l2"]
    export.main(["export", *flags, "--attack_steps=2"])
    served = LoadedModel(folder / "m" / "1")
    try:
        answer = served.run("predict_pixels", {"images": IMAGES})
        features = served.run("features", {"images": IMAGES})["features"]
    finally:
        served.close()
    np.testing.assert_allclose(answer["probabilities"], saved.probabilities, atol=saved.form.tolerance)
    assert features.ndim == 2


def run_source(saved: Saved, data_dir: pathlib.Path) -> None:
    config = JobConfig.from_flags(
        task="transfer",
        source=str(saved.path),
        workdir=str(saved.path.with_name("job")),
        data_dir=str(data_dir),
        classes=(0, 1, 2, 3),
        hidden_layers=1,
    )
    before = load_classifier(saved.path)
    classifier, _ = build_job(config)
    assert [weight.path for weight in classifier.trainable_weights] == [
        f"{layer}/{weight}" for layer in ("head_hidden1", "logits") for weight in ("kernel", "bias")
    ]
    # The result of a transfer can be a source again, and its features are those of the first source.
    save_classifier(classifier, saved.path.with_name("again.keras"))
    again = load_classifier(saved.path.with_name("again.keras"))
    assert again(IMAGES).shape == (6, 4)
    np.testing.assert_allclose(features_of(again)(IMAGES), features_of(before)(IMAGES), atol=1e-6)


# The programs that read a file. The trainer and the attacks, which take a model in memory, follow below.
PROGRAMS = {"evaluate": run_evaluate, "visualize": run_visualize, "export": run_export, "--source": run_source}


@pytest.mark.parametrize(
    "program", [name if name != "export" else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
@pytest.mark.parametrize(
    "saved", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in TAKEN], indirect=True
)
def test_a_form_works_in_a_program(saved, program, data_dir):
    PROGRAMS[program](saved, data_dir)


@pytest.mark.parametrize(
    "program", [name if name != "export" else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
@pytest.mark.parametrize("saved", REFUSED, indirect=True)
def test_a_form_is_refused_in_one_line(saved, program, data_dir):
    with pytest.raises(UserError, match=saved.form.refusal) as raised:
        PROGRAMS[program](saved, data_dir)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("saved", TAKEN, indirect=True)
def test_the_loaded_classifier_has_the_probabilities_of_the_users_model(saved):
    logits = load_classifier(saved.path)(IMAGES).numpy()
    assert logits.dtype == np.float32
    np.testing.assert_allclose(softmax(logits), saved.probabilities, atol=1e-6)


def test_a_transfer_from_a_users_model_names_what_it_cannot_do(tmp_path, data_dir, capsys):
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((SIZE, SIZE, 3)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(4), layers.Dense(2)]
    )
    model.save(tmp_path / "mine.keras")
    job = {"task": "transfer", "source": str(tmp_path / "mine.keras"), "data_dir": str(data_dir), "classes": (0, 1)}
    for changes, message in (
        (
            {"transfer_mode": "partial", "freeze_through": "stage1"},
            "without such a name: dense.*; stages found: head. Use the",
        ),
        (
            {"learning_rate_multipliers": ("stem=0.1",)},
            "must belong to a stage.*Received: layers without such a name: dense",
        ),
        ({"image_size": 16}, "image_size=16, built for 8"),
        ({"normalization": "dataset"}, "called 'normalization'.*normalization=source"),
    ):
        with pytest.raises(UserError, match=message):
            build_job(JobConfig.from_flags(workdir=str(tmp_path / "job"), **job, **changes))
    assert "WARNING for" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["nested", "convolution head"], indirect=True)
@pytest.mark.parametrize("settings", [{"transfer_mode": "full_network"}, {"features": "cached", "head": "ridge"}])
def test_a_whole_transfer_and_what_follows_it(saved, settings, data_dir, tmp_path):
    """The figures of the training job are those of evaluation, and the result can be published."""
    config = JobConfig.from_flags(
        task="transfer",
        source=str(saved.path),
        workdir=str(tmp_path / "job"),
        data_dir=str(data_dir),
        cache_dir=str(tmp_path / "cache"),
        classes=saved.classes,
        epochs=1,
        export_dir=str(tmp_path / "exports"),
        **settings,
    )
    train.run(config)
    job = tmp_path / "job"
    flags = [f"--classifier={job / 'classifier.keras'}", f"--data_dir={data_dir}", "--num_images=0", "--num_examples=0"]
    evaluate.main(["evaluate", *flags, "--attack=none"])
    (entry,) = json.loads((job / "evaluation" / "evaluation.json").read_text())["classifiers"]
    assert entry["clean"]["accuracy"] == json.loads((job / "results.json").read_text())["clean_accuracy"]
    assert (tmp_path / "exports" / "job" / "1" / "saved_model.pb").exists()


def inputs_and_outputs(name: str) -> tuple[keras.Model, Any, Any]:
    """A form in memory, its inputs that correspond to `IMAGES`, and its outputs for them."""
    keras.utils.set_random_seed(3)
    model = FORMS[name].build()
    images = np.moveaxis(IMAGES, -1, 1) if name == "channels_first" else IMAGES
    inputs: Any = images
    if isinstance(getattr(model, "input", None), dict):
        inputs = {
            key: images if len(each.shape) == 4 else np.ones((len(images), 2), np.float32)
            for key, each in model.input.items()
        }
    return model, inputs, model(inputs)


def loss_and_labels(output, labels):
    """The loss that fits an output, and the labels in the form that this loss takes."""
    values = np.asarray(output, np.float32)
    given = bool(values.min() >= 0 and values.max() <= 1)
    if values.shape[-1] == 1:
        return keras.losses.BinaryCrossentropy(from_logits=not given), labels
    given = given and np.allclose(values.sum(axis=-1), 1, atol=0.02)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not given)
    return loss, labels if values.ndim == 2 else np.zeros(values.shape[:-1], int)


IN_MEMORY = AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=2)
NO_GRADIENT = {"integer images", "subclassed, not symbolic"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMS
        if name not in NO_GRADIENT
    ],
)
def test_a_form_trains_under_attack(name):
    """The attack raises the compiled loss, and a training step changes the weights."""
    model, inputs, outputs = inputs_and_outputs(name)
    labels = np.arange(len(IMAGES)) % 2
    if name == "sigmoid of each label":
        loss = keras.losses.BinaryCrossentropy()
        targets: Any = np.eye(3, dtype=np.float32)[labels]
    elif isinstance(outputs, dict):
        pairs = {key: loss_and_labels(output, labels) for key, output in outputs.items()}
        loss, targets = ({key: pair[part] for key, pair in pairs.items()} for part in (0, 1))
    else:
        loss, targets = loss_and_labels(outputs, labels)
    trainer = AdversarialTrainer(model, IN_MEMORY)
    trainer.compile("sgd", loss)
    figures = trainer.evaluate(inputs, targets, verbose=0, return_dict=True)
    assert figures["loss"] > figures["clean_loss"] + 1e-3
    before = [weight.copy() for weight in model.get_weights()]
    trainer.fit(inputs, targets, verbose=0)
    assert any(np.abs(new - old).max() > 0 for new, old in zip(model.get_weights(), before, strict=True))


def test_a_form_without_a_gradient_is_named():
    model, inputs, _ = inputs_and_outputs("integer images")
    trainer = AdversarialTrainer(model, IN_MEMORY)
    trainer.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(AttackWarning, match="no gradient with respect to its images"):
        trainer.evaluate(inputs, np.zeros(6, int), verbose=0)
    model, inputs, _ = inputs_and_outputs("subclassed, not symbolic")
    trainer = AdversarialTrainer(model, IN_MEMORY)
    trainer.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    with pytest.raises(UserError, match="converts its input to a NumPy array"):
        trainer.evaluate(inputs, np.zeros(6, int), verbose=0)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_attacked_or_refused_in_one_line(name):
    """Direct calls accept only logits of shape (batch, classes), and say what they received instead."""
    model, _, outputs = inputs_and_outputs(name)
    images = np.moveaxis(IMAGES, -1, 1) if name == "channels_first" else IMAGES
    labels = np.arange(len(IMAGES)) % 2
    attack = functools.partial(pgd, model, images, labels, norm="linf", epsilon=0.1, steps=2)
    if name == "integer images":
        with pytest.warns(AttackWarning, match="The gradient is zero"):
            attack()
    elif (
        name == "two inputs"
        or isinstance(outputs, dict)
        or outputs.shape.rank != 2
        or outputs.shape[-1] == 1
        or _gives_probabilities(outputs)
    ):
        with pytest.raises(UserError, match="Received: ") as raised:
            attack()
        assert "\n" not in str(raised.value)
    else:
        np.testing.assert_allclose(np.abs(attack() - images).max(), 0.1, atol=1e-6)


def _gives_probabilities(outputs) -> bool:
    values = np.asarray(outputs, np.float32)
    return bool(values.min() >= 0 and values.max() <= 1)
