"""Tests of the reasons given for a folder without a version."""

import pytest

from robust_tf.errors import UserError
from robust_tf.serving.model.folders import complete_versions, is_remote, why_no_version
from robust_tf.serving.server.serve_config import ServeConfig


def saved_model(folder):
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").touch()


@pytest.mark.parametrize(
    ("make", "name", "said", "final"),
    [
        (lambda p: None, "missing/m", "does not exist, only {} does", False),
        (lambda p: (p / "m").mkdir(), "m", "A version is a folder whose name is a number", False),
        (lambda p: (p / "m").write_text(""), "m", "m is a file", True),
        (lambda p: (p / "m").symlink_to(p / "gone"), "m", "is a link to {}/gone, which does not exist", False),
        (lambda p: saved_model(p / "m" / "3"), "m/3", "is one version. The model is the folder that holds", True),
        (lambda p: saved_model(p / "m" / "v1"), "m/v1", "rename this one, for example to {}/m/1", True),
        (lambda p: saved_model(p / "m" / "v1"), "m", "'v1' holds a SavedModel, but a version is a folder", False),
        (lambda p: (p / "m" / "7").mkdir(parents=True), "m", "Version 7 has no saved_model.pb", False),
        (
            lambda p: saved_model(p / "m" / "pets" / "1"),
            "m",
            "one folder deeper. Name the folder {}/m/pets instead",
            False,
        ),
    ],
)
def test_reason_names_the_way_out(tmp_path, make, name, said, final):
    make(tmp_path)
    assert complete_versions(tmp_path / name) == {}  # so the server waits or gives up
    absence = why_no_version(tmp_path / name)
    assert said.format(tmp_path) in absence.reason
    assert absence.final is final
    assert absence.reason.endswith(".")


def test_unreadable_folder_is_explained(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    assert why_no_version(tmp_path) == (
        f"{tmp_path} can't be read: Permission denied. Make it readable for this user.",
        False,
    )


def test_addresses_are_refused_at_once():
    for path in ("gs://bucket/m", "s3://b", "hdfs://h/m", "file:///m"):
        assert is_remote(path)
        with pytest.raises(UserError, match=f"folders of this machine only. Received: --model_base_path: {path}"):
            ServeConfig(model_base_path=path)
    assert not is_remote("/a:/b") and not is_remote("a/b") and not is_remote("models")


def test_folder_with_a_version_has_no_reason(tmp_path):
    saved_model(tmp_path / "1")
    saved_model(tmp_path / "v2")
    assert why_no_version(tmp_path) is None
