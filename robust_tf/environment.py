"""Makes settings of TensorFlow and Keras that must be made before they are imported."""

import atexit
import contextlib
import faulthandler
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Literal

from absl import logging

from robust_tf.errors import UserError, exit_on_user_error, warn_user


def set_tensorflow_defaults(*, onednn: bool = True) -> None:
    """Sets environment variables that TensorFlow reads when it is imported, unless the user has set them.

    They turn oneDNN on for every x86 processor, and suppress messages less severe than errors. TensorFlow leaves oneDNN
    off on processors without AVX512-VNNI, where the gradients of convolutions then take about four times as long. On a
    machine without a GPU, TensorFlow would report the missing GPU at every start. On a GPU, BatchNorm in half precision
    uses cuDNN's kernels for channels_last; otherwise TensorFlow would transpose all activations before and after.

    If Keras is set to another backend, the program ends with one line on stderr.

    Args:
        onednn: Whether to turn oneDNN on. Programs that only copy weights turn it off, because its allocator never
            releases memory.
    """
    with exit_on_user_error():
        check_keras_backend()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", str(int(onednn)))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_USE_CUDNN_BATCHNORM_SPATIAL_PERSISTENT", "1")


Verbosity = Literal["error", "warning", "info"]
# The levels of each verbosity, for TensorFlow's C++ part and for its Python part.
_CPP_LEVELS = {"error": "3", "warning": "1", "info": "0"}
_PYTHON_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}
_verbosity: Verbosity = "error"


def set_verbosity(verbosity: Verbosity) -> None:
    """Chooses which messages of TensorFlow and of the other libraries a program lets through.

    Call it before `start_tensorflow`. It takes precedence over the environment variable TF_CPP_MIN_LOG_LEVEL.

    Args:
        verbosity: The least severe messages to show. "error" also hides what the libraries print while they load.
    """
    global _verbosity
    _verbosity = verbosity
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = _CPP_LEVELS[verbosity]


def start_tensorflow(*, onednn: bool = True) -> None:
    """Imports TensorFlow for a program, without the messages that it prints while it loads.

    Some of these messages ignore TF_CPP_MIN_LOG_LEVEL, because they are printed before logging is set up. They report
    that there is no GPU, or that a library was registered twice. Call this before you import other modules that need
    TensorFlow.

    Args:
        onednn: Passed to `set_tensorflow_defaults`.
    """
    set_tensorflow_defaults(onednn=onednn)
    is_quiet = os.environ["TF_CPP_MIN_LOG_LEVEL"] >= "3" and "tensorflow" not in sys.modules
    with _stderr_held_back() if is_quiet else contextlib.nullcontext():
        tensorflow = importlib.import_module("tensorflow")
    logging.set_verbosity(_PYTHON_LEVELS[_verbosity])
    tensorflow.get_logger().setLevel(_verbosity.upper())


_XLA_CACHE_BYTES = 2 * 2**30  # the newest programs are kept, up to this size in total
_XLA_CACHE_FREE_BYTES = 2**30  # TensorFlow fails if the disk is full when it saves a program
_XLA_CACHE_FLAG = "--tf_xla_persistent_cache_directory"


