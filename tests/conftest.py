"""What all tests share: quiet TensorFlow, markers, a clean Keras after each test, the digits prepared once."""

import gc
import pathlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

from robust_tf.environment import set_tensorflow_defaults

set_tensorflow_defaults()

import keras  # noqa: E402
import pytest  # noqa: E402
from tensorflow.python.framework import config as tf_config  # noqa: E402  # there is no public way back


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
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
