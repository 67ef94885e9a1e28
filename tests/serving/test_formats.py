"""Tests of publishing in several formats: what is written, that it is checked, and that nothing wrong is published."""

import hashlib
import json
import sys

import keras
import numpy as np
import onnx
import pytest

from robust_tf import export
from robust_tf.errors import UserError
from robust_tf.models import weights_sha256
from robust_tf.serving.artifacts import FORMATS, open_artifact
from robust_tf.serving.model.folders import complete_versions
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.formats import CONVERTERS, Samples
from tests.serving.models import LABELS

pytestmark = pytest.mark.slow  # converting to all formats takes 10 seconds

FOLDERS = {"savedmodel": "1", "onnx": "onnx/1", "litert": "litert/1", "litert_int8": "litert_int8/1"}


def small(seed=0):
    keras.utils.set_random_seed(seed)
    images = keras.Input((8, 8, 3), name="images")
    normal = keras.layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.04, 0.06, 0.09])(images)
    features = keras.layers.Flatten(name="features")(normal)
    return keras.Model(images, keras.layers.Dense(3, name="logits")(features), name="small")


@pytest.fixture
def some():
    """Samples for `small`, with its own predictions as labels."""
    images = np.random.default_rng(0).uniform(size=(40, 8, 8, 3)).astype(np.float32)
    return Samples(images, small().predict(images, verbose=0).argmax(axis=1))


