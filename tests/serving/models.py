r"""Small SavedModels for the tests: half_plus_two, as in TensorFlow Serving's own tests, an echo and a classifier.

    python -m tests.serving.models FOLDER

This writes all three and their config files, for any server. With these two variables, the tests use that server, too:

    tensorflow_model_server --port=8500 --rest_api_port=8501 --model_config_file=FOLDER/models.config \
      --monitoring_config_file=FOLDER/monitoring.config
    TF_SERVING_REST_URL=http://localhost:8501 TF_SERVING_GRPC_TARGET=localhost:8500 python -m pytest tests/serving
"""

import pathlib
import sys

import keras
import tensorflow as tf

from robust_tf.models import build_classifier
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.probe import AttackProbe

LABELS = ["zero", "one", "two", "three", "four"]


def save_half_plus_two(path: pathlib.Path, *, addend: float = 2.0) -> None:
    """Saves y = 0.5 x + addend for x of any shape, with signatures for predict, classify and regress."""

    def regress_signature(feature: str, extra: float) -> tf.types.experimental.PolymorphicFunction:
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
        def regress(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            parsed = tf.io.parse_example(inputs, {feature: tf.io.FixedLenFeature([1], tf.float32)})
            return {"outputs": module.half * parsed[feature] + extra}

        return regress

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def serving_default(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": module.half * x + addend}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        parsed = tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([1], tf.float32)})
        return {"scores": module.half * parsed["x"] + addend}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classes_only(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"classes": tf.fill([tf.size(inputs), 2], "cat")}

    module = tf.Module()
    module.half = tf.Variable(0.5)
    signatures = {
        "serving_default": serving_default,
        "classify_x_to_y": classify,
        "classes_only": classes_only,
        "regress_x_to_y": regress_signature("x", 2.0),
        "regress_x_to_y2": regress_signature("x", 3.0),
        "regress_x2_to_y3": regress_signature("x2", 3.0),
    }
    tf.saved_model.save(module, str(path), signatures=signatures)


_ECHO_TYPES = {
    "float32": tf.float32,
    "int32": tf.int32,
    "int64": tf.int64,
    "uint8": tf.uint8,
    "bool": tf.bool,
    "string": tf.string,
    "half": tf.float16,
}


def save_echo(path: pathlib.Path) -> None:
    """Saves signatures that return their inputs: `echo_<type>` (x -> y), `echo_bytes` (x -> y_bytes), `pair` (a, b).

    Another signature, `endless` (x -> y), runs until it is cancelled.
    """

    def echo(dtype: tf.DType, output: str) -> tf.types.experimental.PolymorphicFunction:
        @tf.function(input_signature=[tf.TensorSpec(None, dtype, name="x")])
        def function(x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {output: tf.identity(x)}

        return function

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="a"), tf.TensorSpec(None, tf.string, name="b")])
    def pair(a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"a": tf.identity(a), "b": tf.identity(b)}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def endless(x: tf.Tensor) -> dict[str, tf.Tensor]:
        number = tf.while_loop(lambda i: i >= 0, lambda i: [(i + 1) % 7], [tf.constant(0)])[0]
        return {"y": x + tf.cast(number, tf.float32)}

    signatures = {f"echo_{name}": echo(dtype, "y") for name, dtype in _ECHO_TYPES.items()}
    signatures |= {"echo_bytes": echo(tf.string, "y_bytes"), "pair": pair, "endless": endless}
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures)


def save_gate(path: pathlib.Path) -> None:
    """Saves y = x, which is computed only when somebody reads from the named pipes `entrance` and then `exit`."""

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.float32, name="x"),
            tf.TensorSpec([None], tf.string, name="entrance"),
            tf.TensorSpec([None], tf.string, name="exit"),
        ]
    )
    def serving_default(x: tf.Tensor, entrance: tf.Tensor, exit: tf.Tensor) -> dict[str, tf.Tensor]:
        tf.io.write_file(entrance[0], "!")
        tf.io.write_file(exit[0], "!")
        return {"y": tf.identity(x)}

    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": serving_default})


def small_classifier() -> keras.Model:
    """Returns a resnet20 for 16x16 images. Its head is replaced, as logits of an untrained head hardly differ."""
    keras.utils.set_random_seed(0)
    model = build_classifier("resnet20", 5, image_size=16, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    for weight in model.get_layer("logits").weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=1))
    return model


def export_small_classifier(classifier: keras.Model, export_dir: pathlib.Path) -> pathlib.Path:
    """Exports the classifier as the model "digits", with an attack probe, and returns its version folder."""
    return export_classifier(
        classifier,
        export_dir,
        "digits",
        labels=LABELS,
        resize_size=20,
        model_card={"dataset": "digits"},
        attack_probe=AttackProbe(norm="l2", steps=3, epsilon=0.5),
    )


def write_config(
    folder: pathlib.Path, bases: dict[str, pathlib.Path], *, logs: pathlib.Path | None = None
) -> dict[str, str]:
    """Writes config files for these models, and returns their paths by flag. `logs` is a folder for request logs."""
    label = {"half_plus_two": 'version_labels { key: "stable" value: 123 }'}
    logging = {name: logging_entry(logs / name) if logs else "" for name in bases}
    entries = "".join(model_entry(name, base, label.get(name, "") + logging[name]) for name, base in bases.items())
    (folder / "models.config").write_text("model_config_list {\n" + entries + "}\n")
    (folder / "monitoring.config").write_text("prometheus_config { enable: true }\n")
    return {
        "model_config_file": str(folder / "models.config"),
        "monitoring_config_file": str(folder / "monitoring.config"),
    }


def model_entry(name: str, base_path: pathlib.Path, more: str = "") -> str:
    """Returns the entry of one model in a ModelServerConfig."""
    return f'config {{ name: "{name}" base_path: "{base_path}" model_platform: "tensorflow" {more} }}\n'


def logging_entry(prefix: pathlib.Path | str, rate: float = 1.0, kind: str = 'type: "tfrecord"') -> str:
    """Returns the entry in a model's config that logs a share of its requests to files with this prefix."""
    return (
        f'logging_config {{ log_collector_config {{ {kind} filename_prefix: "{prefix}" }} '
        f"sampling_config {{ sampling_rate: {rate} }} }}"
    )


def write_all(folder: pathlib.Path, *, logs: pathlib.Path | None = None) -> dict[str, str]:
    """Writes all three models into a new folder, and returns the paths of their config files by flag."""
    save_half_plus_two(folder / "half_plus_two" / "00000123")
    save_echo(folder / "echo" / "1")
    export_small_classifier(small_classifier(), folder)
    return write_config(folder, {name: folder / name for name in ("half_plus_two", "echo", "digits")}, logs=logs)


if __name__ == "__main__":
    print(write_all(pathlib.Path(sys.argv[1]).absolute()))
