"""Tests of `python -m robust_tf.predict` with a classifier or an export in this process, and of its output files."""

import csv
import errno
import json
import pathlib
import shutil

import numpy as np
import pytest

from robust_tf import predict
from robust_tf.errors import UserError
from robust_tf.models.published_results import published_results
from robust_tf.results import JobResults, MeasuredAttack
from robust_tf.serving.client import predictions
from robust_tf.serving.client.base import Guess, Probe
from robust_tf.serving.client.predictions import Format, Prediction, predictions_file
from tests.serving.models import LABELS

IMAGES = pathlib.Path(__file__).parent / "images"
FORM = Format(top=2, min_confidence=0.5, probed=True)
CAT = Prediction("cat.jpg", (Guess("cat", 0.75), Guess("dog", 0.25)), Probe(True, "cat"))
DOG = Prediction('a "dog"\n.jpg', (Guess("dog", 0.4), Guess("cat", 0.3)), Probe(False, "cat"))
BAD = Prediction("bad.jpg", error="the file is empty")


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory) -> pathlib.Path:
    """The classifier of the served model "digits" as a file, with the results of its job."""
    folder = tmp_path_factory.mktemp("job")
    classifier.save(folder / "classifier.keras")
    JobResults(
        class_names=tuple(LABELS),
        image_size=16,
        resize_size=20,
        robust_accuracy_attack=MeasuredAttack(norm="l2", epsilon=0.25),
    ).write(folder / "results.json")
    return folder / "classifier.keras"


def answers(capsys, *arguments: str) -> list[dict]:
    code = predict.main(["predict", "--json", *arguments])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == int(any("error" in line for line in lines))
    return lines


