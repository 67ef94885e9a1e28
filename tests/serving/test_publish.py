"""Tests of the permissions of a published version."""

import os

import pytest

from robust_tf import export
from robust_tf.serving.publish import staging
from tests.serving.models import small_classifier


@pytest.mark.slow
@pytest.mark.usefixtures("no_fresh_process")
@pytest.mark.parametrize("readable", [True, False])
def test_every_user_can_read_a_version_unless_told_otherwise(readable, tmp_path, capsys):
    small_classifier().save(tmp_path / "classifier.keras")
    flags = [f"--classifier={tmp_path / 'classifier.keras'}", f"--export_dir={tmp_path / 'E'}", "--model_name=pets"]
    umask = os.umask(0o077)
    try:
        export.main(["export", *flags, *([] if readable else ["--noworld_readable"])])
    finally:
        os.umask(umask)
    version = tmp_path / "E" / "pets" / "1"
    made = [tmp_path / "E", version.parent, version, *version.rglob("*")]
    folder_mode, file_mode = (0o755, 0o644) if readable else (0o700, 0o600)
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {folder_mode}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {file_mode}
    assert staging.readers_of(version) in capsys.readouterr().out
    if not readable:
        assert staging.readers_of(version) == f"other users cannot read it: {version} has mode 0700"
