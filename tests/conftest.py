"""What all tests share: quiet TensorFlow, markers, a clean Keras after each test, the digits prepared once."""

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
from tensorflow.python.framework import config as tf_config  # noqa: E402  # there is no public way back

# What is removed only when the process ends: `robust_tf.files.temporary_cache`, and TensorFlow's autograph.
_REMOVED_AT_EXIT = ("robust_tf-", "__autograph_generated_file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out by README's command (-m 'not slow'); runs in CI")
    config.addinivalue_line("markers", "bench: compares speeds; runs alone with -m bench, on a quiet machine")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning")
    # The temporary folder of the tests, and of every process that they start, for `pytest_sessionfinish` to look into.
    # pytest keeps its own folders (`tmp_path`) where they always are. The workers of pytest-xdist share one folder.
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the benchmarks out unless they are asked for."""
    if "bench" in (config.option.markexpr or ""):
        return
    benches = [item for item in items if item.get_closest_marker("bench")]
    config.hook.pytest_deselected(items=benches)
    items[:] = [item for item in items if item not in benches]


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Seeds each test, and undoes the global settings and the layer names that it leaves behind."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    tf_config.disable_op_determinism()  # which also keeps Keras from compiling with XLA
    # Without its collection of garbage: after each of a thousand tests that takes longer than the tests.
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True, scope="module")
def _free_memory():
    """Collects the models of a whole file."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A TFDS folder in which the digits are prepared."""
    from robust_tf.data.tfds_preparation import prepared_builder

    folder = tmp_path_factory.mktemp("tfds")
    prepared_builder("digits", folder)
    return folder


@pytest.fixture
def mocked_tfds() -> Callable[..., AbstractContextManager[None]]:
    """`tfds.testing.mock_data`: random images of the right kind, as if they had been downloaded."""
    import tensorflow_datasets as tfds

    return tfds.testing.mock_data


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium under Selenium, which keeps the messages of its console."""
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
