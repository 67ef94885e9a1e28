"""Hostile checkpoints are cheap to refuse: memory below 3 times the size plus 200 MB, under 10 s, short messages."""

import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from torch_writer import Storage, tensor, write_legacy, write_zip, write_zip_members

from robust_tf.errors import UserError
from robust_tf.models.reference_checkpoint import read_reference_checkpoint

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
PACKAGE = pathlib.Path(__file__).parents[2] / "robust_tf"
# Reads a file without TensorFlow, which the package `robust_tf.models` imports but the reader does not need.
READER = """
import json, re, sys, time, types
models = types.ModuleType("robust_tf.models")
models.__path__ = [sys.argv[1]]
sys.modules["robust_tf.models"] = models
from robust_tf.errors import UserError
from robust_tf.models.reference_checkpoint import read_reference_checkpoint
assert "tensorflow" not in sys.modules
start = time.process_time()
try:
    message = str(len(read_reference_checkpoint(sys.argv[2]).state))
except UserError as error:
    message = str(error)
# Not `ru_maxrss`, which includes the process that started this one.
peak = int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([time.process_time() - start, peak, message]))
"""
TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
ENCODE = b"c_codecs\nencode\nq\x01"
SIZE = b"ctorch\nSize\nq\x01"
ORDERED = b"ccollections\nOrderedDict\nq\x01"
# The content of the pickles, after their first two bytes.
PICKLES = {
    "encodes a memoized text again and again": TEXT + b"q\x00" + ENCODE + b"h\x01h\x00\x85R" * 4000,
    "torch.Size of a list": b"](" + b"K\x01" * 200_000 + b"eq\x00" + SIZE + b"h\x01h\x00\x85R" * 4000,
    "torch.Size of a text": TEXT + b"q\x00" + SIZE + b"h\x01h\x00\x85R" * 4000,
    "OrderedDict of a dictionary": b"}("
    + b"".join(b"J%sN" % struct.pack("<i", n) for n in range(40_000))
    + b"uq\x00"
    + ORDERED
    + b"h\x01h\x00\x85R" * 4000,
    "OrderedDict of a list of pairs": b"](" + b"K\x01N\x86" * 40_000 + b"eq\x00" + ORDERED + b"h\x01h\x00\x85R" * 4000,
    "keys of one hash": b"}("
    + b"".join(b"\x8a\x10" + (n * (2**61 - 1) << 40).to_bytes(16, "little") + b"N" for n in range(50_000))
    + b"u.",
    "an over-long name": b"c" + b"a" * 4_000_000 + b"\nb\n.",
    "an over-long name in another form": TEXT + TEXT + b"\x93.",
    "empty lists": b"]" * 4_000_000,
    "empty dictionaries": b"}" * 4_000_000,
    "sets": b"\x8f" * 4_000_000,
    "calls": ORDERED + b"h\x01)R" * 1_000_000,
    "tensors": b"ctorch._utils\n_rebuild_tensor\nq\x01" + b"h\x01(NNNNtR" * 1_000_000,
    "arguments": b"(" + b"N" * 100_000 + b"tq\x00" + ORDERED + b"h\x01h\x00R" * 100_000,
    "deep": b"N" + b"\x85" * 500_000 + b".",
    "appends to itself": b"]q\x00" + b"h\x00a" * 500_000,
    "huge numbers": b"\x8b" + struct.pack("<I", 2_000_000) + b"\x7f" * 2_000_000 + b".",
    "a wide text": b"X" + struct.pack("<I", 4_000_000) + b"a" * 3_999_996 + "\U0001f600".encode() + b".",
    "a text longer than the file": b"X\xff\xff\xff\xff",
}


