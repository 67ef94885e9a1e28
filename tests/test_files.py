"""Every program checks its output folder before it starts to work."""

import os
import pathlib

import pytest

from robust_tf import convert, evaluate, export, visualize
from robust_tf.errors import UserError
from robust_tf.files import check_output_file, check_output_folder


def dangling_link(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


def below_a_file(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "afile").write_text("")
    return tmp_path / "afile" / "deep" / "down"


def without_permission(tmp_path: pathlib.Path) -> pathlib.Path:
    if os.geteuid() == 0:
        return pathlib.Path("/proc/robust_tf/deep")  # where not even root may make a folder
    (tmp_path / "locked").mkdir(mode=0o500)
    return tmp_path / "locked" / "deep"


BLOCKED = {
    "a file": lambda tmp_path: below_a_file(tmp_path).parents[1],
    "below a file": below_a_file,
    "a dangling link": dangling_link,
    "no permission": without_permission,
    "a name that is too long": lambda tmp_path: tmp_path / "deep" / ("x" * 300),
}


@pytest.mark.parametrize("kind", BLOCKED)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, kind):
    folder = BLOCKED[kind](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        check_output_folder(folder, "--export_dir")
    message = str(raised.value)
    assert message.startswith("--export_dir needs a folder") and f"Received: {folder} (" in message
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_could_be_made_is_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_output_folder(tmp_path / "a" / "b", "--export_dir")
    check_output_folder(pathlib.Path("a/b"), "--export_dir")
    check_output_folder(pathlib.Path(), "--export_dir")
    check_output_file(pathlib.Path("x.png"), "--output")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--output is the file to write. Received: .*which is a folder"):
        check_output_file(tmp_path, "--output")


@pytest.mark.parametrize(
    ("flag", "run"),
    [
        ("--output", lambda path: evaluate.main(["evaluate", "--classifier=none.keras", f"--output={path}"])),
        ("--output", lambda path: visualize.main(["visualize", "--classifier=none.keras", f"--output={path}/x.png"])),
        (
            "--tensorboard",
            lambda path: visualize.main(
                ["visualize", "--classifier=none.keras", f"--output={path[:-4]}.png", f"--tensorboard={path}"]
            ),
        ),
        (
            "--output",
            lambda path: convert.main(
                ["convert", "--checkpoint=none.pt", "--architecture=resnet50", f"--output={path}/x.keras"]
            ),
        ),
        (
            "--to_reference",
            lambda path: convert.main(["convert", "--classifier=none.keras", f"--to_reference={path}/x.npz"]),
        ),
        (
            "--export_dir",
            lambda path: export.main(["export", "--classifier=none.keras", f"--export_dir={path}", "--model_name=m"]),
        ),
    ],
)
def test_every_program_checks_its_output_before_it_reads_its_input(tmp_path, flag, run):
    """They do so before they read the classifier, which does not exist here."""
    path = tmp_path / "afile"
    path.write_text("")
    with pytest.raises(UserError, match=f"^{flag} needs a folder"):
        run(str(path))
