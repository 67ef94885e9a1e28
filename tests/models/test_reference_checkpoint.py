"""Checkpoints are read as data: correct numbers, no code run, no memory wasted, clear refusals."""

import hashlib
import pathlib
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_writer import Call, Global, Storage, tensor, tensors, write_legacy, write_zip, write_zip_members

from robust_tf.errors import UserError
from robust_tf.models import torch_file, torch_pickle
from robust_tf.models.reference_checkpoint import read_reference_checkpoint

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "bn1.weight": rng.standard_normal(4).astype(np.float32),
        "bn1.num_batches_tracked": np.array(7),
        "fc.weight": rng.standard_normal((10, 4)).astype(np.float32),
    }


def assert_same(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(state) == list(expected)
    for key, values in expected.items():
        assert (state[key].dtype, state[key].shape) == (values.dtype, values.shape), key
        np.testing.assert_array_equal(state[key], values, err_msg=key)


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        read_reference_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["zip", "zip_cuda", "legacy_cuda"])
def test_files_of_pytorch_are_read(name: str) -> None:
    path = FIXTURES / f"tiny_smallbn_{name}.pt"
    checkpoint = read_reference_checkpoint(path)
    with np.load(FIXTURES / "tiny_smallbn_logits.npz") as golden:
        assert_same(checkpoint.state, {key: golden[key] for key in golden.files if key != "logits"})
    assert (checkpoint.epoch, checkpoint.accuracies) == (1, {"nat_prec1": 12.5})
    assert checkpoint.container == name.split("_")[0]
    assert checkpoint.size == path.stat().st_size
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@WRITERS
@pytest.mark.parametrize("wrap", [lambda state: {"model": state}, lambda state: {"state_dict": state}, lambda x: x])
def test_weights_may_be_in_three_places(tmp_path, write, wrap) -> None:
    checkpoint = read_reference_checkpoint(write(tmp_path / "x.pt", wrap(tensors(weights()))))
    assert_same(checkpoint.state, weights())
    assert (checkpoint.epoch, checkpoint.accuracies) == (None, {})


def test_the_name_of_a_model_is_not_taken_for_its_state(tmp_path) -> None:
    content = {"model": "resnet18", "state_dict": tensors(weights()), "epoch": 3}
    checkpoint = read_reference_checkpoint(write_zip(tmp_path / "x.pt", content))
    assert_same(checkpoint.state, weights())
    assert checkpoint.epoch == 3


@WRITERS
def test_number_types_and_byte_orders(tmp_path, write) -> None:
    bits = np.array([0x3FC0, 0xC020, 0x7F80], np.uint16)  # 1.5, -2.5 and infinity in bfloat16
    state = {
        "half": tensor(np.array([0.5, -2], np.float16)),
        "double": tensor(np.array([1e300])),
        "brain": tensor(bits),
        "long": tensor(np.array([-(2**40)])),
    }
    expected = {
        "half": np.array([0.5, -2], np.float16),
        "double": np.array([1e300]),
        "brain": np.array([1.5, -2.5, np.inf], ml_dtypes.bfloat16),
        "long": np.array([-(2**40)]),
    }
    for big_endian in (False, True):
        assert_same(read_reference_checkpoint(write(tmp_path / "x.pt", state, big_endian=big_endian)).state, expected)


@WRITERS
def test_views_of_a_storage(tmp_path, write) -> None:
    base = np.arange(24, dtype=np.float32)
    storage = Storage(base)
    state = {
        "all": tensor(base.reshape(4, 6), storage=storage),
        "transposed": tensor(base, storage=storage, shape=(6, 4), strides=(1, 6)),
        "part": tensor(base, storage=storage, offset=7, shape=(2, 3), strides=(6, 2)),
        "empty": tensor(base, storage=storage, offset=24, shape=(0, 3)),
        "number": tensor(base, storage=storage, offset=23, shape=()),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (tensor(base, storage=storage), True, {})),
    }
    matrix = base.reshape(4, 6)
    expected = {
        "all": matrix,
        "transposed": matrix.T,
        "part": matrix[1:3, 1:6:2],
        "empty": np.zeros((0, 3), np.float32),
        "number": np.float32(23),
        "parameter": base,
    }
    state = read_reference_checkpoint(write(tmp_path / "x.pt", state)).state
    assert_same(state, expected)
    assert np.shares_memory(state["all"], state["parameter"])
    assert all(values.flags.c_contiguous for values in state.values())


