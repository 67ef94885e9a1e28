"""The state of a run: restored exactly, never half-written, and clear about what is wrong with a file."""

import contextlib
import resource
import signal

import keras
import numpy as np
import pytest

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.training.checkpoint import Checkpoints, Progress


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
    """Every file ends at 1000 bytes, as on a disk that runs full.

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


def test_everything_comes_back(tmp_path):
    model = trained_model()
    progress = Progress(epochs_done=2, best_epoch=1, best_value=0.5, best_loss=0.3, history=[{"loss": 1.0}] * 2)
    Checkpoints(tmp_path).save(progress, model, model.optimizer, is_best=True)
    other = trained_model()
    for variable in [*other.variables, *other.optimizer.variables]:
        variable.assign(np.zeros(variable.shape))
    restored = Checkpoints(tmp_path).restore(other, other.optimizer)
    assert restored == progress
    for ours, theirs in zip(state_of(other), state_of(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_best_is_kept_while_latest_moves_on(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(Progress(epochs_done=1), model, model.optimizer, is_best=True)
    best = model.get_weights()
    model.set_weights([weight + 1 for weight in best])
    checkpoints.save(Progress(epochs_done=2), model, model.optimizer, is_best=False)
    assert checkpoints.peek().epochs_done == 2
    checkpoints.restore_best(model)
    for ours, theirs in zip(model.get_weights(), best, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(Progress(epochs_done=1), model, model.optimizer, is_best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(UserError, match=r"best\.npz.*unchanged"):
        checkpoints.save(Progress(epochs_done=2), model, model.optimizer, is_best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 999])
def test_a_damaged_file_is_named_and_changes_nothing(tmp_path, damage):
    model, checkpoints = trained_model(), Checkpoints(tmp_path)
    checkpoints.save(Progress(epochs_done=1), model, model.optimizer, is_best=True)
    path = tmp_path / "latest.npz"
    path.write_bytes(damage(path.read_bytes()))
    before = state_of(model)
    with pytest.raises(UserError, match=r"latest\.npz"):
        checkpoints.restore(model, model.optimizer)
    for ours, theirs in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = trained_model()
    Checkpoints(tmp_path).save(Progress(), model, model.optimizer, is_best=True)
    other = trained_model(units=7)
    with pytest.raises(UserError, match="another model|Cannot read"):
        Checkpoints(tmp_path).restore(other, other.optimizer)


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="on purpose"), replaced_atomically(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("on purpose")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(UserError, match="blocked"), replaced_atomically(tmp_path / "blocked" / "file.txt"):
        pass