def test_a_classifier_an_export_and_a_server_give_the_same_answers(embedded, exported, saved, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    images = [str(IMAGES), str(tmp_path / "broken.jpg"), "--probe_epsilon=0.5"]
    served = answers(capsys, f"--server={embedded.url}", "--model_name=digits", *images)
    for flags in ([f"--classifier={saved}"], [f"--artifact={exported}"]):
        local = answers(capsys, *flags, *images)
        assert [line["image"] for line in local] == [line["image"] for line in served]
        for ours, theirs in zip(local, served, strict=True):
            assert ("error" in ours) == ("error" in theirs)
            if "error" in ours:
                assert "Unknown image file format" in ours["error"]
                continue
            assert [guess["label"] for guess in ours["predictions"]] == [g["label"] for g in theirs["predictions"]]
            np.testing.assert_allclose(
                [guess["probability"] for guess in ours["predictions"]],
                [guess["probability"] for guess in theirs["predictions"]],
                atol=1e-5,
            )
            assert ours["robust"] == theirs["robust"]
            assert ours["attacked_label"] == theirs["attacked_label"]
            assert ours["robust"] == (ours["attacked_label"] == ours["predictions"][0]["label"])
    assert len(served) == 6


@pytest.mark.slow
def test_a_large_probe_changes_labels_and_a_probe_of_radius_zero_none(saved, capsys):
    flags = [f"--classifier={saved}", str(IMAGES)]
    assert all(line["robust"] for line in answers(capsys, *flags, "--probe_epsilon=0"))
    assert not any(line["robust"] for line in answers(capsys, *flags, "--probe_epsilon=10"))
    # A probe of radius 0.02 is far larger in the linf norm than in the l2 norm of the job.
    l2, linf = (
        [line["robust"] for line in answers(capsys, *flags, "--probe_epsilon=0.02", *norm)]
        for norm in ([], ["--probe_norm=linf"])
    )
    assert sum(l2) > sum(linf)


def test_predictions_below_the_confidence_are_rejected(saved, capsys):
    flags = [f"--classifier={saved}", str(IMAGES)]
    best = [line["predictions"][0]["probability"] for line in answers(capsys, *flags)]
    threshold = float(np.median(best))
    rejected = answers(capsys, *flags, f"--min_confidence={threshold}")
    assert [line["accepted"] for line in rejected] == [value >= threshold for value in best]
    assert predict.main(["predict", *flags, "--min_confidence=1"]) == 0
    assert all(": rejected: " in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_interrupted_run_continues_its_file(suffix, saved, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(IMAGES, photos / "more")
    (photos / "empty.jpg").touch()
    flags = ["predict", f"--classifier={saved}", str(photos), "--probe_epsilon=0.5"]
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    for path in (whole, cut):
        assert predict.main([*flags, f"--output={path}"]) == 1
    printed = capsys.readouterr()
    assert "Wrote 6 predictions" in printed.out
    assert f"{photos}/empty.jpg: the file is empty" in printed.err
    cut.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])  # in the middle of a line
    predict.main([*flags, f"--output={cut}"])
    assert cut.read_bytes() == whole.read_bytes()
    before = cut.stat().st_mtime_ns
    assert predict.main([*flags, f"--output={cut}"]) == 0
    assert cut.stat().st_mtime_ns == before
    assert "already has 6 of 6 images" in capsys.readouterr().out
    shutil.copy(IMAGES / "a.png", photos / "later.png")
    assert predict.main([*flags, f"--output={cut}"]) == 0
    assert "Wrote 1 predictions" in capsys.readouterr().out
    with pytest.raises(UserError, match="top was 3 and is 2"):
        predict.main([*flags, f"--output={cut}", "--top=2"])
    cut.with_name(f"{cut.name}.settings.json").unlink()
    with pytest.raises(UserError, match="without a readable"):
        predict.main([*flags, f"--output={cut}"])


def test_csv_cells_and_json_keys(tmp_path):
    for suffix in (".csv", ".jsonl"):
        with predictions_file(tmp_path / f"p{suffix}", FORM, {}) as file:
            for prediction in (CAT, DOG, BAD):
                file.add(prediction)
        with predictions_file(tmp_path / f"p{suffix}", FORM, {}) as file:
            assert file.done == {"cat.jpg", 'a "dog"\n.jpg', "bad.jpg"}
    with (tmp_path / "p.csv").open(newline="") as content:
        rows = list(csv.DictReader(content))
    assert rows[0] == {
        "image": "cat.jpg",
        "label": "cat",
        "probability": "0.75",
        "label_2": "dog",
        "probability_2": "0.25",
        "accepted": "true",
        "robust": "true",
        "attacked_label": "cat",
        "error": "",
    }
    assert (rows[1]["image"], rows[1]["accepted"], rows[1]["robust"]) == ('a "dog"\n.jpg', "false", "false")
    assert (rows[2]["label"], rows[2]["accepted"], rows[2]["error"]) == ("", "", "the file is empty")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines[0]["predictions"] == [
        {"label": "cat", "probability": 0.75},
        {"label": "dog", "probability": 0.25},
    ]
    assert lines[2] == {"image": "bad.jpg", "error": "the file is empty"}


def test_a_line_that_was_cut_within_a_quoted_line_break_is_written_again(tmp_path):
    path = tmp_path / "p.csv"
    with predictions_file(path, FORM, {}) as file:
        file.add(CAT)
        file.add(DOG)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b'""\n') + 3])  # the line break belongs to the name of the image
    with predictions_file(path, FORM, {}) as file:
        assert file.done == {"cat.jpg"}
        file.add(DOG)
    assert path.read_bytes() == content


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "p.csv"

    def no_space(self, prediction):
        raise OSError(errno.ENOSPC, "No space left on device")

    with predictions_file(path, FORM, {}) as file:
        file.add(CAT)
        monkeypatch.setattr(predictions.PredictionsFile, "_append", no_space)
        with pytest.raises(UserError, match="No space left on device.*the same command continues"):
            file.add(DOG)
    monkeypatch.undo()
    with predictions_file(path, FORM, {}) as file:
        assert file.done == {"cat.jpg"}


