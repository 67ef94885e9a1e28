"""Tests of `python -m robust_tf.predict`."""

import json
import os
import pathlib
import shutil

import pytest

from robust_tf import predict
from robust_tf.errors import UserError
from robust_tf.serving.client.pictures import find_pictures

IMAGES = pathlib.Path(__file__).parent / "images"


def test_program_prints_the_classes_of_each_image(embedded, tmp_path, capsys):
    shutil.copytree(IMAGES, tmp_path / "photos" / "more")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    flags = ["predict", f"--server={embedded.url}", "--model_name=digits"]
    assert predict.main([*flags, str(tmp_path / "photos"), str(IMAGES / "a.png"), "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"{tmp_path}/photos/more/a.png: ")
    assert lines[0].count("%") == 2

    (tmp_path / "broken.jpg").write_bytes(b"broken")
    assert predict.main([*flags, "--json", str(tmp_path / "broken.jpg"), str(IMAGES / "a.png")]) == 1
    bad, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert "Unknown image file format" in bad["error"]
    assert good["image"] == str(IMAGES / "a.png")
    assert [set(guess) for guess in good["predictions"]] == [{"label", "probability"}] * 3


def test_bad_arguments_are_explained(embedded, tmp_path):
    flags = ["predict", f"--server={embedded.url}"]
    image = str(IMAGES / "a.png")
    for arguments, message in [
        ([*flags], "Received: none"),
        ([*flags, image], "It has: digits, echo, half_plus_two"),
        ([*flags, "--model_name=nobody", image], "Servable not found for request: Latest(nobody)"),
        ([*flags, "--model_name=digits", "nothing.jpg"], "nothing.jpg"),
        ([*flags, "--model_name=digits", str(tmp_path)], str(tmp_path)),
        ([*flags, "--top=0", image], "--top must be at least 1. Received: 0"),
        (["predict", "--ca_file=none.pem", "--server=https://x", "--model_name=m", image], "none.pem"),
    ]:
        with pytest.raises(UserError) as raised:
            predict.main(arguments)
        assert message in str(raised.value)


def test_unreadable_files_do_not_end_the_run(embedded, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(IMAGES / "a.png", folder / "a.png")
    shutil.copy(IMAGES / "d.jpg", folder / "without_suffix")
    shutil.copy(IMAGES / "d.jpg", folder / "d.jfif")
    shutil.copy(IMAGES / "d.jpg", folder / "._d.jpg")
    (folder / "x.jpg").mkdir()
    shutil.copy(IMAGES / "a.png", folder / "x.jpg" / "inside.png")
    (folder / "link.jpg").symlink_to(tmp_path / "nothing.jpg")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("BM is how this text begins")
    os.mkfifo(folder / "pipe.jpg")
    (folder / ".cache").mkdir()
    shutil.copy(IMAGES / "a.png", folder / ".cache" / "thumbnail.png")
    flags = ["predict", f"--server={embedded.url}", "--model_name=digits", "--json"]
    assert predict.main([*flags, "--batch_size=1", str(folder), str(folder / "link.jpg")]) == 1
    output = capsys.readouterr()
    answers = {}
    for line in map(json.loads, output.out.splitlines()):
        answers[line["image"].removeprefix(f"{folder}/")] = line.get("error", "predictions" in line)
    assert answers == {
        "a.png": True,
        "without_suffix": True,
        "d.jfif": True,
        "x.jpg/inside.png": True,
        "link.jpg": "a link to a file that does not exist",
        "text.png": "the file is not a JPEG, PNG, GIF, BMP, WebP or JPEG XL image",
        "empty.jpg": "the file is empty",
        "pipe.jpg": "not a regular file",
    }
    assert output.err == "Not sent: 2 hidden files and 1 other file.\n"
    assert [line["image"] for line in map(json.loads, output.out.splitlines())][:2] == [
        str(folder / "a.png"),
        str(folder / "d.jfif"),
    ]  # in order, even if some files can't be sent


def test_picture_that_vanishes_during_the_run_is_reported(embedded, tmp_path, capsys, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(IMAGES / "a.png", tmp_path / name)
    found = find_pictures([str(tmp_path)])
    (tmp_path / "b.png").unlink()
    monkeypatch.setattr(predict, "find_pictures", lambda names: found)
    assert predict.main(["predict", f"--server={embedded.url}", "--model_name=digits", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    assert lines[1].endswith("refused: can't be read: No such file or directory")


def test_folder_without_pictures_is_an_error_that_counts_the_other_files(tmp_path):
    (tmp_path / "._a.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="There is no picture .*Not sent: 1 hidden file and 1 other file"):
        find_pictures([str(tmp_path)])
