"""The builders of this package, on small archives with the layout of the real ones."""

import hashlib
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.checksums import compute_url_info

from robust_tf.data.builders import OWN_BUILDERS
from robust_tf.data.open_dataset import open_dataset
from robust_tf.data.tfds_preparation import no_folders_left_behind
from robust_tf.errors import UserError
from tests.data.images import jpeg, write


@pytest.fixture
def manual(tmp_path):
    """TFDS's folder for files that users fetch by hand."""
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    return folder


def packed(folder: pathlib.Path, archive: pathlib.Path, kind: str) -> pathlib.Path:
    """Packs a folder into an archive that has the folder at the top."""
    return pathlib.Path(shutil.make_archive(str(archive), kind, folder.parent, folder.name))


def md5(path: pathlib.Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def contents(part) -> dict[str, tuple[bytes, int]]:
    """The encoded image and the label of each file name."""
    names = part.builder.as_dataset(split=part.split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = list(names.as_numpy_iterator())
    assert part.name(len(examples) - 1).startswith(examples[-1]["file_name"].decode() + " ")
    records = list(part.records().as_numpy_iterator())
    assert [(encoded, label) for _, encoded, label in records] == [(e["image"], e["label"]) for e in examples]
    return {example["file_name"].decode(): (example["image"], int(example["label"])) for example in examples}


AIRCRAFT = {
    "train": ["0000001 DC-3", "0000002 707-320"],
    "val": ["0000003 A340-200"],
    "test": ["0000004 707-320"],
}


@pytest.fixture
def aircraft(manual, tmp_path, monkeypatch):
    """Makes the archive from the lines of its lists and the numbers of its images."""

    def make(lists=AIRCRAFT, numbers=range(1, 5), end="\n"):
        data = tmp_path / "made" / "fgvc-aircraft-2013b" / "data"
        write(data / "variants.txt", "DC-3\nA340-200\n707-320" + end)  # not sorted, to test that the builder sorts them
        for part, lines in lists.items():
            write(data / f"images_variant_{part}.txt", "\n".join(lines) + end)
        for number in numbers:
            write(data / "images" / f"{number:07d}.jpg", jpeg(number))
        archive = packed(data.parent, manual / "fgvc-aircraft-2013b", "gztar")
        monkeypatch.setattr(OWN_BUILDERS["fgvc_aircraft"], "MD5", md5(archive))

    return make


@pytest.mark.parametrize("end", ["\n", ""])
def test_aircraft_labels_are_variants(aircraft, tmp_path, end):
    aircraft(end=end)
    images = open_dataset("aircraft", tmp_path)
    assert images.class_names == ("707-320", "A340-200", "DC-3")
    assert contents(images.train) == {
        "0000001.jpg": (jpeg(1), 2),
        "0000002.jpg": (jpeg(2), 0),
        "0000003.jpg": (jpeg(3), 1),
    }
    assert contents(images.test) == {"0000004.jpg": (jpeg(4), 0)}


@pytest.mark.parametrize(
    ("lists", "numbers", "message"),
    [
        ({"train": ["0000001 DC-9"]}, range(1, 5), "0000001.jpg.*DC-9"),
        ({"train": ["0000001 DC-3"] * 2}, range(1, 5), "share the same hashed key"),
        ({}, (1, 3, 4), "No such file.*0000002.jpg"),
    ],
)
def test_contradictory_lists_and_images_are_refused(aircraft, tmp_path, lists, numbers, message):
    aircraft({**AIRCRAFT, **lists}, numbers)
    with pytest.raises(UserError, match=f"(?s)Received: .*{message}.*--prepare=aircraft"):
        open_dataset("aircraft", tmp_path)
    assert not (tmp_path / "fgvc_aircraft" / "1.0.0").exists()


def test_an_incomplete_archive_is_refused(manual, tmp_path):
    write(manual / "fgvc-aircraft-2013b.tar.gz", b"half")
    with pytest.raises(UserError, match=f"MD5 must be d4acdd33.*Received: {hashlib.md5(b'half').hexdigest()}"):
        open_dataset("aircraft", tmp_path)


def test_caltech101_trains_on_the_first_30_images(manual, tmp_path, monkeypatch):
    made = tmp_path / "made"
    counts = {"Faces": 33, "accordion": 31, "BACKGROUND_Google": 40}
    for name, count in counts.items():
        for number in range(1, count + 1):
            write(made / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", jpeg(number, gray=number == 1))
    outer = made / "caltech-101"
    outer.mkdir()
    packed(made / "101_ObjectCategories", outer / "101_ObjectCategories", "gztar")
    archive = packed(outer, manual / "caltech-101", "zip")
    builder = OWN_BUILDERS["caltech101_numbered"]
    monkeypatch.setattr(builder, "url_infos", {builder.URLS[0]: compute_url_info(archive)})

    images = open_dataset("caltech101", tmp_path)
    assert images.class_names == ("Faces", "accordion")  # capitals first, as in the paper's code
    train, test = contents(images.train), contents(images.test)
    first_30 = {f"{name}/image_{n:04d}.jpg" for name in ("Faces", "accordion") for n in range(1, 31)}
    assert set(train) == first_30
    assert set(test) == {f"Faces/image_00{n}.jpg" for n in (31, 32, 33)} | {"accordion/image_0031.jpg"}
    assert train["accordion/image_0001.jpg"] == (jpeg(1, gray=True), 1)  # a gray image stays as it was published


def test_caltech256_trains_on_the_first_60_images(manual, tmp_path, monkeypatch):
    root = tmp_path / "made" / "256_ObjectCategories"
    for label, (name, count) in enumerate({"001.ak47": 62, "257.clutter": 61}.items()):
        for number in range(1, count + 1):
            write(root / name / f"{name[:3]}_{number:04d}.jpg", jpeg(number + 100 * label))
    write(root / "001.ak47" / "greg" / "vision309" / "001_0001.jpg", jpeg(900))  # the real archive has both stray files
    write(root / "257.clutter" / "RENAME2", "mv")
    archive = packed(root, manual / "256_ObjectCategories", "tar")
    monkeypatch.setattr(OWN_BUILDERS["caltech256"], "MD5", md5(archive))

    images = open_dataset("caltech256", tmp_path)
    assert images.class_names == ("ak47", "clutter")
    assert set(contents(images.test)) == {
        "001.ak47/001_0061.jpg",
        "001.ak47/001_0062.jpg",
        "257.clutter/257_0061.jpg",
    }
    train = contents(images.train)
    assert len(train) == 120
    assert train["257.clutter/257_0001.jpg"] == (jpeg(101), 1)


@pytest.fixture
def birdsnap(manual):
    """Two species of ten photographs, one of which is missing and one of which was replaced by a placeholder."""
    root = manual / "birdsnap"
    rows, tested = ["url\tmd5\tpath\tspecies_id\tbb_x1"], ["path"]
    for species in ("Acadian_Flycatcher", "Zone-tailed_Hawk"):
        for number in range(10):
            path, content = f"{species}/{number}.jpg", jpeg(number)
            rows.append(f"http://x/{number}\t{hashlib.md5(content).hexdigest()}\t{path}\t1\t0")
            write(root / "download" / "images" / path, content)
        tested.append(f"{species}/0.jpg")
    (root / "download" / "images" / "Acadian_Flycatcher" / "3.jpg").unlink()
    write(root / "download" / "images" / "Zone-tailed_Hawk" / "4.jpg", jpeg(500))
    write(root / "images.txt", "\n".join(rows) + "\n")
    write(root / "test_images.txt", "\n".join(tested) + "\n")
    return root


def test_birdsnap_uses_only_original_photographs(birdsnap, tmp_path):
    images = open_dataset("birdsnap", tmp_path)
    assert images.class_names == ("Acadian_Flycatcher", "Zone-tailed_Hawk")
    assert (images.train.num_examples, images.test.num_examples) == (14, 4)  # a fifth of nine, twice
    train, test = contents(images.train), contents(images.test)
    assert not set(train) & set(test)
    everything = train | test
    assert not {"Acadian_Flycatcher/3.jpg", "Zone-tailed_Hawk/4.jpg"} & set(everything)
    assert everything["Zone-tailed_Hawk/5.jpg"] == (jpeg(5), 1)

    official = open_dataset("tfds:birdsnap/official", tmp_path)
    assert set(contents(official.test)) == {"Acadian_Flycatcher/0.jpg", "Zone-tailed_Hawk/0.jpg"}
    assert official.train.num_examples == 16


def test_different_collections_of_birdsnap_have_different_fingerprints(birdsnap, tmp_path):
    """One photograph is missing, which changes neither the name nor the version of the data set."""
    shutil.copytree(tmp_path / "downloads", tmp_path / "other" / "downloads")
    (tmp_path / "other/downloads/manual/birdsnap/download/images/Acadian_Flycatcher/9.jpg").unlink()
    here = open_dataset("birdsnap", tmp_path).fingerprint
    assert open_dataset("birdsnap", tmp_path / "other").fingerprint != here


def test_a_missing_list_is_named(birdsnap, tmp_path):
    (birdsnap / "test_images.txt").unlink()
    with pytest.raises(UserError, match=r"Received: no test_images.txt"):
        open_dataset("birdsnap", tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_cars_are_read_from_the_manual_folder(manual, tmp_path, nested):
    root = manual / "stanford_cars"
    names = np.array(["AM General Hummer SUV 2000", "smart fortwo Convertible 2012"], dtype=object)
    write(root / "devkit" / "README.txt", "")
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, labels, path in (
        ("cars_train", (2, 1), root / "devkit" / "cars_train_annos.mat"),
        ("cars_test", (2,), root / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(1, 1, 9, 9, label, f"{number:05d}.jpg") for number, label in enumerate(labels, start=1)]
        scipy.io.savemat(path, {"annotations": np.array(rows, dtype=kind)[None]})
        for number in range(1, len(labels) + 1):
            folder = root / part / part if nested else root / part
            write(folder / f"{number:05d}.jpg", jpeg(number + 10 * (part == "cars_test")))

    images = open_dataset("cars", tmp_path)
    assert images.class_names == tuple(names)
    assert contents(images.train) == {"cars_train/00001.jpg": (jpeg(1), 1), "cars_train/00002.jpg": (jpeg(2), 0)}
    assert contents(images.test) == {"cars_test/00001.jpg": (jpeg(11), 1)}


def test_sun397_uses_partition_1_of_the_original_files(manual, tmp_path, monkeypatch):
    root = tmp_path / "made" / "SUN397"
    names = [f"/{folder}/sun_{number}.jpg" for folder in ("a/abbey", "c/church/outdoor") for number in range(3)]
    for number, name in enumerate(names):
        write(root / name[1:], jpeg(number))
    # An image that only Pillow can decode and that has the wrong suffix, as in the real archive.
    Image.new("RGB", (5, 4), (1, 2, 3)).save(root / names[0][1:], "TIFF")
    archive = packed(root, manual / "SUN397", "gztar")
    with zipfile.ZipFile(manual / "Partitions.zip", "w") as partitions:
        partitions.writestr("Training_01.txt", "\r\n".join([names[0], names[4]]))
        partitions.writestr("Testing_01.txt", "\r\n".join([names[1], names[3]]))
        partitions.writestr("Training_02.txt", names[5])
    builder = OWN_BUILDERS["sun397_original"]
    archives = (archive, manual / "Partitions.zip")
    infos = {url: compute_url_info(path) for url, path in zip(builder.URLS, archives, strict=True)}
    monkeypatch.setattr(builder, "url_infos", infos)

    images = open_dataset("sun397", tmp_path)
    assert images.class_names == ("/a/abbey", "/c/church/outdoor")
    assert contents(images.test) == {names[1]: (jpeg(1), 0), names[3]: (jpeg(3), 1)}
    train = contents(images.train)
    assert train[names[4]] == (jpeg(4), 1)  # byte for byte
    assert train[names[0]][0].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", OWN_BUILDERS)
def test_builders_have_citation_homepage_and_description(name, tmp_path):
    with no_folders_left_behind():
        info = OWN_BUILDERS[name](data_dir=tmp_path).info
    assert info.citation and info.homepage.startswith("http") and info.description
