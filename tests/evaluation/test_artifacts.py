"""Tests of measuring exports beside their classifier, with the same images and attacks."""

import json
import pathlib

import keras
import numpy as np
import pytest
from small_jobs import CLASSES

from robust_tf import evaluate
from robust_tf.attacks import pgd, square
from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.seeds import image_seeds
from robust_tf.config.evaluation import EvaluateConfig
from robust_tf.errors import UserError
from robust_tf.evaluation import artifacts
from robust_tf.evaluation.artifacts import AttackPlan, Target, attacks_to_transfer, measure_targets
from robust_tf.evaluation.state_file import StateFile
from robust_tf.evaluation.subject import draw_images, load_subject
from robust_tf.models import load_classifier
from robust_tf.serving.artifacts import FORMATS
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.formats import Samples
from tests.serving.conftest import running_server

FOLDERS = {"SavedModel": "1", "ONNX": "onnx", "LiteRT": "litert", "LiteRT int8": "litert_int8"}
EXACT = ["SavedModel", "ONNX", "LiteRT"]


@pytest.fixture(scope="module")
def subject(jobs, data_dir):
    return load_subject(jobs["good"].classifier, data_dir=str(data_dir))


@pytest.fixture(scope="module")
def images(subject):
    return draw_images(subject.task, count=40, seed=0)


@pytest.fixture(scope="module")
def exports(subject, tmp_path_factory):
    """Folder of the good classifier in all formats."""
    first = export_classifier(
        subject.classifier,
        tmp_path_factory.mktemp("exports"),
        "digits",
        labels=list(map(str, CLASSES)),
        model_card={},
        formats=list(FORMATS),
        samples=Samples(*subject.task.preview(80)),
    )
    return first.parent


@pytest.fixture
def flags(jobs, data_dir, tmp_path):
    def make(*locations, name="evaluation", **changes) -> list[str]:
        values = {
            "classifier": jobs["good"].classifier,
            "artifact": ",".join(map(str, locations)),
            "output": tmp_path / name,
            "data_dir": data_dir,
            "num_images": 40,
            "num_examples": 0,
            "attack": "pgd",
            "epsilon": "0.5,1",
            "queries": 20,
            **changes,
        }
        return ["evaluate", *(f"--{name}={value}" for name, value in values.items())]

    return make


