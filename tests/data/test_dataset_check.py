"""`python -m robust_tf.data`: the faults that it finds, and its exit codes."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from robust_tf.data import DATASETS
from robust_tf.data.__main__ import main
from robust_tf.data.dataset_check import check_dataset
from robust_tf.data.datasets import DatasetInfo
from robust_tf.errors import UserError
from tests.data.images import encoded, jpeg, write, write_folder

WHOLE = {"train/cat": 8, "train/dog": 6, "test/cat": 3, "test/dog": 2}


def test_a_prepared_data_set_is_ready(data_dir):
    result = check_dataset("digits", data_dir)
    assert result.state == "ready" and not result.advice
    assert f"in {data_dir / 'digits' / '1.0.0'}, 0." in result.facts[0]
    assert result.facts[1] == "10 classes, 1,000 training and 797 test images"
    assert "license: CC BY 4.0" in result.facts[2]


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_that_is_not_prepared_says_what_to_do(name, tmp_path):
    result = check_dataset(name, tmp_path)
    assert result.state == "not prepared"
    advice = " ".join(result.advice)
    assert f"un python -m robust_tf.data --prepare={name} --data_dir={tmp_path}" in advice
    assert DATASETS[name].download_size in advice
    assert list(tmp_path.iterdir()) == []  # checking writes nothing


def test_a_wrong_number_of_images_is_a_fault(data_dir, monkeypatch):
    row = DatasetInfo(builder="digits:1.0.0", num_classes=10, num_train=1000, num_test=800)
    monkeypatch.setitem(DATASETS, "digits", row)
    result = check_dataset("digits", data_dir)
    assert result.state == "faulty"
    assert result.advice == (
        "There must be 800 test images. Received: 797. Delete the folder and prepare the data set again.",
    )


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_missing_and_damaged_files_are_faults(data_dir, tmp_path, damage):
    copy = tmp_path / "digits" / "1.0.0"
    shutil.copytree(data_dir / "digits" / "1.0.0", copy)
    path = copy / "digits-test.tfrecord-00000-of-00001"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000])
    result = check_dataset("digits", tmp_path)
    assert result.state == "faulty"
    expected = f"Files that are missing (1 of 2): {path}." if damage == "missing" else "The test part cannot be read"
    assert result.advice[0].startswith(expected)


def test_a_folder_without_faults_is_ready(tmp_path):
    result = check_dataset(f"folder:{write_folder(tmp_path, WHOLE)}")
    assert (result.state, result.advice) == ("ready", ())
    assert result.facts[1] == "2 classes, 14 training and 5 test images"


def test_faults_of_a_folder_are_named(tmp_path):
    root = write_folder(tmp_path, WHOLE | {"train/emu": 3})
    write(root / "train/cat/003.jpg", b"no image")
    write(root / "test/dog/copy.jpg", jpeg(0))  # train/cat/000.jpg
    result = check_dataset(f"folder:{root}")
    missing, broken, twice = result.advice
    assert "Convert, repair or remove them, or train with --skip_bad_images." in broken
    assert result.state == "faulty"
    assert "none for emu" in missing
    assert f"Images that cannot be decoded (1): {root}/train/cat/003.jpg." in broken
    assert "Images of the test part that are also in the training part (1): " in twice
    assert f"{root}/test/dog/copy.jpg = {root}/train/cat/000.jpg." in twice
    assert len(check_dataset(f"folder:{root}", thorough=False).advice) == 1


def test_a_name_that_is_not_text_can_be_printed(tmp_path, capsys):
    root = write_folder(tmp_path / os.fsdecode(b"x\xff\n"), {"cat": 1})
    assert main(["data", "--check", f"folder:{root}"]) == 1
    assert capsys.readouterr().out.startswith(f"folder:{tmp_path}/x\\udcff\\n: faulty\n  - A data set needs two")


def test_many_faults_are_counted(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    for index in range(5):
        write(root / f"train/cat/{index:03d}.jpg", b"no image")
    assert "and 2 more" in check_dataset(f"folder:{root}").advice[0]


def test_one_image_per_class_is_a_fault(tmp_path):
    result = check_dataset(f"folder:{write_folder(tmp_path, {'a': 1, 'b': 1})}")
    assert result.state == "faulty"
    (advice,) = result.advice
    assert "training part" in advice and advice.endswith("Received: none for a, b. Add some images.")


def test_all_files_that_are_left_out_are_named(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    write(root / "train/cat/.DS_Store", "x")
    write(root / "train/cat/drawing.svg", "<svg/>")
    write(root / "train/dog/photo.heic", "x")
    result = check_dataset(f"folder:{root}")
    assert f"Left out: hidden and system files (1): {root}/train/cat/.DS_Store." in result.facts
    assert result.advice == (
        f"Images that cannot be read (2): {root}/train/cat/drawing.svg (unsupported image format), "
        f"{root}/train/dog/photo.heic (unsupported image format). "
        "Convert, repair or remove them, or train with --skip_bad_images.",
    )


def test_rotated_and_transparent_images_are_counted(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGBA", (9, 9), (9, 9, 9, 128))
    write(root / "train/cat/rotated", encoded(picture.convert("RGB"), "JPEG", exif=exif))
    write(root / "train/cat/clear.png", encoded(picture, "PNG"))
    write(root / "test/dog/clear.gif", encoded(picture.convert("RGB").quantize(2), "GIF", transparency=0))
    write(root / "test/dog/opaque.png", encoded(picture.convert("L"), "PNG"))
    write(root / "train/dog/001.png", encoded(picture.convert("RGB"), "PNG"))
    result = check_dataset(f"folder:{root}")
    assert result.state == "ready"
    rotated, transparent, namesakes = result.facts[2:]
    assert (
        rotated.startswith("Images that are rotated or mirrored (EXIF), and are used as they are stored (1)")
        and "train/cat/rotated. --exif=apply" in rotated
    )
    assert (
        transparent.startswith("Images with transparent pixels, ")
        and "(2): " in transparent
        and "--alpha_background" in transparent
    )
    assert f"{root}/train/dog/001.jpg = {root}/train/dog/001.png" in namesakes or "001.png = " in namesakes


def test_damaged_files_of_any_kind_raise_no_error(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (30, 40, 4)).astype(np.uint8))
    whole = {
        "one.png": encoded(Image.new("L", (1, 1)), "PNG"),
        "cmyk.jpg": encoded(rgba.convert("CMYK"), "JPEG"),
        "16.png": encoded(Image.fromarray(rng.integers(0, 65536, (9, 9)).astype(np.uint16)), "PNG"),
        "moving.gif": encoded(rgba.convert("P"), "GIF", save_all=True, append_images=[rgba.convert("P").rotate(180)]),
        "la.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(rgba.convert("RGB").quantize(8), "PNG", transparency=2),
        "bits.bmp": encoded(rgba.convert("1"), "BMP"),
        "palette.bmp": encoded(rgba.convert("RGB").quantize(8), "BMP"),
        "clear.webp": encoded(rgba, "WEBP"),
    }
    for name, data in whole.items():
        write(root / "train/cat" / name, data)
        for length in (1, 2, 5, 13, 30, 60, len(data) // 2, len(data) - 3):
            write(root / "train/dog" / f"{length} bytes of {name}", data[:length])
    write(root / "test/dog/text.jpg", "no image")
    write(root / "test/dog/riff.webp", b"RIFF\xca")
    write(root / "test/dog/random.png", rng.bytes(500))
    result = check_dataset(f"folder:{root}")
    assert "that cannot be decoded" in result.advice[0]
    assert check_dataset(f"folder:{root}/train/cat/one.png").state == check_dataset("folder:/nowhere").state == "faulty"


def test_the_program_prints_and_exits_as_documented(data_dir, tmp_path, capsys):
    folder = f"folder:{write_folder(tmp_path / 'photos', WHOLE)}"
    assert main(["data", "--check", "digits", folder, f"--data_dir={data_dir}"]) == 0
    assert capsys.readouterr().out.startswith("digits: ready\n    in ")
    assert main(["data", "--check", "digits", "pets", f"--data_dir={data_dir}"]) == 1
    assert "pets: not prepared" in capsys.readouterr().out
    assert main(["data", "--check", f"--data_dir={data_dir}"]) == 0
    out = capsys.readouterr().out
    header, *rows = out.partition("\n\n")[0].splitlines()
    assert header.split() == ["name", "state", "size"]
    table = {row.split()[0]: " ".join(row.split()[1:]) for row in rows}
    assert list(table) == list(DATASETS)
    assert table["digits"].startswith("ready 0.") and table["digits"].endswith(" MiB")
    assert table["pets"] == "not prepared download: 774 MiB"
    assert "--check NAME" in out
    assert main(["data", "--prepare=digits", f"--data_dir={tmp_path / 'new'}"]) == 0
    assert (tmp_path / "new" / "digits" / "1.0.0").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Either --check or --prepare"),
        (["--check", "--prepare=digits"], "Either --check or --prepare"),
        (["--check", "digit"], "Received: 'digit'. Did you mean 'digits'"),
        (["--prepare=digits", "pets"], "Received: digits pets"),
        (["--chek"], "chek"),
        (["--check", "folder:"], "Received: 'folder:'"),
    ],
)
def test_wrong_command_lines_are_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["data", *arguments, f"--data_dir={tmp_path}"])
