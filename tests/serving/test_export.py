"""Tests of published versions: their files, their answers, and that nothing incomplete is ever published."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

from robust_tf import export
from robust_tf.data.preprocessing import Preprocessing
from robust_tf.data.transforms import Decoding, decode, evaluation_transform
from robust_tf.errors import UserError
from robust_tf.results import JobResults, MeasuredAttack
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.publish import export as publish
from robust_tf.serving.publish import staging, verify
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.model_card import probe_from_results
from robust_tf.serving.publish.probe import AttackProbe
from tests.data.images import encoded as image_file
from tests.serving.models import LABELS


@pytest.fixture(scope="module")
def model(exported):
    loaded = LoadedModel(exported)
    yield loaded
    loaded.close()


def encoded(kind, image):
    return {"png": tf.io.encode_png, "jpeg": tf.io.encode_jpeg}[kind](image).numpy()


@pytest.fixture
def tiny():
    """A classifier that is exported within a second."""
    images = keras.Input((8, 8, 3), name="images")
    features = keras.layers.Flatten(name="features")(images)
    return keras.Model(images, keras.layers.Dense(2, name="logits")(features), name="tiny")


def test_signatures_have_fixed_names_and_types_and_any_batch_size(model):
    described = {
        name: tuple(
            {key: (info.dtype, info.tensor_shape.dim[0].size) for key, info in part.items()}
            for part in (definition.inputs, definition.outputs)
        )
        for name, definition in model.signatures.items()
        if not name.startswith("__")
    }
    floats, integers, strings, uint8 = (1, -1), (9, -1), (7, -1), (4, -1)
    answers = {"probabilities": floats, "logits": floats, "classes": strings, "top_k": integers}
    assert described == {
        "serving_default": ({"image_bytes": strings}, answers),
        "predict_pixels": ({"images": floats}, answers),
        "predict_uint8": ({"images": uint8}, answers),
        "features": ({"images": floats}, {"features": floats}),
        "classify": ({"inputs": strings}, {"classes": strings, "scores": floats}),
        "preview": ({"image_bytes": strings}, {"preview_image_bytes": strings}),
        "attack_probe": (
            {"image_bytes": strings, "label": integers, "epsilon": floats},
            {
                "robust": integers,
                "margin": floats,
                "adversarial_class": strings,
                "adversarial_probabilities": floats,
                "clean_image_bytes": strings,
                "adversarial_image_bytes": strings,
            },
        ),
    }


def test_answers_equal_those_of_the_classifier(model, classifier):
    pixels = np.random.default_rng(1).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    answer = model.run("predict_pixels", {"images": pixels})
    logits = classifier.predict(pixels, verbose=0)
    np.testing.assert_allclose(answer["logits"], logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(answer["probabilities"], tf.nn.softmax(logits), atol=1e-5)
    np.testing.assert_array_equal(answer["top_k"], np.argsort(-logits, axis=-1))
    assert [LABELS[index].encode() for index in answer["top_k"][0]] == answer["classes"][0].tolist()


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("shape", [(16, 16, 3), (40, 25, 3), (30, 90, 1)])
def test_encoded_images_are_prepared_as_in_evaluation(model, classifier, kind, shape):
    image = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    bytes_ = encoded(kind, image)
    prepared = evaluation_transform(decode(bytes_), image_size=16, resize_size=20)
    expected = classifier.predict(prepared[None], verbose=0)
    answer = model.run("serving_default", {"image_bytes": np.array([bytes_, bytes_], object)})
    np.testing.assert_allclose(answer["logits"], np.repeat(expected, 2, 0), atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("bytes_", "message"),
    [
        (b"", "Input is empty"),
        (b"no image", "Unknown image file format"),
        (encoded("png", np.zeros((20, 20, 3), np.uint8))[:60], "Invalid PNG data"),
        (encoded("png", np.zeros((1, 21, 3), np.uint8)), "must be at most 20 times as long as it is wide"),
    ],
)
def test_bad_images_are_refused(model, bytes_, message):
    with pytest.raises(ServingError) as raised:
        model.run("serving_default", {"image_bytes": np.array([bytes_], object)})
    assert raised.value.code == "INVALID_ARGUMENT"
    assert message in raised.value.message


def test_graph_itself_refuses_a_missing_batch_dimension(exported):
    """TensorFlow Serving does not compare shapes, so without this its process would abort."""
    script = f"""
