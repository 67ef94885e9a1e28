"""results.json is one typed record: it survives being written and read, and hostile files are refused by name."""

import ast
import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_tf.config.data import DataConfig
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.evaluation import subject as subject_module
from robust_tf.flags import to_flag_file
from robust_tf.json_records import WrongValueError, from_json, to_json
from robust_tf.results import (
    FORMAT,
    AccuracyDifference,
    Comparison,
    DrawMeans,
    FeatureCache,
    JobResults,
    MeasuredAttack,
    Measures,
)
from robust_tf.statistics import Interval

PACKAGE = pathlib.Path(__file__).parents[1] / "robust_tf"
# Fields of `DataConfig` that do not change the test images, and those that every program sets itself.
OF_TRAINING = {"augmentation", "rand_augment", "mixing", "validation_fraction", "examples_per_class", "subset"}
OF_THE_RUN = {"data_dir", "cache", "cache_dir"}


def test_everything_that_decides_the_test_images_is_recorded_and_followed(monkeypatch, tmp_path):
    """Otherwise a new field of `DataConfig` would make the evaluation measure on other images."""
    deciding = {field.name for field in dataclasses.fields(DataConfig)} - OF_TRAINING - OF_THE_RUN
    missing = deciding - {field.name for field in dataclasses.fields(JobResults)}
    assert not missing, f"add {missing} to `JobResults` and `load_subject`, or to the sets above if it decides nothing"
    asked = {}

    class Enough(Exception):
        pass

    def recorded(data, *, batch_size):
        asked.update(dataclasses.asdict(data))
        raise Enough

    reading = {"exif": "apply", "alpha_background": "white"}
    config = JobConfig.from_flags(
        dataset="folder:/x", classes=(2, 0), downscale=9, split_seed=3, skip_bad_images=True, **reading
    )
    (tmp_path / "results.json").write_text(json.dumps({"flags": to_flag_file(config).splitlines(), "image_size": 8}))
    monkeypatch.setattr(subject_module, "load_task", recorded)
    monkeypatch.setattr(subject_module, "load_classifier", lambda path: type("C", (), {"input_shape": (None, 8, 8, 3)}))
    with pytest.raises(Enough):
        subject_module.load_subject(str(tmp_path / "classifier.keras"))
    expected = {"downscale": 9, "split_seed": 3, "skip_bad_images": True, "classes": (2, 0), "image_size": 8}
    assert expected.items() <= asked.items()
    assert reading.items() <= asked.items()
    with pytest.raises(Enough):
        subject_module.load_subject(str(tmp_path / "classifier.keras"), dataset="digits")
    # The classifier was made for reduced images; the split is of the other data set.
    assert (asked["downscale"], asked["split_seed"], asked["skip_bad_images"]) == (9, 0, False)


