"""The state file: it restores what was done, and refuses files of other evaluations and damaged files."""

import json

import pytest

from robust_tf.errors import UserError
from robust_tf.evaluation.state_file import StateFile

IDENTITY = {"--seed": 0, "weights of --classifier": "1f" * 32, "sizes": (1, 2)}


def test_results_and_progress_are_restored(tmp_path):
    path = tmp_path / "folder" / "state.json"
    state = StateFile(path, IDENTITY)
    assert state.finished("a") is None and state.unfinished("a") is None
    assert not path.exists()  # written only when there is something to store
    state.keep("a", {"images_done": 3})
    assert StateFile(path, IDENTITY).unfinished("a") == {"images_done": 3}
    state.finish("a", [0.5])
    again = StateFile(path, IDENTITY)
    assert again.finished("a") == [0.5] and again.unfinished("a") is None


def test_the_state_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "state.json"
    StateFile(path, IDENTITY).finish("a", 1)
    with pytest.raises(UserError, match=r"another evaluation \(in the file -> now\): --seed: 0 -> 7. Choose another"):
        StateFile(path, {**IDENTITY, "--seed": 7})
    with pytest.raises(UserError, match="weights of --classifier: .*1f1f.* -> null"):
        StateFile(path, {name: value for name, value in IDENTITY.items() if "weights" not in name})


@pytest.mark.parametrize("part", ["finished", "unfinished"])
def test_a_damaged_part_is_named(tmp_path, part):
    path = tmp_path / "state.json"
    StateFile(path, IDENTITY).finish("a", 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), part: [1]}))
    with pytest.raises(UserError, match=r"state\.json is not the state of an evaluation.*delete"):
        StateFile(path, IDENTITY)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"identity": {}}', '{"identity": 1, "finished": 1, "unfinished": 1}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"state\.json is not the state of an evaluation.*delete"):
        StateFile(path, IDENTITY)
    assert path.read_text() == content
