"""Fixtures for all tests, a fresh Keras state for each test, and a check that the tests leave no temporary files."""

import contextlib
import ctypes
import gc
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.python.framework import config as tf_config  # noqa: E402  # there is no public function for it

# Entries that are removed only when their process ends, by `robust_tf.files.temporary_cache` and by AutoGraph, whose
# files may also have been compiled.
_REMOVED_AT_EXIT = ("robust_tf-", "__autograph_generated_file", "__pycache__")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests, and every process that they start, a temporary folder for `pytest_sessionfinish` to check."""
    # pytest keeps its own folders (`tmp_path`) in the usual place. The workers of pytest-xdist share one folder.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    if not hasattr(config, "workerinput"):
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="robust_tf-tests-")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run if a test has left something in the temporary folder."""
    if hasattr(session.config, "workerinput"):
        return
    folder = pathlib.Path(tempfile.gettempdir())
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_REMOVED_AT_EXIT))
    shutil.rmtree(folder, ignore_errors=True)
    if left:
        print(f"\nERROR: The tests left {len(left)} entries in the temporary folder: {', '.join(left[:20])}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Sets the seed for each test, and resets the global settings and the layer names after it."""
    keras.utils.set_random_seed(0)
    # TF32 would hide on a GPU whether results equal a reference. The variable NVIDIA_TF32_OVERRIDE does not reach XLA.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    keras.config.set_dtype_policy("float32")
    tf_config.disable_op_determinism()  # otherwise Keras does not compile with XLA
    # Collecting garbage after each of a thousand tests would take longer than the tests.
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True, scope="module")
def _free_memory():
    """Collects garbage, such as models, after each file."""
    yield
    gc.collect()
    # Without this, glibc keeps what large models have used, and two workers came to 22 GB in the slow tests.
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A TFDS folder that contains the prepared digits."""
    from robust_tf.data.tfds_preparation import prepared_builder

    folder = tmp_path_factory.mktemp("tfds")
    prepared_builder("digits", folder)
    return folder


@pytest.fixture
def mocked_tfds() -> Callable[..., AbstractContextManager[None]]:
    """`tfds.testing.mock_data`, which replaces a download with random images of the right shape."""
    import tensorflow_datasets as tfds

    return tfds.testing.mock_data


@pytest.fixture
def browser(_chromium):
    """Headless Chromium under Selenium with an empty page, and a log of the messages in its console since then."""
    # The page of an earlier test goes on asking its server, which has stopped, and would fill the log with errors.
    _chromium.get("about:blank")
    _chromium.get_log("browser")
    return _chromium


@pytest.fixture(scope="session")
def _chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="browser-") as folder:  # for files that Chromium leaves behind
        service = webdriver.ChromeService(driver, env={**os.environ, "TMPDIR": folder})
        opened = webdriver.Chrome(options=options, service=service)
        yield opened
        opened.quit()
