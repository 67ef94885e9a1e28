"""Checkpoints restore a run exactly, are never half-written, and say clearly what is wrong with a file."""

import contextlib
import io
import resource
import signal
import zipfile

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.training.checkpoint import Checkpoints, TrainingProgress, named_arrays


def trained_model(units: int = 3) -> keras.Model:
    keras.backend.clear_session()  # the same names in each model, as in a new process
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(units)]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    model.fit(rng.random((16, 4)), rng.random((16, units)), epochs=2, verbose=0)
    return model


def state_of(model: keras.Model) -> list[np.ndarray]:
    return [np.array(variable) for variable in [*model.variables, *model.optimizer.variables]]


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 1000 bytes, as on a full disk.

    Not a fixture: pytest writes its own log before fixtures are torn down.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead of a killed process
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def variables_of(model: keras.Model) -> list[keras.Variable]:
    return [*model.variables, *model.optimizer.variables]


def arrays_of(model: keras.Model) -> dict[str, np.ndarray]:
    return named_arrays(variables_of(model))


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_whole_state_is_restored(tmp_path):
    model = trained_model()
    progress = TrainingProgress(epochs_done=2, best_epoch=1, best_value=0.5, best_loss=0.3, history=[{"loss": 1.0}] * 2)
    Checkpoints(tmp_path).save(progress, arrays_of(model))
    other = trained_model()
    for variable in variables_of(other):
        variable.assign(np.zeros(variable.shape))
    state = Checkpoints(tmp_path).latest()
    state.assign_to(variables_of(other))
    assert state.progress == progress
    for ours, theirs in zip(state_of(other), state_of(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_best_weights_are_kept_as_long_as_a_state_names_them(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    first = model.get_weights()
    checkpoints.save_best(0, named_arrays(model.variables))
    checkpoints.save(TrainingProgress(epochs_done=1, best_epoch=0), arrays_of(model))
    model.set_weights([weight + 1 for weight in first])
    checkpoints.save_best(1, named_arrays(model.variables))
    # As if the run was killed here: the existing state still names the first epoch.
    checkpoints.best(checkpoints.latest().progress).assign_to(model.variables)
    for ours, best in zip(model.get_weights(), first, strict=True):
        np.testing.assert_array_equal(ours, best)
    for epochs_done in (2, 3, 4):
        checkpoints.save(TrainingProgress(epochs_done=epochs_done, best_epoch=1), arrays_of(model))
    assert names_in(tmp_path) == {"best_epoch0001.npz", "epoch0003_step0000000.npz", "epoch0004_step0000000.npz"}


def test_the_two_newest_states_and_the_last_one_from_the_end_of_an_epoch_are_kept(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    for epochs_done, steps_done in [(1, 0), (2, 0), (2, 5), (2, 10), (2, 15)]:
        checkpoints.save(TrainingProgress(epochs_done=epochs_done, steps_done=steps_done), arrays_of(model))
    assert names_in(tmp_path) == {f"epoch0002_step00000{step}.npz" for step in ("00", "10", "15")}
    change = TrainingProgress(rollbacks=1, alarms=["masked"])
    progress = checkpoints.go_back_an_epoch(change)
    assert progress == TrainingProgress(epochs_done=2, rollbacks=1, alarms=["masked"]) == checkpoints.latest().progress
    assert names_in(tmp_path) == {"epoch0002_step0000000.npz"}


@pytest.mark.parametrize("content", ["best", "state"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, content):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save_best(0, named_arrays(model.variables))
    checkpoints.save(TrainingProgress(epochs_done=1, best_epoch=0), arrays_of(model))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(UserError, match=r"Cannot write .*(best_epoch0001|epoch0002)"):
        if content == "best":
            checkpoints.save_best(1, named_arrays(model.variables))
        else:
            checkpoints.save(TrainingProgress(epochs_done=2, best_epoch=0), arrays_of(model))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def flipped(data: bytes) -> bytes:
    """Flips one bit of a variable, and corrects the checksum of the ZIP archive."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            content = bytearray(archive.read(name))
            if name.endswith("kernel.npy"):
                content[-1] ^= 1
            changed.writestr(name, bytes(content))
    return out.getvalue()


DAMAGES = [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: b"",
    lambda data: b"x" * 999,
    flipped,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_replaced_by_the_one_before(tmp_path, capsys, damage):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(TrainingProgress(epochs_done=1), arrays_of(model))
    before = state_of(model)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    checkpoints.save(TrainingProgress(epochs_done=1, steps_done=7), arrays_of(model))
    path = tmp_path / "epoch0001_step0000007.npz"
    path.write_bytes(damage(path.read_bytes()))
    state = checkpoints.latest()
    state.assign_to(variables_of(model))
    assert state.progress == TrainingProgress(epochs_done=1)
    for ours, theirs in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    out = capsys.readouterr().out
    assert "Cannot read the checkpoint" in out and path.name in out and "back to" in out
    assert not path.exists()


def test_if_all_states_are_damaged_an_error_says_so_and_nothing_is_deleted(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(TrainingProgress(epochs_done=1), arrays_of(model))
    path = tmp_path / "epoch0001_step0000000.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"epoch0001_step0000000\.npz.*Delete the folder"):
        checkpoints.latest()
    assert path.exists()
    assert Checkpoints(tmp_path / "empty").latest() is None


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(TrainingProgress(epochs_done=1), arrays_of(model))
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    with pytest.raises(UserError, match="NaN or infinity in .*batch_normalization"):
        checkpoints.save(TrainingProgress(epochs_done=2), arrays_of(model))
    assert checkpoints.latest().progress.epochs_done == 1


def with_format(path, number: int | None) -> None:
    """Writes a checkpoint again with another format number, or without one."""
    with np.load(path, allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files if name != "format"}
    if number is not None:
        content["format"] = np.array(number)
    np.savez(path, **content)


def test_a_checkpoint_of_an_unknown_format_is_refused_and_kept(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    for epochs_done in (1, 2):
        checkpoints.save(TrainingProgress(epochs_done=epochs_done), arrays_of(model))
    with_format(tmp_path / "epoch0002_step0000000.npz", 99)
    with pytest.raises(
        UserError, match=r"reads checkpoints of format 1\. Received: .*epoch0002.* of format 99\. Continue"
    ):
        checkpoints.latest()
    assert names_in(tmp_path) == {"epoch0001_step0000000.npz", "epoch0002_step0000000.npz"}


def test_a_checkpoint_without_a_format_number_is_read(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(TrainingProgress(epochs_done=1), arrays_of(model))
    with_format(tmp_path / "epoch0001_step0000000.npz", None)
    assert checkpoints.latest().progress.epochs_done == 1


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model = trained_model()
    Checkpoints(tmp_path).save(TrainingProgress(), arrays_of(model))
    other = trained_model(units=7)
    before = state_of(other)
    with pytest.raises(UserError, match=r"another model: .*has shape \(4, 3\) in the file and \(4, 7\) in this model"):
        Checkpoints(tmp_path).latest().assign_to(variables_of(other))
    with pytest.raises(UserError, match="another model: it holds"):
        Checkpoints(tmp_path).latest().assign_to(other.variables)
    for ours, theirs in zip(state_of(other), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="on purpose"), replaced_atomically(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("on purpose")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(UserError, match="blocked"), replaced_atomically(tmp_path / "blocked" / "file.txt"):
        pass
