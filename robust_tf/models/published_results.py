"""What is known of the training of a published model, in the form in which a training job describes its classifier."""

from robust_tf.data.tfds_records import class_names_of
from robust_tf.models.published import PUBLISHED
from robust_tf.results import JobResults, MeasuredAttack

_DATASETS = {"imagenet": "imagenet2012", "fashion_mnist": "fashion_mnist"}  # names in TFDS


def published_results(name: str) -> JobResults:
    """Returns the data set of a published model, the names of its classes, and the attack in its training.

    The names are those of TFDS. For ImageNet they are WordNet's, such as "n01440764".

    Args:
        name: Name in `PUBLISHED`.
    """
    model = PUBLISHED[name]
    dataset = _DATASETS[model.dataset]
    return JobResults(
        dataset=dataset,
        class_names=class_names_of(dataset),
        robust_accuracy_attack=MeasuredAttack(norm=model.norm, epsilon=model.epsilon) if model.epsilon else None,
    )