import numpy as np, tensorflow as tf
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], {str(exported)!r})
    definition = meta.signature_def["predict_pixels"]
    from tensorflow.core.protobuf import config_pb2
    # Feeds the input as C++ does; Python would compare the shapes first.
    call = session._make_callable_from_options(config_pb2.CallableOptions(
        feed=[definition.inputs["images"].name], fetch=[definition.outputs["logits"].name]))
    for shape in [(16, 16, 3), (1, 17, 16, 3), (1, 1, 16, 16, 3)]:
        try:
            call(np.zeros(shape, np.float32))
        except tf.errors.InvalidArgumentError as error:
            print("refused", shape)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("refused") == 3


def test_features_and_classify_agree_with_the_classifier(model, classifier):
    pixels = np.random.default_rng(3).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    features = keras.Model(classifier.input, classifier.get_layer("features").output)
    np.testing.assert_allclose(
        model.run("features", {"images": pixels})["features"], features.predict(pixels, verbose=0), atol=1e-5
    )
    bytes_ = encoded("png", (pixels[0] * 255).astype(np.uint8))
    example = tf.train.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(bytes_)
    answer = model.run("classify", {"inputs": np.array([example.SerializeToString()], object)})
    default = model.run("serving_default", {"image_bytes": np.array([bytes_], object)})
    assert answer["classes"].tolist() == default["classes"].tolist()
    np.testing.assert_allclose(answer["scores"], -np.sort(-default["probabilities"]), atol=1e-6)


def test_attack_probe_stays_in_the_ball_and_changes_the_prediction(model, classifier):
    image = np.random.default_rng(4).integers(0, 256, (16, 16, 3), np.uint8)
    bytes_ = encoded("png", image)
    predicted = int(model.run("serving_default", {"image_bytes": np.array([bytes_], object)})["top_k"][0, 0])
    epsilons = np.float32([0.0, 0.05, 0.5, 3.0])
    answer = model.run(
        "attack_probe",
        {
            "image_bytes": np.array([bytes_] * 4, object),
            "label": np.array([predicted, -1, -1, -1]),
            "epsilon": epsilons,
        },
    )
    assert answer["robust"].tolist() == (answer["margin"] > 0).astype(int).tolist()
    assert answer["robust"][0] == 1
    assert answer["robust"][-1] == 0
    assert answer["adversarial_class"][0] == LABELS[predicted].encode()
    assert answer["adversarial_class"][-1] != LABELS[predicted].encode()
    assert sorted(answer["margin"], reverse=True) == answer["margin"].tolist()
    pictures = {
        key: np.array([tf.io.decode_png(png).numpy() for png in answer[key]]).astype(np.float32) / 255
        for key in ("clean_image_bytes", "adversarial_image_bytes")
    }
    moved = pictures["adversarial_image_bytes"] - pictures["clean_image_bytes"]
    distance = np.sqrt(np.sum(moved**2, axis=(1, 2, 3)))
    rounding = np.sqrt(16 * 16 * 3) / 255
    assert (distance <= epsilons + rounding).all()
    assert distance[0] == 0
    assert distance[-1] > 1
    for label, epsilon in [(5, 0.1), (-2, 0.1), (0, -0.1), (0, np.nan)]:
        with pytest.raises(ServingError, match="INVALID_ARGUMENT"):
            model.run(
                "attack_probe",
                {
                    "image_bytes": np.array([bytes_], object),
                    "label": np.array([label]),
                    "epsilon": np.float32([epsilon]),
                },
            )


