"""The table of data sets: it is complete and agrees with TFDS."""

import numpy as np
import pytest

import robust_tf.data
from robust_tf.data import DATASETS, dataset_info
from robust_tf.data.builders import OWN_BUILDERS
from robust_tf.data.tfds_preparation import builder_of
from robust_tf.errors import UserError
from tests.tasks import make_task

TWELVE = "aircraft birdsnap caltech101 caltech256 cifar10 cifar100 dtd flowers food pets cars sun397".split()
FROM_TFDS = [name for name in DATASETS if builder_of(name).name not in OWN_BUILDERS]
OTHERS = {"imagenet2012", "fashion_mnist", "digits"}
PER_CLASS = {"caltech101", "caltech256", "flowers", "pets"}
# The paper's code does not normalize these.
NOT_NORMALIZED = set(TWELVE) - {"cifar10", "cifar100"}


def test_every_public_name_can_be_imported():
    """The package imports them on first use."""
    for name in robust_tf.data.__all__:
        assert getattr(robust_tf.data, name) is not None
        assert name in dir(robust_tf.data)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        robust_tf.data.load  # noqa: B018


def test_the_table_has_the_twelve_tasks_of_the_paper_and_the_others():
    assert set(DATASETS) == {*TWELVE, *OTHERS}


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_is_filled_in(name):
    info = DATASETS[name]
    assert info.license and info.homepage.startswith("http") and info.num_classes
    assert info.download_size or name == "digits"
    assert (info.num_train and info.num_test) or name == "birdsnap"
    assert info.metric == ("mean_per_class_accuracy" if name in PER_CLASS else "accuracy")
    assert (info.mean == (0.0, 0.0, 0.0)) == (name in NOT_NORMALIZED)


@pytest.mark.parametrize("name", DATASETS)
def test_the_version_of_every_row_exists(name, tmp_path):
    info, builder = DATASETS[name], builder_of(name, tmp_path)
    assert str(builder.version) == info.builder.partition(":")[2]
    assert builder.name in OWN_BUILDERS or builder.info.features["label"].num_classes == info.num_classes


@pytest.mark.parametrize("name", FROM_TFDS)
def test_every_data_set_of_tfds_can_be_loaded(name, mocked_tfds):
    """The images are random, with the shape and the labels of the real ones."""
    with mocked_tfds(num_examples=20):
        task = make_task(name, batch_size=4, image_size=32)
        images, labels = next(task.train(first_epoch=0, epochs=1).as_numpy_iterator())
    assert len(task.class_names) == DATASETS[name].num_classes
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.float32
    assert (labels >= 0).all() and (labels < len(task.class_names)).all()


def test_eight_rows_come_from_tfds():
    eight = {"cifar10", "cifar100", "dtd", "flowers", "food", "pets", "imagenet2012", "fashion_mnist"}
    assert set(FROM_TFDS) == eight


@pytest.mark.parametrize("name", ["tfds:eurosat", "folder:/photos"])
def test_other_data_sets_get_the_papers_recipe(name):
    info = dataset_info(name)
    assert (info.image_size, info.resize_size, info.augmentation) == (224, 256, "random_resized_crop")
    assert info.mean == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pet", "Received: 'pet'. Did you mean 'pets'"),
        ("folder:", "Received: 'folder:'"),
        ("tfds:eurosatt", "Received: 'eurosatt'. Did you mean 'eurosat'"),
        ("tfds:eurosat/foo", "Received: 'tfds:eurosat/foo'"),
        ("tfds:eurosat:9.9.9", "9.9.9"),
        ("tfds:../etc", "Received: 'tfds:../etc'"),
        ("folder:/nowhere/at/all", "Received: /nowhere/at/all"),
    ],
)
def test_unknown_names_are_refused_with_their_value(name, message, tmp_path):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_task(name, batch_size=4, data_dir=tmp_path)