def test_values_come_from_the_keys_of_the_file_and_then_from_its_flags():
    record = JobResults.from_json(
        {
            "dataset": "digits",
            "classes": [3, 4],
            "class_names": ["three", "four"],
            "image_size": 16,
            "resize_size": 18,
            "downscale": None,
            "robust_accuracy_attack": {"norm": "l2", "epsilon": 0.5},
            "flags": ["--split_seed=7", "--downscale=4"],
        }
    )
    assert record == JobResults(
        dataset="digits",
        classes=(3, 4),
        class_names=("three", "four"),
        image_size=16,
        resize_size=18,
        downscale=None,
        split_seed=7,
        robust_accuracy_attack=MeasuredAttack(norm="l2", epsilon=0.5),
        flags=("--split_seed=7", "--downscale=4"),
    )
    assert JobResults.from_json({}) == JobResults()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dataset": 5}, "dataset=5"),
        ({"classes": "0,1"}, "classes='0,1'"),
        ({"classes": [0, "1"]}, "classes='1'"),
        ({"classes": [-1]}, "classes=-1"),
        ({"class_names": "ab"}, "class_names='ab'"),
        ({"downscale": "8"}, "downscale='8'"),
        ({"image_size": True}, "image_size=True"),
        ({"num_test_images": 3.0}, "num_test_images=3.0"),
        ({"exif": "turn"}, "exif='turn'"),
        ({"exif": ["apply"]}, r"exif=\['apply'\]"),
        ({"skip_bad_images": 1}, "skip_bad_images=1"),
        ({"clean_accuracy": True}, "clean_accuracy=True"),
        ({"clean_accuracy": math.nan}, "clean_accuracy=nan"),
        ({"validation_value": -math.inf}, "validation_value=-inf"),
        ({"seconds": 10**400}, "seconds=1000"),
        ({"clean_accuracy_interval": [0.1]}, r"clean_accuracy_interval=\[0.1\]"),
        ({"clean_accuracy_interval": [0.1, "1"]}, "clean_accuracy_interval='1'"),
        ({"robust_accuracy_attack": "pgd"}, "robust_accuracy_attack='pgd'"),
        ({"robust_accuracy_attack": {"norm": "l2", "epsilon": "1"}}, "robust_accuracy_attack.epsilon='1'"),
        ({"feature_cache": {"hits": "all"}}, "feature_cache.hits='all'"),
        ({"versions": {"keras": 3}}, "versions.keras=3"),
        ({"comparison": {"clean_accuracy": {"difference": 0.1}}}, "comparison.clean_accuracy.interval=None"),
        ({"baseline": []}, r"baseline=\[\]"),
        ({"baseline": {"baseline": {"seed": "0"}}}, "baseline.baseline.seed='0'"),
        ({"flags": ["--no_such_flag=1"]}, "flags that this version does not know: .*no_such_flag"),
        ({"flags": ["--help"]}, "flags that this version does not know: .*--help"),
        ({"flags": ["--flagfile=/dev/null"]}, "flags that this version does not know: .*--flagfile"),
        ({"baseline": {"flags": ["--epsilon=-1"]}}, "baseline.flags that this version does not know: .*-1"),
        ({"flags": 1}, "flags=1"),
        ({"flags": [1]}, r"flags=\[1\]"),
        ({"format": "1"}, "format='1'"),
        ({"format": True}, "format=True"),
        ({"format": 0}, "format=0"),
        ({"format": None}, "format=None"),
        ([1], "list"),
        (None, "NoneType"),
    ],
)
def test_a_value_of_another_type_is_named(content, message):
    with pytest.raises(UserError, match=f"R.json is not what a training job writes. Received: {message}"):
        JobResults.from_json(content, "R.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "list"),
        ("{", "JSONDecodeError"),
        ("\x00", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"baseline": ' * 900 + "{}" + "}" * 900, ".*maximum recursion depth"),
    ],
)
def test_a_file_that_is_not_an_object_is_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    assert JobResults.read(path) is None
    path.write_text(text)
    with pytest.raises(UserError, match=rf"results.json is not what a training job writes. Received: {message}"):
        JobResults.read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match="Received: IsADirectoryError"):
        JobResults.read(tmp_path / "results.json")
    (tmp_path / "latin.json").write_bytes(b'{"dataset": "\xe4"}')
    with pytest.raises(UserError, match="Received: UnicodeDecodeError"):
        JobResults.read(tmp_path / "latin.json")


def test_a_file_of_a_newer_format_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"R.json was written by a newer version .*Received: format=2\. Update robust_tf"
    ):
        JobResults.from_json({"format": FORMAT + 1, "dataset": 5}, "R.json")


def test_a_record_of_other_images_is_refused():
    record = JobResults(image_size=32)
    record.check_image_size(32, pathlib.Path("c.keras"))
    record.check_image_size(None, pathlib.Path("c.keras"))
    JobResults().check_image_size(32, pathlib.Path("c.keras"))
    with pytest.raises(
        UserError, match="c.keras, which takes images of 16 pixels a side, and a results.json that says 32"
    ):
        record.check_image_size(16, pathlib.Path("c.keras"))


def test_a_record_without_the_figures_of_a_finished_job_is_refused():
    with pytest.raises(UserError, match=r"Received: W/results.json without task, .*clean_accuracy, .*seed\. Choose"):
        JobResults().check_finished(pathlib.Path("W/results.json"))


TEXT = st.text(max_size=8)
COUNTS = st.integers(0, 10**9)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
# No such key of a record exists.
UNKNOWN = st.dictionaries(TEXT.map(lambda name: f"{name}!"), JSON, max_size=3)
INTERVALS = st.builds(Interval, NUMBERS, NUMBERS)
DIFFERENCES = st.builds(AccuracyDifference, NUMBERS, INTERVALS, NUMBERS, COUNTS, st.booleans())