def test_version_holds_labels_card_weights_and_warm_up(exported, classifier, tmp_path):
    assert (exported.name, exported.parent.name) == ("1", "digits")
    assert (exported / "assets" / "labels.txt").read_text().split() == LABELS
    card = json.loads((exported / "model_card.json").read_text())
    assert card["dataset"] == "digits"
    assert (card["image_size"], card["resize_size"], card["pixel_range"]) == (16, 20, [0.0, 1.0])
    assert (card["exif"], card["alpha_background"]) == ("ignore", "none")
    assert card["attack_probe"] == {"norm": "l2", "steps": 3, "epsilon": 0.5}
    weights = sum(np.asarray(weight).nbytes for weight in classifier.weights)
    stored = sum(path.stat().st_size for path in (exported / "variables").glob("*.data-*"))
    assert stored < 1.05 * weights
    records = tf.data.TFRecordDataset(str(exported / "assets.extra" / "tf_serving_warmup_requests"))
    logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records.as_numpy_iterator()]
    asked = [log.predict_log.request.model_spec.signature_name for log in logs if log.HasField("predict_log")]
    assert asked == ["serving_default", "predict_pixels", "predict_uint8", "features", "preview", "attack_probe"]
    assert logs[-1].classify_log.request.model_spec.signature_name == "classify"
    assert [path.name for path in exported.parent.iterdir()] == ["1"]