def use_xla_cache(folder: pathlib.Path, *, deterministic: bool = False, tf32: bool = True) -> None:
    """Lets TensorFlow keep what XLA compiles in a folder, so that the next process need not compile it again.

    Call it before `start_tensorflow`, and `seal_xla_cache` once a program has been compiled. It does nothing if
    TensorFlow is already imported, if the user's TF_XLA_FLAGS choose a folder, or if the disk is almost full.

    TensorFlow fails on a damaged file, and does not check for which machine and settings it was compiled. So every file
    has a SHA-256 next to it, files that do not match theirs are removed, and each combination of machine, versions and
    settings has its own subfolder.

    Args:
        folder: Cache folder, as `robust_tf.files.cache_folder` returns it. The programs go into its subfolder "xla".
        deterministic: Whether the process asks for deterministic kernels.
        tf32: Whether the process allows TF32.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if "tensorflow" in sys.modules or (flags and not flags.startswith("-")):  # or else the name of a file of flags
        return
    programs = folder.absolute() / "xla" / _xla_identity(deterministic=deterministic, tf32=tf32)
    flag = f'{_XLA_CACHE_FLAG}="{programs}"'
    flags = flags.replace(flag, "").strip()  # set by this process before it restarted itself
    if _XLA_CACHE_FLAG in flags or '"' in str(programs):
        return
    try:
        programs.mkdir(parents=True, exist_ok=True)
        _remove_damaged(programs)
        _remove_oldest(programs.parent)
        with tempfile.TemporaryFile(dir=programs):
            pass
        if shutil.disk_usage(programs).free < _XLA_CACHE_FREE_BYTES:
            return
    except OSError as error:
        warn_user(f"XLA's programs are not kept, so the next run compiles again: {error.strerror or error}, {programs}")
        return
    os.environ["TF_XLA_FLAGS"] = f"{flags} {flag}".strip()
    global _xla_programs
    _xla_programs = programs
    atexit.register(seal_xla_cache)


_xla_programs: pathlib.Path | None = None


def seal_xla_cache() -> int | None:
    """Writes the SHA-256 of every compiled program in the folder of `use_xla_cache` that has none yet.

    Without it the next process removes the program. At the end of a process this function runs by itself; call it when
    compiling has ended, so that a process that is killed does not lose its programs.

    Returns:
        Number of programs that were sealed, or None if no programs are kept.
    """
    if _xla_programs is None:
        return None
    sealed = 0
    with contextlib.suppress(OSError):
        for program in _xla_programs.glob("*.pb"):
            if not _seal(program).exists():
                _seal(program).write_text(_sha256(program), encoding="utf-8")
                sealed += 1
        _xla_programs.rmdir()  # succeeds only if XLA has compiled nothing
    return sealed


def _seal(program: pathlib.Path) -> pathlib.Path:
    return program.with_name(program.name + ".sha256")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_damaged(programs: pathlib.Path) -> None:
    for program in programs.glob("*.pb"):
        seal = _seal(program)
        if not seal.exists() or seal.read_text(encoding="utf-8", errors="replace") != _sha256(program):
            program.unlink(missing_ok=True)
            seal.unlink(missing_ok=True)


def _remove_oldest(folder: pathlib.Path) -> None:
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    total = 0
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime, reverse=True):
        total += stat.st_size
        if total > _XLA_CACHE_BYTES:
            path.unlink(missing_ok=True)


def _xla_identity(*, deterministic: bool, tf32: bool) -> str:
    """Returns a name that differs where a compiled program might not run, or might give other results."""
    parts = [f"deterministic={deterministic} tf32={tf32}"]
    parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES")]
    # The processor and the GPUs; the files are missing on other systems than Linux, and without a GPU.
    parts += _lines(pathlib.Path("/proc/cpuinfo"), ("model name", "flags", "Features", "CPU part"))
    parts += _lines(pathlib.Path("/proc/driver/nvidia/version"), ("NVRM version",))
    for gpu in sorted(pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information")):
        parts += _lines(gpu, ("Model",))
    versions = {"tensorflow", "nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-cuda-nvcc-cu12"}
    parts += [f"{name}={_version(name)}" for name in sorted(versions)]
    tensorflow = importlib.util.find_spec("tensorflow")
    if tensorflow is not None and tensorflow.origin:  # tells two builds of one version apart
        library = pathlib.Path(tensorflow.origin).with_name("libtensorflow_cc.so.2")
        parts.append(str(library.stat().st_size if library.exists() else 0))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _lines(path: pathlib.Path, starts: Iterable[str]) -> list[str]:
    """Returns the first line of a file that begins with each of the texts."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [next((line for line in lines if line.startswith(start)), "") for start in starts]


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Holds back what is written to file descriptor 2, even by C++, and shows it only if the block raises an error."""
    try:
        stderr = os.dup(2)
    except OSError:  # the program was started with stderr closed
        yield
        return
    with open(stderr, "wb", buffering=0) as shown, tempfile.TemporaryFile() as held_back:
        # A crash ends the process at once (TensorFlow aborts on a processor without AVX), so at least say where it was.
        says_where = not faulthandler.is_enabled()
        if says_where:
            faulthandler.enable(shown)
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            shown.write(held_back.read())
            raise
        finally:
            os.dup2(stderr, 2)
            if says_where:
                faulthandler.disable()


def check_keras_backend() -> None:
    """Refuses a Keras backend other than TensorFlow, without importing Keras.

    Raises:
        UserError: Keras uses another backend, or will use one once it is imported.
    """
    backend, origin = _keras_backend()
    if backend != "tensorflow":
        raise UserError(
            f"robust_tf needs Keras on TensorFlow. Received: the backend {backend!r} from {origin}. Set "
            "KERAS_BACKEND=tensorflow before you import Keras."
        )


def _keras_backend() -> tuple[str, str]:
    """Returns the backend that Keras uses, or will use once it is imported, and where this is set."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):  # missing while Keras itself is being imported
        return keras.config.backend(), "the Keras that is already imported"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "the environment variable KERAS_BACKEND"
    settings = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras") / "keras.json"
    try:
        return str(json.loads(settings.read_text(encoding="utf-8")).get("backend", "tensorflow")), str(settings)
    except (OSError, ValueError, AttributeError):  # Keras itself then uses its default
        return "tensorflow", "Keras's default"