def strategy_of(kind: typing.Any) -> st.SearchStrategy:
    """Returns values of the type of a field."""
    if kind == JobResults | None:
        return st.none() | st.builds(JobResults, seed=COUNTS, extra=UNKNOWN)
    if kind == MeasuredAttack | None:
        return st.none() | st.builds(MeasuredAttack, name=TEXT, epsilon=NUMBERS, steps=COUNTS, extra=UNKNOWN)
    if kind == Measures | None:
        figures = st.dictionaries(TEXT, NUMBERS, max_size=3)
        intervals = st.none() | INTERVALS
        measures = st.builds(Measures, value=NUMBERS, interval=intervals, others=figures, per_class=figures)
        return st.none() | measures
    if kind == FeatureCache | None:
        return st.none() | st.builds(FeatureCache, hits=COUNTS, seconds=NUMBERS, extra=UNKNOWN)
    if kind == DrawMeans | None:
        return st.none() | st.builds(DrawMeans, draws=COUNTS, clean_accuracy=NUMBERS, extra=UNKNOWN)
    if kind == Comparison | None:
        others = {name: st.none() | DIFFERENCES for name in ("mean_per_class_accuracy", "robust_accuracy")}
        return st.none() | st.builds(Comparison, clean_accuracy=DIFFERENCES, **others, extra=UNKNOWN)
    simple = {str: TEXT, int: COUNTS, float: NUMBERS, bool: st.booleans(), type(None): st.none(), Interval: INTERVALS}
    if kind in simple:
        return simple[kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(arguments)
    if typing.get_origin(kind) is tuple:
        return st.lists(simple[arguments[0]], max_size=3).map(tuple)
    if isinstance(kind, type(int | None)) or typing.get_origin(kind) is typing.Union:
        return st.one_of([strategy_of(each) for each in arguments])
    return st.dictionaries(TEXT, TEXT, max_size=3)  # versions


HINTS = typing.get_type_hints(JobResults)
FIELDS = {name: strategy_of(kind) for name, kind in HINTS.items() if name not in ("extra", "flags")}
FLAGS = st.sampled_from([(), ("--seed=3", "--epsilon=0.5"), ("--dataset=pets",)])


@settings(max_examples=40, deadline=None)
@given(st.builds(JobResults, **FIELDS, flags=FLAGS, extra=UNKNOWN))
def test_what_is_written_is_read_back(tmp_path_factory, results):
    """Unknown keys of the file and of its nested records are kept."""
    path = tmp_path_factory.getbasetemp() / "results.json"
    results.write(path)
    assert JobResults.read(path) == results
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT and content.items() >= results.extra.items()
    assert set(content) == {"format", *(set(HINTS) - {"extra"}), *results.extra}


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(HINTS)) | TEXT, JSON, max_size=6))
def test_any_json_object_is_read_or_refused_by_name(content):
    """What is read is written and read again without a change."""
    try:
        results = JobResults.from_json(content)
    except UserError as error:
        assert "Received: " in str(error)
        return
    again = JobResults.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results


def test_a_file_of_the_first_version_is_read_with_the_defaults():
    """It has no format, no name of the attack, and fewer keys; a key of a later version is kept."""
    first = {
        "task": "pretrain",
        "dataset": "digits",
        "classes": None,
        "clean_accuracy": 0.5,
        "clean_accuracy_interval": [0.4, 0.6],
        "robust_accuracy_attack": {"norm": "l2", "epsilon": 0.5, "step_size": 0.0625, "steps": 20},
        "flags": ["--seed=0"],
        "baseline": None,
        "later": {"than": ["this"]},
    }
    results = JobResults.from_json(first)
    assert (results.classes, results.exif, results.alpha_background, results.split_seed) == ((), "ignore", "none", 0)
    assert results.robust_accuracy_attack.in_words == "PGD-20 (highest-loss iterate), l2 0.5"
    written = results.to_json()
    assert written["format"] == FORMAT
    assert written.items() >= first.items()


@dataclasses.dataclass(frozen=True)
class Small:
    """A record that is not a `Record`."""

    needed: int
    usual: float = 1.0


def test_a_small_dataclass_drops_unknown_keys_and_names_missing_ones():
    assert from_json(Small, {"needed": 3, "more": 4}) == Small(3)
    assert to_json(Small(3)) == {"needed": 3, "usual": 1.0}
    with pytest.raises(WrongValueError, match="^a.needed=None$"):
        from_json(Small, {"usual": 2.0}, "a.")


def test_no_module_reads_results_by_string_keys():
    """A key that is mistyped, or missing in a file, would only be noticed when that line runs."""
    names = {"results", "baseline", "record", "job_results"}
    found = []
    for path, node in nodes():
        source = key = None
        if isinstance(node, ast.Subscript):
            source, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            source, key = node.func.value, node.args[0] if node.args else None
        name = source.attr if isinstance(source, ast.Attribute) else getattr(source, "id", None)
        is_text = isinstance(key, ast.JoinedStr) or isinstance(key, ast.Constant) and isinstance(key.value, str)
        if name in names and is_text:
            found.append(f"{path}:{node.lineno}")
    assert not found


def test_only_one_module_names_the_file():
    """All others read and write it through the record."""
    named = {path for path, node in nodes() if isinstance(node, ast.Constant) and node.value == "results.json"}
    assert named == {PACKAGE / "results.py"}


def nodes() -> Iterator[tuple[pathlib.Path, typing.Any]]:
    """Yields the syntax trees of the package, node by node."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node