def entries_in(folder: pathlib.Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["artifacts"]


def plan_of(**changes) -> AttackPlan:
    values = {"transferred": ("pgd",), "norm": "l2", "epsilons": [1.0], "queries": 60, "batch_size": 16, "seed": 3}
    return AttackPlan(**{**values, "jit_compile": False, **changes})


def measured(target, subject, images, plan, folder):
    state_file = StateFile(folder / "state.json", {})
    (result,) = measure_targets([target], subject, images, plan, state_file=state_file, on_progress=lambda *_: None)
    return result


def target_of(classifier, **changes) -> Target:
    def predict(images):
        return classifier.predict(images, verbose=0)

    values = {"name": "ONNX", "location": "here", "key": "key", "model": predict, "predict": predict, "card": {}}
    return Target(**{**values, **changes})


@pytest.mark.slow
def test_exports_are_measured_beside_their_classifier(flags, exports, tmp_path, capsys):
    evaluate.main(flags(*(exports / folder for folder in FOLDERS.values())))
    classifier, *others = entries_in(tmp_path / "evaluation")
    assert [entry["artifact"] for entry in others] == list(FOLDERS)
    assert classifier["artifact"] == "classifier"
    assert classifier["agreement"]["accuracy"] == 1.0
    for entry in [classifier, *others]:
        small, large = entry["attacks"]
        assert (small["epsilon"], large["epsilon"], small["square_queries"]) == (0.5, 1.0, 20)
        for attack in (small, large):
            assert attack["worst_case"]["accuracy"] <= attack["transferred"]["pgd"]["accuracy"]
            assert attack["transferred"]["pgd"]["accuracy"] <= entry["clean"]["accuracy"]
            low, high = attack["worst_case"]["interval"]
            assert low <= attack["worst_case"]["accuracy"] <= high
        assert set(small["worst_case"]["fell"]) <= set(large["worst_case"]["fell"])
        assert large["worst_case"]["accuracy"] < small["worst_case"]["accuracy"]
    for entry in others:
        if entry["artifact"] in EXACT:
            assert entry["agreement"] == classifier["agreement"]
            assert entry["attacks"] == classifier["attacks"]
        assert entry["clean"]["minus_classifier"]["difference"] == pytest.approx(
            entry["clean"]["accuracy"] - classifier["clean"]["accuracy"]
        )
    out = capsys.readouterr().out
    assert all(name in out for name in FOLDERS) and "classifier" in out
    assert "worst case, l2 1, LiteRT int8 minus classifier: " in out


@pytest.mark.slow
def test_the_transferred_images_are_those_of_highest_loss(subject, images, tmp_path):
    seen = []
    target = target_of(subject.classifier)
    recording = target_of(subject.classifier, predict=lambda pixels: seen.append(pixels) or target.predict(pixels))
    result = measured(recording, subject, images, plan_of(batch_size=40), tmp_path)
    clean, adversarial = seen
    np.testing.assert_array_equal(clean, images.pixels)
    expected = pgd(subject.classifier, images.pixels, images.labels, norm="l2", epsilon=1.0, steps=20)
    np.testing.assert_allclose(adversarial, expected, atol=1e-5)
    right = [target.predict(pixels).argmax(axis=1) == images.labels for pixels in seen]
    np.testing.assert_array_equal(result.attacked[0].transferred["pgd"], right[0] & right[1])


@pytest.mark.slow
def test_square_queries_the_artifact_itself(subject, images, tmp_path):
    """The target has other weights, so queries to the classifier would find other images."""
    rng = np.random.default_rng(0)
    other = keras.models.clone_model(subject.classifier)
    other.set_weights([weight + rng.normal(0, 0.1, weight.shape) for weight in subject.classifier.get_weights()])
    result = measured(target_of(other), subject, images, plan_of(transferred=("fgsm",), queries=300), tmp_path)
    (attacked,) = result.attacked
    left = attacked.transferred["fgsm"]
    assert 0 < left.sum() < len(left)
    seeds = image_seeds(3, "square", images.ids[left])
    pixels, labels = images.pixels[left], images.labels[left]
    images_adv = square(other, pixels, labels, norm="l2", epsilon=1.0, queries=300, seed=seeds)
    resists = other.predict(images_adv, verbose=0).argmax(axis=1) == labels
    np.testing.assert_array_equal(attacked.robust[left], resists)
    assert not attacked.robust[~left].any()
    assert attacked.robust.sum() < left.sum()


@pytest.mark.slow
def test_an_interrupted_measurement_continues(flags, exports, tmp_path, monkeypatch):
    whole = flags(exports / "onnx", name="whole", batch_size=16)
    evaluate.main(whole)
    broken = flags(exports / "onnx", name="broken", batch_size=16)
    keep, interruptions = StateFile.keep, 0
    for writes in range(1, 40, 3):
        left = [writes]

        def stop(self, key, progress, left=left):
            keep(self, key, progress)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(StateFile, "keep", stop)
        try:
            evaluate.main(broken)
            break
        except SystemExit:
            interruptions += 1
    assert interruptions >= 3
    assert (tmp_path / "broken" / "evaluation.json").read_text() == (tmp_path / "whole" / "evaluation.json").read_text()
    monkeypatch.setattr(CompiledAttacks, "attack", None)  # would fail when called
    evaluate.main(broken)


@pytest.mark.slow
def test_an_export_can_be_added_to_a_finished_evaluation(flags, exports, tmp_path):
    evaluate.main(flags(exports / "onnx", exports / "litert", name="both"))
    evaluate.main(flags(exports / "onnx", name="added"))
    evaluate.main(flags(exports / "onnx", exports / "litert", name="added"))
    assert entries_in(tmp_path / "added") == entries_in(tmp_path / "both")


def test_without_an_attack_only_labels_are_compared(flags, exports, tmp_path):
    evaluate.main(flags(exports / "litert_int8", attack="none", epsilon=""))
    classifier, rounded = entries_in(tmp_path / "evaluation")
    assert classifier["attacks"] == rounded["attacks"] == []
    assert rounded["agreement"]["accuracy"] >= 0.9
    assert len(rounded["agreement"]["disagreeing"]) == round(40 * (1 - rounded["agreement"]["accuracy"]))


@pytest.mark.slow
def test_a_running_server_is_measured(flags, exports, tmp_path):
    with running_server(model_name="digits", model_base_path=str(exports)) as running:
        evaluate.main(flags(f"{running.url}/digits", epsilon="1"))
    classifier, server = entries_in(tmp_path / "evaluation")
    assert server["artifact"] == "server"
    assert server["attacks"] == classifier["attacks"]


def test_an_error_of_the_artifact_inside_an_attack_is_shown_as_it_is(subject, images, tmp_path):
    predict, calls = target_of(subject.classifier).predict, []

    def stopping(pixels):
        calls.append(pixels)
        if len(calls) > 3:
            raise UserError("The server cannot answer. Received: nothing.")
        return predict(np.asarray(pixels))

    with pytest.raises(UserError, match=r"^The server cannot answer\. Received: nothing\.$"):
        measured(target_of(subject.classifier, model=stopping), subject, images, plan_of(), tmp_path)


def two_classes():
    pixels = keras.Input((8, 8, 3))
    return keras.Model(pixels, keras.layers.Dense(2)(keras.layers.Flatten()(pixels)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda jobs: load_classifier(pathlib.Path(jobs["poor"].classifier)), "exported from weights with the SHA-256"),
        (lambda jobs: two_classes(), "8 pixels a side and 2 classes"),
    ],
)
def test_an_export_of_another_classifier_is_refused(flags, jobs, tmp_path, make, message):
    version = export_classifier(make(jobs), tmp_path, "other", model_card={})
    with pytest.raises(UserError, match=message):
        evaluate.main(flags(version))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": "b.keras"}, "--compare=b.keras"),
        ({"artifact": ("a", "a")}, "Received: a,a"),
        ({"queries": 0}, "--queries must be 1 or more. Received: 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**{"classifier": "c.keras", "artifact": ("a",), **changes})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["apgd-ce", "apgd-t", "fab-t", "square"], ("apgd-ce", "apgd-t")),
        (["pgd", "fgsm", "pgd"], ("pgd", "fgsm")),
        (["square"], ("apgd-ce",)),
        ([], ("apgd-ce",)),
    ],
)
def test_attacks_that_follow_a_gradient_are_transferred(names, expected):
    assert attacks_to_transfer(names) == expected


def test_a_target_is_recognized_by_its_content(exports, images, tmp_path):
    with (
        artifacts.open_artifact(str(exports / "onnx")) as first,
        artifacts.open_artifact(str(exports / "litert")) as second,
    ):
        keys = [
            Target.of_artifact(location, artifact, images.pixels).key
            for location, artifact in (("a", first), ("b", first), ("a", second))
        ]
    assert keys[0] == keys[1] != keys[2]
