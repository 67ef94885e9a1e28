"""Tests of published detectors and segmenters: their answers, their files, and that no wrong version is published."""

import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from robust_tf import export
from robust_tf.data.boxes import BoxPreprocessing
from robust_tf.data.masks import MaskPreprocessing
from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError
from robust_tf.models import save_classifier
from robust_tf.results import JobResults, Measures
from robust_tf.serving.artifacts import open_artifact
from robust_tf.serving.model import warmup
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.publish import dense_signatures, export_dense
from robust_tf.serving.publish.model_card import card_from_results
from robust_tf.tasks.detection import anchors_for, decode_detections
from tests.serving.dense_models import BOX_LABELS, MASK_LABELS, SIZE


def png(image):
    return tf.io.encode_png(image).numpy()


def pictures(*shapes):
    rng = np.random.default_rng(5)
    return np.array([png(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes], object)


# Every test needs an export, which takes seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def boxes(exported_detector):
    model = LoadedModel(exported_detector)
    yield model
    model.close()


@pytest.fixture(scope="module")
def masks(exported_segmenter):
    model = LoadedModel(exported_segmenter)
    yield model
    model.close()


def described(model):
    return {
        name: tuple(
            {key: (tf.as_dtype(info.dtype).name, *(dim.size for dim in info.tensor_shape.dim)) for key, info in part}
            for part in (definition.inputs.items(), definition.outputs.items())
        )
        for name, definition in model.signatures.items()
        if not name.startswith("__")
    }


def test_signatures_of_a_detector(boxes, detector):
    found = {
        "boxes": ("float32", -1, 100, 4),
        "scores": ("float32", -1, 100),
        "classes": ("int64", -1, 100),
        "labels": ("string", -1, 100),
        "count": ("int64", -1),
    }
    pixels, encoded = {"images": ("float32", -1, SIZE, SIZE, 3)}, {"image_bytes": ("string", -1)}
    count = detector.output["classes"].shape[1]
    signatures = described(boxes)
    assert signatures["image_bytes"][1].pop("image_sizes") == ("int64", -1, 2)
    assert signatures == {
        "serving_default": (pixels, found),
        "image_bytes": (encoded, found),
        "raw_outputs": (pixels, {"boxes": ("float32", -1, count, 4), "classes": ("float32", -1, count, 3)}),
        "preview": (encoded, {"preview_image_bytes": ("string", -1)}),
    }


def test_signatures_of_a_segmenter(masks):
    pixels, encoded = {"images": ("float32", -1, SIZE, SIZE, 3)}, {"image_bytes": ("string", -1)}
    square = (-1, SIZE, SIZE)
    assert described(masks) == {
        "serving_default": (pixels, {"mask": ("uint8", *square), "probabilities": ("float32", *square)}),
        "image_bytes": (
            encoded,
            {"mask_png_bytes": ("string", -1), "labels": ("string", -1, 4), "image_sizes": ("int64", -1, 2)},
        ),
        "raw_outputs": (pixels, {"logits": ("float32", *square, 4)}),
        "preview": (encoded, {"preview_image_bytes": ("string", -1)}),
    }


def test_boxes_equal_those_of_the_network(boxes, detector):
    images = np.random.default_rng(1).uniform(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    expected = decode_detections(detector(images, training=False), anchors_for(detector), image_size=SIZE)
    answer = boxes.run("serving_default", {"images": images})
    np.testing.assert_array_equal(answer["count"], expected["count"])
    assert answer["count"].min() > 10
    np.testing.assert_allclose(answer["scores"], expected["scores"], atol=1e-5)
    np.testing.assert_allclose(
        np.sort(answer["boxes"].sum(-1)), np.sort(tf.reduce_sum(expected["boxes"], -1)), atol=1e-2
    )
    for labels, classes, count in zip(answer["labels"], answer["classes"], answer["count"], strict=True):
        assert [label.decode() for label in labels[:count]] == [BOX_LABELS[number] for number in classes[:count]]
        assert set(labels[count:]) <= {b""}
        assert set(classes[count:]) <= {-1}


@pytest.mark.parametrize("shape", [(48, 64), (90, 40), (20, 20)])
def test_boxes_are_in_pixels_of_the_encoded_image(boxes, detector, shape):
    (encoded,) = pictures(shape)
    image, truth = BoxPreprocessing(image_size=SIZE).measured_example(tf.constant(encoded), tf.constant(b""))
    expected = decode_detections(detector(image[None], training=False), anchors_for(detector), image_size=SIZE)
    answer = boxes.run("image_bytes", {"image_bytes": np.array([encoded, encoded], object)})
    assert answer["image_sizes"].tolist() == [list(shape)] * 2
    edges = np.minimum(expected["boxes"][0].numpy() / truth["scale"].numpy(), [*shape, *shape])
    inside = (edges[:, 0] < edges[:, 2]) & (edges[:, 1] < edges[:, 3]) & (expected["classes"][0].numpy() >= 0)
    assert answer["count"].tolist() == [inside.sum()] * 2
    count = int(inside.sum())
    np.testing.assert_allclose(answer["scores"][1][:count], expected["scores"][0].numpy()[inside], atol=1e-5)
    # A box of nearly the same score may come first, so the areas are compared in order of their size.
    served, own = (
        np.sort((each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]))
        for each in (answer["boxes"][0][:count], edges[inside])
    )
    np.testing.assert_allclose(served, own, rtol=1e-3, atol=0.5)


def test_mask_equals_that_of_the_network(masks, segmenter):
    images = np.random.default_rng(1).uniform(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    probabilities = tf.nn.softmax(segmenter(images, training=False)).numpy()
    answer = masks.run("serving_default", {"images": images})
    assert (answer["mask"] == probabilities.argmax(-1)).mean() > 0.999
    assert len(np.unique(answer["mask"])) > 2
    np.testing.assert_allclose(answer["probabilities"], probabilities.max(-1), atol=1e-5)


def test_mask_has_the_size_of_the_encoded_image(masks):
    squares = np.random.default_rng(2).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    enlarged = squares[0].repeat(3, axis=0).repeat(2, axis=1)
    answer = masks.run("image_bytes", {"image_bytes": np.array([png(squares[0]), png(enlarged)], object)})
    small, large = (np.asarray(Image.open(io.BytesIO(each))) for each in answer["mask_png_bytes"])
    assert answer["image_sizes"].tolist() == [[SIZE, SIZE], [3 * SIZE, 2 * SIZE]]
    assert (small.shape, large.shape) == ((SIZE, SIZE), (3 * SIZE, 2 * SIZE))
    expected = masks.run("serving_default", {"images": squares / np.float32(255)})["mask"][0]
    assert (small == expected).mean() > 0.999
    assert (large[1::3, ::2] == large[::3, 1::2]).all()  # each pixel of the square became 3x2 pixels
    assert [label.decode() for label in answer["labels"][0]] == MASK_LABELS


@pytest.mark.parametrize("shape", [(SIZE // 2, 2 * SIZE + 1), (45, 40)])
def test_pixel_of_the_mask_has_the_class_at_its_center(masks, shape):
    (encoded,) = pictures(shape)
    prepare = tf.function(MaskPreprocessing(image_size=SIZE).evaluation_example)
    square, _ = prepare(tf.constant(encoded), tf.constant(png(np.zeros((*shape, 1), np.uint8))))
    mask = masks.run("serving_default", {"images": square.numpy()[None]})["mask"][0]
    answer = masks.run("image_bytes", {"image_bytes": np.array([encoded], object)})
    rows, columns = (np.floor((np.arange(length) + 0.5) * SIZE / length).astype(int) for length in shape)
    found = np.asarray(Image.open(io.BytesIO(answer["mask_png_bytes"][0])))
    assert (found == mask[rows][:, columns]).mean() > 0.995


@pytest.mark.parametrize("name", ["boxes", "masks"])
def test_pixels_outside_0_to_1_and_bad_images_are_refused(name, request):
    model = request.getfixturevalue(name)
    for images in (np.full((1, SIZE, SIZE, 3), 200, np.float32), np.full((1, SIZE, SIZE, 3), np.nan, np.float32)):
        with pytest.raises(ServingError, match=r"Pixels must be in \[0, 1\]"):
            model.run("serving_default", {"images": images})
    for content, message in ((b"no image", "Unknown image file format"), (pictures((1, 21))[0], "20 times as long")):
        with pytest.raises(ServingError, match=message):
            model.run("image_bytes", {"image_bytes": np.array([content], object)})


@pytest.mark.parametrize(("name", "count"), [("boxes", 4), ("masks", 4)])
def test_warmup_has_a_request_for_each_signature(name, count, request):
    assert warmup.replay_warmup(request.getfixturevalue(name)) == count


def test_preview_is_the_decoded_image_of_limited_size(boxes, monkeypatch):
    encoded = pictures((20, 30), (300, 2000))
    small, large = (
        Image.open(io.BytesIO(each)) for each in boxes.run("preview", {"image_bytes": encoded})["preview_image_bytes"]
    )
    np.testing.assert_array_equal(np.asarray(small), np.asarray(Image.open(io.BytesIO(encoded[0]))))
    assert large.size == (1024, 154)


def test_files_and_card(exported_detector, exported_segmenter):
    for version, labels in ((exported_detector, BOX_LABELS), (exported_segmenter, MASK_LABELS)):
        assert (version / "assets" / "labels.txt").read_text().splitlines() == labels
        with open_artifact(str(version)) as artifact:  # which compares the files with the card
            assert artifact.labels == tuple(labels)
    card = json.loads((exported_detector / "model_card.json").read_text())
    facts = ("task_type", "score_threshold", "iou_threshold", "most_detections", "image_size", "classes", "dataset")
    assert [card[name] for name in facts] == ["detection", 0.05, 0.5, 100, SIZE, 3, "toys"]
    assert card["anchors"]["strides"] == [4, 8, 16, 32]
    assert json.loads((exported_segmenter / "model_card.json").read_text())["task_type"] == "segmentation"


def test_card_has_the_figures_of_the_job():
    results = JobResults(
        task_type="segmentation", metric="mean_iou", clean=Measures(value=0.5), robust=Measures(value=0.25)
    )
    card = card_from_results(results, task_type="segmentation")
    assert (card["metric"], card["clean"]["value"], card["robust"]["value"]) == ("mean_iou", 0.5, 0.25)
    assert "clean_accuracy" not in card
    assert "clean_accuracy" in card_from_results(JobResults(clean_accuracy=0.5))


def test_detector_has_no_logits(exported_detector):
    with open_artifact(str(exported_detector)) as artifact, pytest.raises(UserError, match="a network for detection"):
        artifact.logits(np.zeros((1, SIZE, SIZE, 3), np.float32))


@pytest.mark.parametrize("name", ["detector", "segmenter"])
def test_wrong_answers_are_not_published(name, request, tmp_path, monkeypatch):
    network = request.getfixturevalue(name)
    other = keras.models.clone_model(network)  # other weights, so other answers
    monkeypatch.setattr(export_dense, "fold_batch_norm", lambda _: other)
    with pytest.raises(UserError, match="must give the same numbers for raw_outputs"):
        export_dense.export_dense(network, tmp_path, "net", model_card={})
    assert not list((tmp_path / "net").iterdir())


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("detector", "_on_original", "must find the same boxes in image_bytes"),
        ("segmenter", "_as_png", "same mask in image_bytes"),
    ],
)
def test_wrong_boxes_and_masks_are_not_published(name, function, message, request, tmp_path, monkeypatch):
    right = getattr(dense_signatures, function)
    if name == "detector":

        def wrong(found, sizes, image_size):
            return right(found, sizes[:, ::-1] + [[3, 0]], image_size)

    else:

        def wrong(labels):
            finish = right(labels)
            return lambda found, sizes, size: finish({"mask": found["mask"][:, ::-1]}, sizes, size)

    monkeypatch.setattr(dense_signatures, function, wrong)
    with pytest.raises(UserError, match=message):
        export_dense.export_dense(request.getfixturevalue(name), tmp_path, "net", model_card={})
    assert not list((tmp_path / "net").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["one"]}, "Received: 1 labels"),
        ({"labels": ["a", "a", "b"]}, "more than once: a"),
        ({"version": 0}, "version=0"),
    ],
)
def test_wrong_arguments_are_refused(detector, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export_dense.export_dense(detector, tmp_path, "net", model_card={}, **arguments)


def test_classifier_is_refused(classifier, tmp_path):
    with pytest.raises(UserError, match="Publish a classifier with export_classifier"):
        export_dense.export_dense(classifier, tmp_path, "net", model_card={})


@pytest.mark.parametrize("flag", ["--attack_probe", "--resize_size=40", "--norm=l2", "--format=savedmodel,litert"])
def test_flags_for_classifiers_are_refused(segmenter, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(export, "check_formats", lambda _: None)  # the packages of the formats may be missing
    save_classifier(segmenter, tmp_path / "s.keras")
    flags = [f"--classifier={tmp_path / 's.keras'}", f"--export_dir={tmp_path / 'e'}", "--model_name=net", flag]
    with pytest.raises(UserError, match=r"Received: .*s\.keras, a network for segmentation"):
        export.main(["export", *flags])
    assert not (tmp_path / "e").exists()


def test_program_publishes_a_detector_with_the_facts_of_its_job(detector, tmp_path, capsys, monkeypatch):
    save_classifier(detector, tmp_path / "d.keras")
    JobResults(
        task_type="detection",
        dataset="folder:/toys",
        class_names=tuple(BOX_LABELS),
        metric="average_precision",
        clean=Measures(value=0.4),
        exif="apply",
    ).write(tmp_path / "results.json")
    flags = [f"--classifier={tmp_path / 'd.keras'}", f"--export_dir={tmp_path / 'e'}", "--model_name=net"]
    export.main(["export", *flags, "--license=MIT"])
    version = tmp_path / "e" / "net" / "1"
    assert f"Published {version}" in capsys.readouterr().out
    card = json.loads((version / "model_card.json").read_text())
    assert (card["labels"], card["clean"]["value"], card["license"]) == (BOX_LABELS, 0.4, "MIT")
    assert card["exif"] == "apply"
    assert card["latency_ms_per_image"]["batch_1"] > 0
    # The network gets a picture as its EXIF orientation says, and so are the boxes and the preview.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(turned, "JPEG", exif=exif)
    model = LoadedModel(version)
    request = {"image_bytes": np.array([turned.getvalue()], object)}
    assert model.run("image_bytes", request)["image_sizes"].tolist() == [[30, 20]]
    assert Image.open(io.BytesIO(model.run("preview", request)["preview_image_bytes"][0])).size == (20, 30)
    model.close()
    assert Decoding(exif=card["exif"], alpha_background=card["alpha_background"]) == Decoding(exif="apply")