def measure(path: pathlib.Path) -> str:
    """Reads a file in a new process and checks the costs; returns the error message or the number of tensors."""
    command = [sys.executable, "-c", READER, str(PACKAGE / "models"), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, message = json.loads(done.stdout)
    assert peak < 3 * path.stat().st_size + 200e6, f"{peak / 1e6:.0f} MB: {message}"
    assert seconds < 10
    assert len(message) < 500 and "\n" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("write", ["zip", "legacy"])
@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
def test_a_hostile_pickle_is_cheap_to_refuse(tmp_path, data, write) -> None:
    path = tmp_path / "x.pt"
    data = b"\x80\x02" + data + b"."
    if write == "zip":
        write_zip_members(path, {"data.pkl": data})
    else:
        legacy = write_legacy(path, {}).read_bytes()
        head = legacy[: legacy.index(b"type_sizes")]
        path.write_bytes(legacy[: legacy.index(b".", len(head)) + 1] + data)
    assert not measure(path).isdigit()


@pytest.mark.parametrize(
    "name", ["encodes a memoized text again and again", "torch.Size of a list", "keys of one hash"]
)
def test_messages_about_hostile_pickles(tmp_path, name) -> None:
    said = {"e": "must not build more than", "t": "at most 32 integers", "k": "64-bit integers"}[name[0]]
    path = write_zip_members(tmp_path / "x.pt", {"data.pkl": b"\x80\x02" + PICKLES[name] + b"."})
    assert said in measure(path)


def test_copies_of_tensors_that_share_a_storage_are_limited(tmp_path) -> None:
    base = np.zeros(2**16, np.float32)
    storage = Storage(base)
    state = {str(n): tensor(base, storage=storage, shape=(256, 256), strides=(1, 256)) for n in range(500)}
    assert "must be copied" in measure(write_zip(tmp_path / "x.pt", state))


def test_a_directory_with_many_entries_is_not_read(tmp_path) -> None:
    path = tmp_path / "x.pt"
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *(0,) * 4, *(0,) * 4, *(0,) * 3, *(0,) * 5, 0, 0)
    count = 200_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, count * len(entry), 0, 0)
    path.write_bytes(entry * count + end)
    assert "directory" in measure(path)


def test_a_storage_with_many_keys_is_read_once(tmp_path) -> None:
    """Many members of an archive may refer to the same bytes, so that a small file seems to hold terabytes."""
    base = np.zeros(1000, np.float32)
    path = write_zip(tmp_path / "x.pt", {str(n): tensor(base, storage=Storage(base)) for n in range(3)})
    data = path.read_bytes()
    places = [data.index(b"PK\x03\x04", data.index(b"archive/data/%d" % n) - 30) for n in range(3)]
    for n in (1, 2):
        data = data.replace(
            struct.pack("<L", places[n]) + b"archive/data/%d" % n, struct.pack("<L", places[0]) + b"archive/data/%d" % n
        )
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_reference_checkpoint(path)


# .safetensors -----------------------------------------------------------------------------------------------------


def write_safetensors(path: pathlib.Path, header: object, data: bytes) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_safetensors(tmp_path) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1.5, -2], np.float16)
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F16", [2], 24, 28),
        "a": entry("F32", [2, 3], 0, 24),
        "brain": entry("BF16", [1], 28, 30),
        "number": entry("I64", [], 30, 38),
        "module.attacker.a": entry("BOOL", [1], 38, 39),
    }
    data = first.tobytes() + second.tobytes() + b"\xc0\x3f" + struct.pack("<q", -7) + b"\x01"
    checkpoint = read_reference_checkpoint(write_safetensors(tmp_path / "x.safetensors", header, data))
    assert checkpoint.container == "safetensors" and list(checkpoint.state) == ["a", "b", "brain", "number"]
    np.testing.assert_array_equal(checkpoint.state["a"], first)
    np.testing.assert_array_equal(checkpoint.state["b"], second)
    assert float(checkpoint.state["brain"][0]) == 1.5 and int(checkpoint.state["number"]) == -7


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "without gaps or overlaps"),
        ({"a": entry("F32", [1], 4, 8)}, "without gaps or overlaps"),
        ({"a": entry("F32", [3], 0, 12)}, "without gaps or overlaps"),
        ({"a": entry("F32", [1], 0, 4)}, "must end with its last tensor"),
        ({"a": entry("F32", [1], 0, 8)}, "must take 4 bytes. Received: [0, 8]"),
        ({"a": entry("F32", [2**62, 2**62], 0, 8)}, "must take"),
        ({"a": entry("F32", [-2], 8, 0)}, "must be lists of integers of at least 0"),
        ({"a": entry("F32", [True, 2], 0, 8)}, "must be lists of integers of at least 0"),
        ({"a": entry("F32", [1] * 33, 0, 4)}, "must be lists of integers of at least 0"),
        ({"a": entry("F8_E4M3", [8], 0, 8)}, "dtype"),
        ({"a": 3}, "dtype"),
        ({"a" * 5000: entry("F8", [8], 0, 8)}, "dtype"),
        (b'{"a": 1, "a": 2}', "must be unique"),
        (b"{" + b'"a":[' * 100_000, "must be JSON"),
        (b"{nonsense", "must be JSON"),
    ],
)
def test_invalid_safetensors_are_refused(tmp_path, header, said) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(UserError) as caught:
        read_reference_checkpoint(path)
    assert said in str(caught.value) and len(str(caught.value)) < 500


def test_a_safetensors_header_must_be_short(tmp_path) -> None:
    for header in (b"{" + b'"a":[' + b"[]," * 2_000_000, b"{"):
        path = write_safetensors(tmp_path / "x.safetensors", header, b"")
        path.write_bytes(struct.pack("<Q", max(len(header), 100)) + path.read_bytes()[8:])
        assert "header" in measure(path)