def test_the_copy_in_the_attacker_and_the_training_state_are_ignored(tmp_path) -> None:
    half = Call(Global("_codecs", "encode"), (np.float64(0.05).tobytes().decode("latin1"), "latin1"))
    float64 = Call(Global("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    learning_rate = Call(Global("numpy.core.multiarray", "scalar"), (float64, half))
    values = np.ones((2, 2), np.float32)
    model = {
        "module.normalizer.new_mean": tensor(np.ones((3, 1, 1), np.float32)),
        "module.model.fc.weight": tensor(values),
        "module.attacker.normalize.new_mean": tensor(np.ones((3, 1, 1), np.float32)),
        "module.attacker.model.fc.weight": tensor(values),
    }
    state_dict = Call(Global("collections", "OrderedDict"), (list(model.items()),), {"_metadata": {"": {"version": 1}}})
    content = {
        "model": state_dict,
        "optimizer": {"state": {0: {"momentum_buffer": tensor(values)}}, "param_groups": [{"lr": learning_rate}]},
        "schedule": {"_last_lr": [learning_rate], "size": Call(Global("torch", "Size"), ([1, 2],))},
        "epoch": 30,
        "amp": None,
        "adv_prec1": tensor(np.array(41.5, np.float32)),
        "nat_prec1": Call(Global("numpy._core.multiarray", "scalar"), (float64, half)),
    }
    checkpoint = read_reference_checkpoint(write_zip(tmp_path / "x.pt", content))
    assert list(checkpoint.state) == ["module.normalizer.new_mean", "module.model.fc.weight"]
    assert checkpoint.epoch == 30
    assert checkpoint.accuracies == {"nat_prec1": 0.05, "adv_prec1": 41.5}


EVIL = {
    "os.system": Call(Global("os", "system"), ("touch marker",)),
    "posix.system": Call(Global("posix", "system"), ("touch marker",)),
    "builtins.eval": Call(Global("builtins", "eval"), ("open('marker', 'w')",)),
    "builtins.getattr": Call(Global("builtins", "getattr"), (Global("torch", "Size"), "__class__")),
    "builtins.open": Call(Global("builtins", "open"), ("marker", "w")),
    "dill._dill._create_code": Call(Global("dill._dill", "_create_code"), (0,)),
    "dill._dill._load_type": Call(Global("dill._dill", "_load_type"), ("CodeType",)),
    "torch.nn.modules.linear.Linear": Call(Global("torch.nn.modules.linear", "Linear"), (2, 2)),
    "torch.storage._load_from_bytes": Call(Global("torch.storage", "_load_from_bytes"), (b"",)),
    "torch.FloatStorage.__reduce__": Global("torch", "FloatStorage.__reduce__"),
    "numpy.load": Call(Global("numpy", "load"), ("x.npy", None, True)),
    "functools.partial": Call(Global("functools", "partial"), (Global("torch", "Size"),)),
    "collections.OrderedDict.fromkeys": Call(Global("collections", "OrderedDict.fromkeys"), ([1],)),
    "robust_tf.models.torch_file.pickle": Global("robust_tf.models.torch_file", "pickle"),
}


@WRITERS
def test_nothing_but_tensors_is_built(tmp_path, monkeypatch, write) -> None:
    monkeypatch.chdir(tmp_path)
    ordered_dict = Global("collections", "OrderedDict")
    for name, evil in EVIL.items():
        for hidden in (
            evil,
            {"model": tensors(weights()), "optimizer": {"state": [(evil,)]}},
            {"model": tensors(weights()), evil: 1},
            {"model": Call(ordered_dict, ([["a", evil]],))},
            {"model": Call(ordered_dict, (), {"_metadata": evil})},
            {"model": {"a": tensor(np.ones(1), storage=Storage(np.ones(1), view=(evil, 0, 1)))}},
        ):
            assert name in refusal(write(tmp_path / "x.pt", hidden))
            assert not (tmp_path / "marker").exists(), name


def test_every_opcode_that_looks_up_a_name_is_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opcodes in (
        b"cos\nsystem\n(X\x0c\x00\x00\x00touch markertR.",  # GLOBAL, REDUCE
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x0c\x00\x00\x00touch markero.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93X\x0c\x00\x00\x00touch marker\x85R.",  # STACK_GLOBAL
        b"\x80\x04cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\n)}\x92.",  # NEWOBJ_EX
    ):
        assert "os.system" in refusal(write_zip_members(tmp_path / "x.pt", {"data.pkl": opcodes}))
        assert not (tmp_path / "marker").exists(), opcodes


def test_setting_a_state_on_an_allowed_name_has_no_effect(tmp_path) -> None:
    before = dict(vars(torch_pickle._rebuild_tensor)), repr(torch_pickle._ALLOWED)
    for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict"):
        # BUILD with (None, {"keys": None}), which would set the attribute `keys` of an object without __setstate__.
        opcodes = f"c{name}\n".encode() + b"N}X\x04\x00\x00\x00keysNs\x86b."
        refusal(write_zip_members(tmp_path / "x.pt", {"data.pkl": b"\x80\x02" + opcodes}))
    assert (dict(vars(torch_pickle._rebuild_tensor)), repr(torch_pickle._ALLOWED)) == before


@pytest.mark.parametrize("opcodes", [b"\x82\x01.", b"\x83\x01\x00.", b"Nr\xff\xff\xff\x7f."])
def test_opcodes_that_bypass_the_table_or_fill_the_memory_are_refused(tmp_path, opcodes: bytes) -> None:
    message = refusal(write_zip_members(tmp_path / "x.pt", {"data.pkl": b"\x80\x02" + opcodes}))
    assert "must contain only operations that weights need" in message


# Keys of a few bytes that describe a tuple whose hash would take years, or overflow the stack of the process.
ENDLESS = {
    "twice itself": b"N" + b"2\x86" * 22,  # DUP, TUPLE2
    "deep": b"N" + b"\x85" * 3000,  # TUPLE1
    "from the memo": b"N\x94"
    + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(22)),  # BINGET twice, TUPLE2, MEMOIZE
    "from a call": b"N" + b"".join(b"2\x86q%cctorch._utils\n_rebuild_parameter\nh%c\x85R" % (n, n) for n in range(22)),
}


@pytest.mark.parametrize("key", ENDLESS.values(), ids=ENDLESS)
def test_endless_keys_are_never_hashed(tmp_path, key: bytes) -> None:
    message = refusal(write_zip_members(tmp_path / "x.pt", {"data.pkl": b"\x80\x04}" + key + b"Ns."}))
    assert "must be strings or 64-bit integers. Received: (" in message
    assert len(message) < 500


@WRITERS
def test_messages_are_always_short(tmp_path, write) -> None:
    endless: list = []
    for _ in range(16):
        endless = [endless] * 2
    numbers = np.ones(4, np.float32)
    for wrong in (
        tensor(numbers, shape=(endless,), strides=(1,)),
        tensor(numbers, storage=Storage(numbers, view=(endless,))),
        Call(Global("torch._utils", "_rebuild_tensor_v2"), (endless, 0, (), ())),
        {"x": Call(Global("numpy._core.multiarray", "scalar"), (endless, b""))},
    ):
        assert len(refusal(write(tmp_path / "x.pt", {"a": wrong}))) < 500


@WRITERS
def test_a_tensor_must_lie_inside_its_storage(tmp_path, write) -> None:
    for wrong, said in (
        ({"offset": 5}, "offset=5"),
        ({"offset": -1}, "offset=-1"),
        ({"shape": (5,)}, "shape=(5,)"),
        ({"shape": (-1,)}, "shape=(-1,)"),
        ({"shape": (2.0,), "strides": (1,)}, "shape=(2.0,)"),
        ({"shape": (2, 2), "strides": (3, 2)}, "strides=(3, 2)"),
        ({"shape": (2, 2), "strides": (-1, 1)}, "strides=(-1, 1)"),
        ({"shape": (2, 2), "strides": (1,)}, "strides=(1,)"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "shape=(1000000, 1000000)"),
    ):
        assert said in refusal(write(tmp_path / "x.pt", {"a": tensor(np.ones(4, np.float32), **wrong)}))


@WRITERS
def test_a_storage_must_have_the_length_in_the_pickle(tmp_path, write) -> None:
    for count in (3, 5, 2**60, -1):
        storage = Storage(np.ones(4, np.float32), count=count)
        message = refusal(write(tmp_path / "x.pt", {"a": tensor(np.ones(1, np.float32), storage=storage)}))
        assert str(4 * count if write is write_zip and count > 0 else count) in message


@WRITERS
def test_a_storage_must_be_whole(tmp_path, write) -> None:
    storage = Storage(np.ones(4, np.float32), view=("0", 2, 2))  # as in torch < 0.4
    message = refusal(write(tmp_path / "x.pt", {"a": tensor(np.ones(1, np.float32), storage=storage)}))
    assert "whole storages" in message and "('0', 2, 2)" in message


def test_a_compressed_archive_is_refused(tmp_path) -> None:
    path = write_zip(tmp_path / "x.pt", tensors(weights()), compression=zipfile.ZIP_DEFLATED)
    assert "must not be compressed" in refusal(path)


@pytest.mark.parametrize("name", ["zip", "legacy_cuda"])
def test_a_file_truncated_anywhere_is_refused(tmp_path, name: str) -> None:
    whole = (FIXTURES / f"tiny_smallbn_{name}.pt").read_bytes()
    path = tmp_path / "x.pt"
    for length in (0, 1, 20, 100, 600, 6430, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert str(len(whole) // 2) in refusal(path)


def test_a_legacy_file_truncated_in_unused_numbers_is_refused(tmp_path) -> None:
    content = {"model": tensors(weights()), "optimizer": tensor(np.ones(1000, np.float32))}
    path = write_legacy(tmp_path / "x.pt", content)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = refusal(path)
    assert f"must have {len(whole)} bytes. Received: {len(whole) - 1}" in message


def test_a_flipped_bit_in_the_weights_is_detected(tmp_path) -> None:
    values = np.arange(100, dtype=np.float32)
    path = write_zip(tmp_path / "x.pt", {"a": tensor(values)})
    data = path.read_bytes()
    path.write_bytes(data.replace(values[50].tobytes(), values[51].tobytes(), 1))
    assert "CRC-32" in refusal(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<html>not found</html>", "<html>"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 300, "tar archive"),
        (b"\x89HDF\r\n", "HDF"),
        (pickle.dumps([1], protocol=2), "[1]"),
    ],
)
def test_other_formats_are_named(tmp_path, data: bytes, said: str) -> None:
    (tmp_path / "x.pt").write_bytes(data + pickle.dumps(1) * 3)
    assert said in refusal(tmp_path / "x.pt")


def test_a_keras_file_is_not_a_checkpoint(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    assert "config.json" in refusal(tmp_path / "x.keras")


@pytest.mark.parametrize("content", [[1], {"epoch": 3}, {"model": {}}, {"model": {"a": 1.0}}, {"model": {3: 1}}])
def test_a_checkpoint_without_weights_is_refused(tmp_path, content) -> None:
    assert "must hold tensors by name" in refusal(write_zip(tmp_path / "x.pt", content))


def test_a_missing_file_is_named(tmp_path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.pt")


@WRITERS
def test_reading_copies_nothing(tmp_path, write) -> None:
    layers = 8
    state = tensors({f"{n}.weight": np.full(2**18, n, np.float32) for n in range(layers)})
    state |= {f"attacker.{key}": tensor(np.zeros(2**18, np.float32)) for key in state}
    momentum = {n: {"momentum_buffer": tensor(np.zeros(2**18, np.float32))} for n in range(layers)}
    path = write(tmp_path / "x.pt", {"model": state, "optimizer": {"state": momentum}})
    tracemalloc.start()
    try:
        checkpoint = read_reference_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(values.nbytes for values in checkpoint.state.values()) == 2**20 * layers
    assert peak < 2**20  # less than a single storage
    assert checkpoint.state["3.weight"].min() == checkpoint.state["3.weight"].max() == 3


def _resident_pages_of_files() -> int:
    fields = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("RssFile:")) * 2**10


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@WRITERS
def test_let_go_releases_the_pages_of_an_array(tmp_path, write) -> None:
    size = 2**24
    path = write(tmp_path / "x.pt", tensors({"fc.weight": np.arange(size, dtype=np.float16).reshape(2, -1)}))
    array = read_reference_checkpoint(path).state["fc.weight"]
    before = _resident_pages_of_files()
    assert array.max() > 0
    read = _resident_pages_of_files()
    torch_file.let_go(array)
    after = _resident_pages_of_files()
    assert read - before > size  # of 2 * size bytes
    assert after - before < size
    np.testing.assert_array_equal(array[0, :5], np.arange(5))
    torch_file.let_go(np.zeros(3))  # not a view of a file
