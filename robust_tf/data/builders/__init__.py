"""TFDS builders of data sets that TFDS lacks, or splits differently than the paper.

To add one, copy the most similar module and list its class in `OWN_BUILDERS`; `robust_tf.data.datasets` says what else
to do. A builder for photographs inherits from `ImageBuilder`, which needs only the list of files and their classes.
"""

import tensorflow_datasets as tfds

from robust_tf.data.builders.aircraft import FgvcAircraft
from robust_tf.data.builders.birdsnap import Birdsnap
from robust_tf.data.builders.caltech import Caltech101Numbered, Caltech256
from robust_tf.data.builders.cars import StanfordCars
from robust_tf.data.builders.digits import Digits
from robust_tf.data.builders.sun397 import Sun397Original

OWN_BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    builder.name: builder
    for builder in (Birdsnap, Caltech101Numbered, Caltech256, Digits, FgvcAircraft, StanfordCars, Sun397Original)
}

__all__ = ["OWN_BUILDERS"]
