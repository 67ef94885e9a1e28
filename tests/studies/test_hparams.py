"""The cells in TensorBoard: each is a run with its place and its accuracies, once."""

from made_up_study import study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

from robust_tf.studies.hparams import write_hparams


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_each_cell_is_a_run_with_its_settings_and_accuracies(tmp_path):
    cells = study(epsilons=(0, 1.0), seeds=range(2), draws=(0,), downscale=("", "32"))
    for _ in range(2):  # the second replaces the first
        write_hparams(tmp_path, cells)
    folder = tmp_path / "tensorboard"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {each.cell for each in cells}
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    for each in cells:
        events = read(folder / each.cell)
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert start.hparams["source_epsilon"].number_value == each.source_epsilon
        assert start.hparams["downscale"].string_value == each.varied["downscale"]
        assert "dataset" not in start.hparams  # the same in all cells
        (event,) = events.Tensors("accuracy")
        assert abs(make_ndarray(event.tensor_proto) - each.accuracy) < 1e-6