def test_tensorflow_serving_sees_only_the_saved_model(formats):
    assert list(complete_versions(formats)) == [1]
    assert {path.name for path in formats.iterdir()} == {"1", "onnx", "litert", "litert_int8"}
    for name in ("onnx", "litert", "litert_int8"):
        version = formats / FOLDERS[name]
        assert [path.name for path in version.parent.iterdir()] == ["1"]
        assert {path.name for path in version.iterdir()} == {FORMATS[name].file, "labels.txt", "model_card.json"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_card_travels_with_each_artifact(formats, classifier, name):
    version = formats / FOLDERS[name]
    card = json.loads((version / "model_card.json").read_text())
    assert card["format"] == name
    assert (card["labels"], card["image_size"], card["resize_size"]) == (LABELS, 16, 20)
    assert (card["pixel_range"], card["dataset"]) == ([0.0, 1.0], "digits")
    assert card["weights_sha256"] == weights_sha256(classifier)
    content = {path.relative_to(version).as_posix(): path.read_bytes() for path in version.rglob("*") if path.is_file()}
    del content["model_card.json"]
    assert card["files"] == {
        path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in content.items()
    }
    assert set(card["latency_ms_per_image"]) == {"batch_1", "batch_32"}
    assert all(value > 0 for value in card["latency_ms_per_image"].values())
    labels = "assets/labels.txt" if name == "savedmodel" else "labels.txt"
    assert content[labels].decode().split() == LABELS


def test_the_card_says_how_close_the_answers_are(formats):
    def compared(name):
        return json.loads((formats / FOLDERS[name] / "model_card.json").read_text())["comparison"]

    for name in ("savedmodel", "onnx", "litert"):
        assert compared(name)["num_images"] == 5
        assert 0 <= compared(name)["largest_relative_difference"] < 1e-5
    rounded = compared("litert_int8")
    assert rounded["num_images"] == 30
    assert rounded["agreement"] == rounded["accuracy"] >= 0.9  # the labels of these images are the predictions
    assert rounded["classifier_accuracy"] == 1.0


def test_int8_takes_less_than_half_of_the_space(formats):
    size = {name: (formats / FOLDERS[name] / "model.tflite").stat().st_size for name in ("litert", "litert_int8")}
    assert size["litert_int8"] < 0.5 * size["litert"]


def test_the_constants_of_the_normalization_are_inside_the_onnx_file(formats):
    graph = onnx.load(formats / "onnx" / "1" / "model.onnx").graph
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize("broken", ["onnx", "litert", "litert_int8"])
def test_nothing_is_published_if_one_format_answers_otherwise(tmp_path, monkeypatch, some, broken):
    """Here, one format holds another classifier."""
    convert = CONVERTERS[broken]
    monkeypatch.setitem(CONVERTERS, broken, lambda _, path, samples: convert(small(seed=1), path, samples))
    message = "for at least 90% of the images" if broken == "litert_int8" else "a difference of"
    with pytest.raises(UserError, match=f"{message}.*Nothing was published"):
        export_classifier(small(), tmp_path, "m", model_card={}, formats=["savedmodel", broken], samples=some)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_artifact_that_its_runtime_cannot_load_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setitem(CONVERTERS, "onnx", lambda classifier, path, samples: path.write_bytes(b"no model"))
    with pytest.raises(UserError, match="cannot be run. Received: ONNX Runtime cannot load the file"):
        export_classifier(small(), tmp_path, "m", model_card={}, formats=["onnx"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_layer_that_cannot_be_converted_is_explained(tmp_path):
    images = keras.Input((8, 8, 3))
    inverse = keras.layers.Lambda(lambda x: keras.ops.erfinv(0.9 * x))(images)
    model = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(inverse)), name="inverse")
    with pytest.raises(UserError, match="cannot be converted to the format litert. Received: 'inverse'"):
        export_classifier(model, tmp_path, "m", model_card={}, formats=["litert"])
    with pytest.raises(UserError, match="ONNX Runtime cannot load .*Erfinv"):
        export_classifier(model, tmp_path, "m", model_card={}, formats=["onnx"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_fresh_process")
def test_a_number_means_the_same_version_in_all_formats(tmp_path):
    arguments = {"export_dir": tmp_path, "model_name": "m", "model_card": {}}
    export_classifier(small(), **arguments)
    assert export_classifier(small(), **arguments, formats=["litert"]) == tmp_path / "m" / "litert" / "2"
    both = export_classifier(small(), **arguments, formats=["savedmodel", "litert"])
    assert both == tmp_path / "m" / "3"
    assert (tmp_path / "m" / "litert" / "3" / "model.tflite").is_file()
    added = export_classifier(small(), **arguments, formats=["litert"], version=1)
    assert added == tmp_path / "m" / "litert" / "1"
    with pytest.raises(UserError, match="version=2, and .*litert/2 exists"):
        export_classifier(small(), **arguments, formats=["savedmodel", "litert"], version=2)


def test_formats_are_checked_first(tmp_path, monkeypatch):
    flags = ["export", "--classifier=c.keras", f"--export_dir={tmp_path}", "--model_name=m"]
    with pytest.raises(UserError, match="Unknown format. Received: 'onx'. Did you mean 'onnx'"):
        export.main([*flags, "--format=onx"])
    with pytest.raises(UserError, match="Received: onnx,onnx"):
        export.main([*flags, "--format=onnx,onnx"])
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match=r"no tf2onnx. Install them: pip install 'robust_tf\[onnx\]'"):
        export.main([*flags, "--format=onnx"])
    with pytest.raises(UserError, match="samples=None"):
        export_classifier(small(), tmp_path, "m", model_card={}, formats=["litert_int8"])


@pytest.mark.slow
def test_program_publishes_a_packaged_model_in_several_formats(tmp_path, capsys):
    flags = ["--classifier=resnet20_fashion_mnist_l2_eps1", f"--export_dir={tmp_path}", "--model_name=fashion"]
    export.main(["export", *flags, "--format=savedmodel,onnx"])
    out = capsys.readouterr().out.splitlines()
    folders = [tmp_path / "fashion" / name for name in ("1", "onnx/1")]
    assert [line.split()[1] for line in out] == [str(folder) for folder in folders]
    images = np.random.default_rng(0).uniform(size=(3, 28, 28, 3)).astype(np.float32)
    saved_model, file = (open_artifact(str(folder)) for folder in folders)
    assert saved_model.logits(images) == pytest.approx(file.logits(images), abs=1e-4)
    assert saved_model.card["latency_ms_per_image"]["batch_1"] > 0
    assert saved_model.labels == file.labels and file.labels[0] == "T-shirt/top"


@pytest.mark.slow
def test_program_takes_the_samples_from_the_data_set_of_the_flags_or_of_the_job(tmp_path, data_dir, monkeypatch):
    read_samples = export._samples
    images = keras.Input((8, 8, 3), name="images")
    keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(images))).save(tmp_path / "classifier.keras")
    flags = [f"--classifier={tmp_path / 'classifier.keras'}", f"--export_dir={tmp_path / 'E'}", "--model_name=digits"]
    with pytest.raises(UserError, match="The data set of .* is not known"):
        export.main(["export", *flags, "--format=litert_int8"])
    with pytest.raises(UserError, match="logits for 5 classes"):
        five = ["--dataset=digits", "--classes=5,6,7,8,9", f"--data_dir={data_dir}"]
        export.main(["export", *flags, "--format=litert_int8", *five])
    with pytest.raises(UserError, match="--dataset is for --format=litert_int8. Received: --dataset=digits with"):
        export.main(["export", *flags, "--format=litert", "--dataset=digits"])
    samples = []

    def recorded(config):
        samples.append(read_samples(config))
        return samples[-1]

    monkeypatch.setattr(export, "_samples", recorded)
    export.main(["export", *flags, "--format=litert_int8", "--dataset=digits", f"--data_dir={data_dir}"])
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "digits"}))
    export.main(["export", *flags, "--format=litert_int8", f"--data_dir={data_dir}"])
    np.testing.assert_array_equal(samples[0].images, samples[1].images)
    card = json.loads((tmp_path / "E" / "digits" / "litert_int8" / "2" / "model_card.json").read_text())
    assert card["comparison"]["num_images"] >= 50
