"""Tests of robust_tf.predict with detectors and segmenters: in this process, as an export, and behind a server."""

import base64
import io
import json
import re

import keras
import numpy as np
import pytest
from PIL import Image

from robust_tf import predict
from robust_tf.config.run import RunConfig
from robust_tf.errors import UserError
from robust_tf.models import save_classifier
from robust_tf.reporting.next_commands import next_commands
from robust_tf.serving.client import connect
from robust_tf.serving.client.dense import Box, DensePrediction, dense_task
from robust_tf.serving.client.dense_predictions import DenseFormat, PictureFolder, drawn
from robust_tf.tasks.table import task_type_of
from tests.serving.conftest import running_server
from tests.serving.dense_models import BOX_LABELS, MASK_LABELS, SIZE
from tests.serving.models import write_config

# Every test needs an export, which takes seconds.
pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures of the same name and a broken one."""
    rng = np.random.default_rng(3)
    for name, shape in (("a/x.png", (40, 60, 3)), ("b/x.png", (64, 33, 3))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return tmp_path / "photos"


@pytest.fixture
def dense_files(tmp_path, detector, segmenter):
    for name, network, labels in (("d", detector, BOX_LABELS), ("s", segmenter, MASK_LABELS)):
        save_classifier(network, tmp_path / f"{name}.keras")
        (tmp_path / f"{name}.txt").write_text("\n".join(labels))
    return tmp_path


def run(*arguments):
    return predict.main(["predict", *map(str, arguments)])


def picture_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_boxes_are_listed_and_drawn(exported_detector, photos, tmp_path, capsys):
    output, drawings = tmp_path / "out.jsonl", tmp_path / "drawn"
    flags = [f"--artifact={exported_detector}", f"--output={output}", f"--draw={drawings}", "--min_confidence=0.5"]
    assert run(*flags, photos) == 1
    first, second, broken = lines(output)
    assert (first["image"], first["size"]) == (str(photos / "a" / "x.png"), [40, 60])
    assert (second["image"], second["size"]) == (str(photos / "b" / "x.png"), [64, 33])
    assert "Invalid PNG" in broken["error"]
    for picture in (first, second):
        assert len(picture["detections"]) > 5
        for found in picture["detections"]:
            top, left, bottom, right = found["box"]
            assert 0 <= top < bottom <= picture["size"][0]
            assert 0 <= left < right <= picture["size"][1]
            assert found["label"] == BOX_LABELS[found["class"]]
            assert found["score"] >= 0.5
    assert len(list(drawings.iterdir())) == 2
    # The pictures are enlarged by whole numbers.
    assert {picture_of(path).shape[:2] for path in drawings.iterdir()} == {(7 * 40, 7 * 60), (6 * 64, 6 * 33)}
    assert "1 images were refused" in capsys.readouterr().err


def test_masks_are_written_and_drawn(exported_segmenter, photos, tmp_path):
    output, drawings = tmp_path / "out.jsonl", tmp_path / "drawn"
    assert run(f"--artifact={exported_segmenter}", f"--output={output}", f"--draw={drawings}", photos) == 1
    for picture in lines(output)[:2]:
        mask = picture_of(picture["mask"])
        assert list(mask.shape) == picture["size"]
        shares = {MASK_LABELS[number]: (mask == number).mean() for number in np.unique(mask)}
        assert picture["share"] == pytest.approx(shares, abs=1e-5)
    assert len(list((tmp_path / "out_masks").iterdir())) == len(list(drawings.iterdir())) == 2


def test_stopped_run_is_continued_and_pictures_of_others_are_kept(exported_segmenter, photos, tmp_path, capsys):
    output, drawings = tmp_path / "out.jsonl", tmp_path / "drawn"
    flags = [f"--artifact={exported_segmenter}", f"--output={output}", f"--draw={drawings}"]
    run(*flags, photos)
    whole = output.read_text()
    output.write_text(whole[: whole.index("\n") + 20])  # as if the program was killed in the middle of a line
    run(*flags, photos)
    assert output.read_text() == whole
    assert "already has 1 of 3 images" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in drawings.iterdir()}
    for more in ([], [f"--output={tmp_path / 'other.jsonl'}"]):
        with pytest.raises(UserError, match=r"not overwritten. Received: --draw=.* and 1 others exist"):
            run(flags[0], flags[2], *more, photos)
    assert {path: path.read_bytes() for path in drawings.iterdir()} == before
    with pytest.raises(UserError, match="other settings"):
        run(*flags[:2], f"--draw={tmp_path / 'elsewhere'}", photos)


@pytest.mark.parametrize("name", ["d", "s"])
def test_file_answers_like_its_export(
    name, dense_files, exported_detector, exported_segmenter, photos, tmp_path, capsys
):
    artifact = exported_detector if name == "d" else exported_segmenter
    run(f"--artifact={artifact}", "--json", "--top=100", photos / "a" / "x.png")
    run(f"--classifier={tmp_path / name}.keras", f"--labels={tmp_path / name}.txt", "--json", photos / "a" / "x.png")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["size"] == second["size"]
    if name == "s":
        assert first["share"] == pytest.approx(second["share"], abs=2e-3)
        assert "mask" not in first  # without an output, no files are written
        return
    assert len(first["detections"]) == len(second["detections"])
    for one, other in zip(first["detections"], second["detections"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_flags_that_do_not_fit_are_refused(
    exported_detector, exported_segmenter, exported, dense_files, photos, tmp_path
):
    detector, segmenter = f"--artifact={exported_detector}", f"--artifact={exported_segmenter}"
    for flags, message in (
        (
            [detector, f"--output={tmp_path / 'x.csv'}"],
            r"CSV file. Received: .*x\.csv. Use a name that ends in \.jsonl",
        ),
        ([detector, "--probe_epsilon=0.1"], "probe_epsilon attacks classifiers. Received: .*a network for detection"),
        ([segmenter, "--min_confidence=0.1"], "Received: 0.1 for .*a network for segmentation"),
        ([f"--artifact={exported}", f"--draw={tmp_path / 'd'}"], "--draw is for detectors and segmenters"),
        ([f"--classifier={tmp_path / 'd.keras'}", "--probe_epsilon=0.1"], "for classifiers. Received: .*detection"),
        ([f"--classifier={tmp_path / 'd.keras'}", f"--labels={tmp_path / 's.txt'}"], "Received: 4 labels"),
    ):
        with pytest.raises(UserError, match=message):
            run(*flags, photos)
    assert not list(tmp_path.glob("x.csv*"))  # nothing is left of a run that was refused


def test_tables_for_people():
    boxes = (
        Box((1.2, 2.0, 3.0, 4.0), "cat", 0, 0.9),
        Box((0.0, 0.0, 9.0, 9.0), "ox", 1, 0.4),
        Box((0, 0, 1, 1), "ox", 1, 0.1),
    )
    prediction = DensePrediction("x.png", (10, 20), boxes)
    assert DenseFormat(1, 0.2).text(prediction).splitlines() == [
        "x.png: 20x10 pixels, 2 objects",
        "  cat  0.90  top 1, left 2, bottom 3, right 4",
        "  and 1 more",
    ]
    masked = DensePrediction("x.png", (2, 2), labels={0: "sky", 1: "road"}, shares={0: 0.25, 1: 0.75})
    assert DenseFormat(5, 0.0).text(masked).splitlines() == [
        "x.png: 2x2 pixels, 2 classes",
        "  road  75.0% of the pixels",
        "  sky   25.0% of the pixels",
    ]
    assert DenseFormat(5, 0.0).text(DensePrediction("x.png", error="bad")) == "x.png: refused: bad"


def test_drawing_shows_boxes_from_the_lowest_score_on():
    content = io.BytesIO()
    Image.fromarray(np.full((100, 200, 3), 128, np.uint8)).save(content, "PNG")
    boxes = (Box((20, 40, 180, 360), "cat", 0, 0.9),)  # of an image that is twice as large as its preview
    prediction = DensePrediction("x.png", (200, 400), boxes, labels={0: "cat"}, preview=content.getvalue())

    def picture(min_score):
        return np.asarray(Image.open(io.BytesIO(drawn(prediction, min_score=min_score))))

    assert (picture(0.95) == 128).all()
    found = (picture(0.5) != 128).any(axis=-1)
    factor = len(found) / 100
    rows, columns = np.flatnonzero(found[:, int(100 * factor)]), np.flatnonzero(found[int(50 * factor)])
    assert abs(rows[-1] / factor - 90) < 2
    assert abs(columns[0] / factor - 20) < 2
    assert abs(columns[-1] / factor - 180) < 2


def test_names_of_pictures_differ_and_stay_the_same(tmp_path):
    folder = PictureFolder(tmp_path, "--draw")
    names = [folder.path(image).name for image in ("a/x.png", "b/x.png", "a/x.jpg", "a/ü ?/..")]
    assert len(set(names)) == 4
    assert names == [folder.path(image).name for image in ("a/x.png", "b/x.png", "a/x.jpg", "a/ü ?/..")]
    assert all(name.endswith(".png") and "/" not in name for name in names)


@pytest.fixture(scope="module")
def dense_server(exported_detector, exported_segmenter, tmp_path_factory):
    bases = {"toys": exported_detector.parent, "scenes": exported_segmenter.parent}
    with running_server(**write_config(tmp_path_factory.mktemp("config"), bases)) as running:
        yield running


def test_server_answers_over_rest_and_grpc(dense_server, photos, capsys):
    answers = {}
    for scheme, address in (("http", dense_server.url), ("grpc", f"grpc://{dense_server.target}")):
        for name in ("toys", "scenes"):
            run(f"--server={address}", f"--model_name={name}", "--json", photos / "a" / "x.png")
            answers[scheme, name] = json.loads(capsys.readouterr().out)
    assert answers["http", "scenes"]["share"] == answers["grpc", "scenes"]["share"]
    rest, grpc = (answers[scheme, "toys"]["detections"] for scheme in ("http", "grpc"))
    assert [each["label"] for each in rest] == [each["label"] for each in grpc]
    np.testing.assert_allclose([each["box"] for each in rest], [each["box"] for each in grpc], atol=0.01)


def test_server_answers_by_row(dense_server, photos):
    content = {"b64": base64.b64encode((photos / "a" / "x.png").read_bytes()).decode()}
    body = {"signature_name": "image_bytes", "instances": [content, content]}
    for name, outputs in (("toys", {"boxes", "count"}), ("scenes", {"mask_png_bytes", "labels"})):
        reply = dense_server.rest.post(f"/v1/models/{name}:predict", json=body).json()
        assert len(reply["predictions"]) == 2
        assert outputs | {"image_sizes"} <= set(reply["predictions"][0])
    mask = Image.open(io.BytesIO(base64.b64decode(reply["predictions"][1]["mask_png_bytes"]["b64"])))
    assert mask.size == (60, 40)
    pixels = np.full((1, SIZE, SIZE, 3), 0.5).tolist()
    reply = dense_server.rest.post("/v1/models/scenes:predict", json={"inputs": pixels}).json()
    assert np.array(reply["outputs"]["mask"]).shape == (1, SIZE, SIZE)


def test_task_is_read_from_the_signatures(dense_server, embedded):
    for server, name, task in (
        (dense_server, "toys", "detection"),
        (dense_server, "scenes", "segmentation"),
        (embedded, "digits", ""),
        (embedded, "echo", ""),
    ):
        with connect(server.url, model_name=name) as client:
            assert dense_task(client) == task


def test_next_commands_of_a_job_name_the_signature():
    run_config = RunConfig(workdir="runs/toys", export_dir="exports")
    request = re.search(r"curl -d '(.*)' http", next_commands(run_config, b"picture", signature_name="image_bytes")[-1])
    assert json.loads(request[1]) == {"signature_name": "image_bytes", "instances": [{"b64": "cGljdHVyZQ=="}]}


def test_models_without_a_graph_are_no_detectors():
    sequential = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert task_type_of(keras.models.clone_model(sequential)) == "classification"

    class Subclassed(keras.Model):
        """A model that knows its outputs only when it is called."""

    assert task_type_of(Subclassed()) == "classification"


def test_page_draws_boxes_and_masks(dense_server, browser, photos):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def text(name):
        return browser.find_element(By.ID, name).text

    def colors():
        return browser.execute_script(
            "const canvas = document.getElementById('drawing');"
            "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
            "return [canvas.width, canvas.height, Array.from(data)];"
        )

    wait = WebDriverWait(browser, 60)
    browser.get(dense_server.url + "/")
    wait.until(lambda _: "scenes" in text("models") and "toys" in text("models"))
    Select(browser.find_element(By.ID, "model")).select_by_visible_text("toys")
    browser.find_element(By.ID, "file").send_keys(str(photos / "a" / "x.png"))
    wait.until(lambda _: "detections have this score" in text("found"))
    move = "const s = document.getElementById('score'); s.value = 95; s.dispatchEvent(new Event('input'));"
    many = int(text("found").split()[0])
    browser.execute_script(move)
    assert 0 < int(text("found").split()[0]) < many
    assert text("score-value") == "0.95"
    width, height, _ = colors()
    assert (width, height) == (660, 440)  # 60x40, enlarged by a whole number
    Select(browser.find_element(By.ID, "model")).select_by_visible_text("scenes")
    wait.until(lambda _: text("dense-title") == "Segmentation")
    wait.until(lambda _: "%" in text("legend"))
    assert not browser.find_element(By.ID, "score-line").is_displayed()
    shares = [float(line.split(": ")[1].removesuffix(" %")) for line in text("legend").splitlines()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert text("error") == ""