def test_version_loads_without_this_package(exported, tmp_path):
    script = f"""
import sys, tensorflow as tf
model = tf.saved_model.load({str(exported)!r})
answer = model.signatures["predict_pixels"](images=tf.zeros([2, 16, 16, 3]))
assert "robust_tf" not in sys.modules
print(answer["classes"].shape)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": ""}
    )
    assert result.stdout == "(2, 5)\n", result.stderr[-2000:]


def test_versions_count_up_and_are_never_overwritten(tiny, tmp_path):
    first = export_classifier(tiny, tmp_path, "m", model_card={}, version=7)
    (tmp_path / "m" / "0012").mkdir()
    assert export_classifier(tiny, tmp_path, "m", model_card={}) == tmp_path / "m" / "13"
    before = sorted((first / "variables").iterdir())
    for version in (7, 12):
        with pytest.raises(UserError, match=f"version={version}"):
            export_classifier(tiny, tmp_path, "m", model_card={}, version=version)
    assert sorted((first / "variables").iterdir()) == before
    assert (first / "assets" / "labels.txt").read_text() == "0\n1\n"


def test_file_in_place_of_a_version_is_an_error(tiny, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "1").write_text("no folder")
    with pytest.raises(UserError, match="Nothing was published"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "a/b"}, "'a/b'"),
        ({"model_name": ""}, "''"),
        ({"model_name": ".hidden"}, "'.hidden'"),
        ({"version": 0}, "version=0"),
        ({"version": 2**63}, f"version={2**63}"),
        ({"labels": ["a"]}, "2 classes needs a label. Received: 1 labels"),
        ({"labels": ["a", "a"]}, "more than once: a"),
        ({"labels": ["a", "b\nc"]}, r"'b\nc'"),
        ({"labels": ["a", " "]}, "' '"),
        ({"resize_size": 7}, "resize_size=7"),
    ],
)
def test_bad_arguments_publish_nothing(tiny, tmp_path, arguments, message):
    with pytest.raises(UserError) as raised:
        export_classifier(tiny, tmp_path, **{"model_name": "m", "model_card": {}, **arguments})
    assert message in str(raised.value)
    assert not list(tmp_path.rglob("saved_model.pb"))


def test_classifier_of_variable_image_size_is_refused(tmp_path):
    images = keras.Input((None, None, 3), name="images")
    free = keras.Model(images, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(images)))
    with pytest.raises(UserError, match=r"input shape \(None, None, None, 3\)"):
        export_classifier(free, tmp_path, "m", model_card={})


def test_export_with_other_answers_is_not_published(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "logits_from", lambda model, images: model.predict(images, verbose=0) + 1e-3)
    with pytest.raises(UserError, match="a difference of"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert list((tmp_path / "m").iterdir()) == []


def test_diverged_classifier_is_not_published(tiny, tmp_path):
    tiny.get_layer("logits").bias.assign([np.nan, 0.0])
    with pytest.raises(UserError, match="must be finite"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert list((tmp_path / "m").iterdir()) == []


def test_export_that_the_session_cannot_restore_is_not_published(tiny, tmp_path, monkeypatch):
    """Saves Keras variables, which only Python can find again, instead of TensorFlow's."""
    save = tf.saved_model.save

    def save_badly(module, path, signatures):
        module.weights = tiny.weights
        save(module, path, signatures=signatures)

    monkeypatch.setattr(publish.tf.saved_model, "save", save_badly)
    with pytest.raises(UserError, match="cannot be served"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert list((tmp_path / "m").iterdir()) == []


def test_full_disk_publishes_nothing(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "write_warmup", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert list((tmp_path / "m").iterdir()) == []


def test_leftovers_of_killed_exporters_are_removed(tiny, tmp_path):
    base = tmp_path / "m"
    for name in (".export-dead", ".export-working", ".export-young"):
        (base / name).mkdir(parents=True)
        (base / name / "saved_model.pb").write_bytes(b"part")
    for name in (".export-dead", ".export-working"):
        os.utime(base / name, (0, 0))
    with staging.locked(base / ".export-working"):
        export_classifier(tiny, tmp_path, "m", model_card={})
    assert {path.name for path in base.iterdir()} == {".export-working", ".export-young", "1"}


def test_version_appears_with_one_rename(tiny, tmp_path, monkeypatch):
    """All files are synced under another name first, so a kill at any moment leaves no partial version."""
    synced = {}

    def recording(folder):
        sync(folder)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        synced.update({path.relative_to(folder): path.stat().st_ino for path in folder.rglob("*")})

    sync = publish.sync
    monkeypatch.setattr(publish, "sync", recording)
    version = export_classifier(tiny, tmp_path, "m", model_card={})
    # These are the same files, not copies.
    assert {path.relative_to(version): path.stat().st_ino for path in version.rglob("*")} == synced


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_has_float32_inputs_and_outputs(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    images = keras.Input((8, 8, 3), name="images", dtype="float32")
    features = keras.layers.Dense(4)(keras.layers.Flatten()(images))
    model = keras.Model(images, keras.layers.Dense(2, dtype="float32")(features))
    loaded = LoadedModel(export_classifier(model, tmp_path, "m", model_card={}))
    answer = loaded.run("predict_pixels", {"images": np.zeros((1, 8, 8, 3), np.float32)})
    assert {answer["logits"].dtype, answer["probabilities"].dtype} == {np.dtype(np.float32)}
    features = loaded.run("features", {"images": np.zeros((1, 8, 8, 3), np.float32)})["features"]
    assert features.dtype == np.float32


@pytest.mark.usefixtures("no_fresh_process")
def test_program_exports_with_the_facts_of_results_json(tiny, tmp_path, capsys):
    tiny.save(tmp_path / "classifier.keras")
    results = {
        "exif": "apply",
        "alpha_background": "black",
        "class_names": ["cat", "dog"],
        "dataset": "pets",
        "resize_size": 9,
        "clean_accuracy": 0.5,
        "robust_accuracy": 0.25,
        "robust_accuracy_attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.0125, "steps": 20},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    flags = [f"--classifier={tmp_path / 'classifier.keras'}", f"--export_dir={tmp_path / 'E'}", "--model_name=pets"]
    export.main(["export", *flags, "--attack_probe", "--attack_steps=2", "--license=CC0"])
    version = tmp_path / "E" / "pets" / "1"
    assert capsys.readouterr().out.startswith(f"Published {version} (")
    card = json.loads((version / "model_card.json").read_text())
    assert (card["labels"], card["resize_size"], card["license"]) == (["cat", "dog"], 9, "CC0")
    assert card["robust_accuracy"] == 0.25
    assert (card["exif"], card["alpha_background"]) == ("apply", "black")
    assert card["attack_probe"] == {"norm": "linf", "steps": 2, "epsilon": 0.1}

    (tmp_path / "labels.txt").write_text("a\nb\n")
    export.main(["export", *flags, f"--labels={tmp_path / 'labels.txt'}", "--version=5", "--resize_size=8"])
    assert json.loads((version.parent / "5" / "model_card.json").read_text())["labels"] == ["a", "b"]


def probabilities_by_hand(images):
    scores = keras.layers.Dense(3, activation="exponential")(keras.layers.Flatten()(images))
    return scores / keras.ops.sum(scores, axis=-1, keepdims=True)


def softmax_before_a_reshape(images):
    return keras.layers.Reshape((3,))(keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(images)))


@pytest.mark.parametrize("end", [probabilities_by_hand, softmax_before_a_reshape])
def test_probabilities_are_never_served_as_logits(end, tmp_path):
    """Here, no softmax can be removed, so the comparison with the user's model must fail."""
    images = keras.Input((8, 8, 3))
    with pytest.raises(UserError, match="'mine', whose probabilities differ from them by.*Nothing was published"):
        export_classifier(keras.Model(images, end(images), name="mine"), tmp_path, "m", model_card={})
    assert list((tmp_path / "m").iterdir()) == []


def test_probabilities_are_compared_with_the_original_model(tiny, tmp_path):
    other = keras.models.clone_model(tiny)
    with pytest.raises(UserError, match="whose outputs differ from them by"):
        export_classifier(tiny, tmp_path, "m", model_card={}, original=other)


@pytest.mark.usefixtures("no_fresh_process")
def test_program_checks_results_json_and_the_first_layer(tmp_path, capsys):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    model.save(tmp_path / "classifier.keras")
    flags = [f"--classifier={tmp_path / 'classifier.keras'}", f"--export_dir={tmp_path / 'E'}", "--model_name=m"]
    for results, message in (
        ({"downscale": 4}, "trained with --downscale=4"),
        ({"image_size": 16}, "which takes images of 8 pixels a side, and a results.json that says 16"),
        ({"class_names": "ab"}, "class_names='ab'"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match=message):
            export.main(["export", *flags])
    (tmp_path / "results.json").unlink()
    export.main(["export", *flags])
    assert "WARNING: The layer 'rescaling'" in capsys.readouterr().out


def test_bad_arguments_of_the_program_are_explained(tmp_path):
    file = tmp_path / "classifier.keras"
    flags = ["--export_dir=E", "--model_name=m"]
    with pytest.raises(UserError, match="no --classifier"):
        export.main(["export", *flags])
    with pytest.raises(UserError, match="There is no classifier .*classifier.keras"):
        export.main(["export", f"--classifier={file}", *flags])
    file.write_bytes(b"no classifier")
    with pytest.raises(UserError, match="Cannot read the classifier"):
        export.main(["export", f"--classifier={file}", *flags])
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="Received: list"):
        export.main(["export", f"--classifier={file}", *flags])
    with pytest.raises(UserError, match="'extra'"):
        export.main(["export", f"--classifier={file}", *flags, "extra"])


def test_probe_needs_a_norm():
    with pytest.raises(UserError, match="norm=''"):
        probe_from_results(JobResults())
    with pytest.raises(UserError, match="'l3'.*Valid: l2, linf"):
        probe_from_results(JobResults(), norm="l3")
    with pytest.raises(UserError, match="steps=0"):
        AttackProbe(norm="l2", steps=0)
    assert probe_from_results(JobResults(robust_accuracy_attack=MeasuredAttack(norm="l2", epsilon=1.0))).epsilon == 1.0


def test_all_formats_of_an_image_give_the_same_answer(model):
    folder = pathlib.Path(__file__).parent / "images"
    logits = [
        model.run("serving_default", {"image_bytes": np.array([path.read_bytes()], object)})["logits"][0]
        for path in sorted(folder.iterdir())
    ]
    assert len(logits) == 5
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=0.05 * np.abs(logits[0]).max())


def test_encoded_images_are_decoded_as_in_training(tiny, tmp_path):
    """This concerns EXIF rotation and transparency."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (20, 30, 4)).astype(np.uint8))
    files = [
        image_file(picture.convert("RGB"), "JPEG", exif=exif),
        image_file(picture, "PNG"),
        image_file(picture.convert("RGB").quantize(8), "GIF", transparency=2),
        image_file(picture, "WEBP", lossless=True),
    ]
    decoding = Decoding(exif="apply", alpha_background="white")
    of_training = Preprocessing(image_size=8, resize_size=9, augmentation="none", decoding=decoding)
    seen = np.stack([of_training.for_evaluation(tf.constant(data)) for data in files])
    version = export_classifier(tiny, tmp_path, "m", model_card={}, resize_size=9, decoding=decoding)
    loaded = LoadedModel(version)
    answer = loaded.run("serving_default", {"image_bytes": np.array(files, object)})
    np.testing.assert_allclose(answer["logits"], tiny.predict(seen, verbose=0), atol=1e-5)
    previews = loaded.run("preview", {"image_bytes": np.array(files, object)})["preview_image_bytes"]
    shown = np.stack([tf.io.decode_png(preview).numpy() for preview in previews])
    np.testing.assert_allclose(shown / 255, seen, atol=0.501 / 255)
    loaded.close()