def test_two_runs_cannot_write_the_same_file(tmp_path):
    with predictions_file(tmp_path / "p.csv", FORM, {}):
        second = predictions_file(tmp_path / "p.csv", FORM, {})
        with pytest.raises(UserError, match="Another program is writing"), second:
            pass


def test_a_published_model_names_its_classes_and_knows_the_norm_of_its_probe(capsys):
    flags = ["--classifier=resnet20_fashion_mnist_l2_eps0", "--top=5", "--probe_epsilon=1"]
    [line] = answers(capsys, *flags, str(IMAGES / "a.png"))
    names = set(published_results("resnet20_fashion_mnist_l2_eps0").class_names)
    assert len(names) == 10 and {guess["label"] for guess in line["predictions"]} < names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classifier=a.keras", "--server=http://x"], "Choose one of --server, --classifier and --artifact"),
        (["--classifier=a.keras", "--model_name=pets"], "--model_name has no effect with --classifier"),
        (["--labels=names.txt"], "--labels has no effect with --server"),
        (["--classifier=a.keras", "--probe_norm=l2"], "without --probe_epsilon"),
        (["--min_confidence=1.5"], "must be in [0, 1]. Received: 1.5"),
        (["--probe_epsilon=-1"], "--probe_epsilon must be 0 or more. Received: -1"),
        (["--output=p.txt"], "must end in .csv or .jsonl. Received: p.txt"),
        (["--output=p.csv", "--json"], "--json is for printed predictions"),
        (["--classifier=missing.keras"], "missing.keras"),
        (["--classifier=resnet20_fashion_mnist"], "resnet20_fashion_mnist_l2_eps1"),
        (["--artifact=nowhere"], "nowhere"),
        (["--artifact=http://localhost:8501/pets"], "Use --server for a server"),
    ],
)
def test_bad_flags_are_explained(flags, message):
    with pytest.raises(UserError) as raised:
        predict.main(["predict", *flags, str(IMAGES / "a.png")])
    assert message in str(raised.value)


@pytest.mark.slow
def test_a_model_without_the_probe_is_refused(formats, embedded):
    image = str(IMAGES / "a.png")
    for flags in (
        [f"--artifact={formats / '1'}"],
        [f"--artifact={formats / 'onnx'}"],
        [f"--server={embedded.url}", "--model_name=half_plus_two"],
    ):
        with pytest.raises(UserError, match="needs a model with the signature attack_probe"):
            predict.main(["predict", *flags, "--probe_epsilon=0.5", image])


@pytest.mark.slow
def test_files_for_other_runtimes_give_the_answers_of_the_saved_model(formats, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    images = [str(IMAGES), str(tmp_path / "broken.jpg"), "--top=5"]
    expected = answers(capsys, f"--artifact={formats / '1'}", *images)
    for place in ("onnx/1/model.onnx", "litert"):
        found = answers(capsys, f"--artifact={formats / place}", *images)
        assert [line.get("error", "") for line in found] == [line.get("error", "") for line in expected]
        for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
            assert [guess["label"] for guess in ours["predictions"]] == [g["label"] for g in theirs["predictions"]]
            np.testing.assert_allclose(
                [guess["probability"] for guess in ours["predictions"]],
                [guess["probability"] for guess in theirs["predictions"]],
                atol=1e-5,
            )


def test_labels_of_a_classifier_from_a_file(saved, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    flags = [f"--classifier={saved}", str(IMAGES / "a.png"), "--top=5"]
    (line,) = answers(capsys, *flags, f"--labels={tmp_path / 'names.txt'}")
    assert {guess["label"] for guess in line["predictions"]} == set("abcde")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="Each of the 5 classes of .* needs a label. Received: 2 labels"):
        answers(capsys, *flags, f"--labels={tmp_path / 'names.txt'}")
