"""Tests of running artifacts: every format, in its own runtime, answers like the classifier it was made from."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.serving.artifacts import open_artifact
from robust_tf.serving.artifacts.onnx_file import OnnxArtifact
from tests.serving.models import LABELS

pytestmark = pytest.mark.slow  # converting to all formats takes 10 seconds

# The exact formats by name, with the places inside a model's folder that mean their version 1.
EXACT = {
    "SavedModel": ["1", "."],
    "ONNX": ["onnx/1", "onnx", "onnx/1/model.onnx"],
    "LiteRT": ["litert/1", "litert", "litert/1/model.tflite"],
}
IMAGES = np.random.default_rng(1).uniform(size=(5, 16, 16, 3)).astype(np.float32)


def close_to(expected):
    return pytest.approx(expected, rel=0, abs=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in EXACT.items() for place in places])
def test_an_artifact_gives_the_logits_of_the_classifier(formats, classifier, name, place):
    expected = classifier.predict(IMAGES, verbose=0)
    with open_artifact(str(formats / place)) as artifact:
        assert (artifact.name, artifact.labels, artifact.image_size) == (name, tuple(LABELS), 16)
        assert (artifact.card["dataset"], artifact.card["resize_size"]) == ("digits", 20)
        for count in (1, 5, 1):
            logits = artifact.logits(IMAGES[:count])
            assert logits.dtype == np.float32
            assert logits == close_to(expected[:count])
        assert artifact.logits(IMAGES[:0]).shape == (0, 5)


def test_int8_rounds_the_logits_but_predicts_the_same_labels(formats, classifier, samples):
    expected = classifier.predict(samples.images, verbose=0)
    with open_artifact(str(formats / "litert_int8")) as artifact:
        assert artifact.name == "LiteRT int8"
        logits = artifact.logits(samples.images)
    assert np.abs(logits - expected).max() > 1e-4 * np.abs(expected).max()
    assert np.mean(logits.argmax(axis=1) == expected.argmax(axis=1)) >= 0.9


@pytest.mark.parametrize("protocol", ["REST", "gRPC"])
def test_a_running_server_is_an_artifact(embedded, classifier, protocol):
    address = {"REST": f"{embedded.url}/digits", "gRPC": f"grpc://{embedded.target}/digits"}[protocol]
    images = np.concatenate([IMAGES] * 8)  # more than one request
    with open_artifact(address) as artifact:
        assert (artifact.name, artifact.image_size, artifact.card) == ("server", 16, {})
        assert artifact.logits(images) == close_to(classifier.predict(images, verbose=0))
        assert artifact.labels == tuple(LABELS)


def test_the_address_may_be_the_path_of_rest(embedded):
    with open_artifact(f"{embedded.url}/v1/models/digits") as artifact:
        assert artifact.image_size == 16


@pytest.mark.parametrize(
    ("model", "message"), [("half_plus_two", "no 'predict_pixels'"), ("cats", "NOT_FOUND"), ("", "model_name=''")]
)
def test_a_server_without_such_a_model_is_refused(embedded, model, message):
    with pytest.raises(UserError, match=message):
        open_artifact(f"{embedded.url}/{model}")


def test_a_server_that_does_not_run_is_refused():
    with pytest.raises(UserError, match="http://127.0.0.1:9/cats: UNAVAILABLE"):
        open_artifact("http://127.0.0.1:9/cats")


@pytest.mark.parametrize("place", ["onnx/1", "litert/1", "litert_int8/1"])
def test_a_file_needs_only_its_own_runtime(formats, place):
    script = f"""
import sys, numpy as np
from robust_tf.serving.artifacts import open_artifact
open_artifact({str(formats / place)!r}).logits(np.zeros((2, 16, 16, 3), np.float32))
others = {{"tensorflow", "keras", "onnxruntime", "ai_edge_litert"}} & set(sys.modules)
print(sorted(others))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    runtime = "onnxruntime" if place == "onnx/1" else "ai_edge_litert"
    assert run.stdout == f"['{runtime}']\n", run.stderr


def test_onnx_runtime_reports_nothing_to_its_vendor(formats, tmp_path):
    """With its telemetry, it would begin with a file in the temporary folder."""
    script = f"from robust_tf.serving.artifacts import open_artifact as o; o({str(formats / 'onnx')!r}).close()"
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment | {"TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float64), "float64 of shape"),
        (IMAGES[:, :8], r"\(5, 8, 16, 3\)"),
        (IMAGES[0], r"\(16, 16, 3\)"),
        (np.full_like(IMAGES, np.nan), "NaN or infinity"),
    ],
)
def test_other_images_are_refused(formats, images, message):
    with open_artifact(str(formats / "onnx")) as artifact, pytest.raises(UserError, match=message):
        artifact.logits(images)


def test_the_latest_version_is_opened(formats, tmp_path):
    for number in ("1", "10", "9"):
        shutil.copytree(formats / "onnx" / "1", tmp_path / number)
        card = json.loads((tmp_path / number / "model_card.json").read_text())
        (tmp_path / number / "model_card.json").write_text(json.dumps(card | {"number": number}))
    assert open_artifact(str(tmp_path)).card["number"] == "10"


def test_many_images_are_processed_in_batches(formats, monkeypatch):
    monkeypatch.setattr(OnnxArtifact, "_batch_size", 2)
    with open_artifact(str(formats / "onnx")) as artifact:
        sizes = []
        run = artifact._run
        monkeypatch.setattr(artifact, "_run", lambda images: sizes.append(len(images)) or run(images))
        assert artifact.logits(IMAGES).shape == (5, 5)
    assert sizes == [2, 2, 1]


def copied(formats, tmp_path):
    return shutil.copytree(formats / "onnx" / "1", tmp_path / "1")


def test_a_file_that_differs_from_its_card_is_refused(formats, tmp_path):
    folder = copied(formats, tmp_path)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx, which has changed since it was exported"):
        open_artifact(str(folder))
    (folder / "labels.txt").unlink()
    shutil.copy(formats / "onnx" / "1" / "model.onnx", folder)
    with pytest.raises(UserError, match=r"labels\.txt, which is missing"):
        open_artifact(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "without it"),
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"labels": ["a"], "classes": 2, "image_size": 8}', "1 labels for 2 classes"),
        ("{}", "KeyError: 'labels'"),
    ],
)
def test_an_artifact_needs_its_card(formats, tmp_path, content, message):
    card = copied(formats, tmp_path) / "model_card.json"
    card.unlink()
    if content is not None:
        card.write_text(content)
    with pytest.raises(UserError, match=message):
        open_artifact(str(card.parent))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing", "which does not exist"),
        ("", "a folder without one"),
        ("file.txt", "a file"),
        ("gs://bucket/model", "Copy the artifact to a folder of this machine"),
    ],
)
def test_a_location_without_an_artifact_is_refused(tmp_path, place, message):
    (tmp_path / "file.txt").write_text("no artifact")
    with pytest.raises(UserError, match=message):
        open_artifact(place if "://" in place else str(tmp_path / place))


@pytest.mark.parametrize(
    ("place", "module", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("litert", "ai_edge_litert", "litert"), ("http://localhost", "httpx", "serve")],
)
def test_a_missing_package_is_named_with_its_extra(formats, monkeypatch, place, module, extra):
    for name in list(sys.modules):
        if name.split(".")[0] == module or name.startswith(
            ("robust_tf.serving.artifacts.", "robust_tf.serving.client.rest")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"package {module}.* pip install 'robust_tf\[{extra}\]'"):
        open_artifact(place if "://" in place else str(formats / place))
