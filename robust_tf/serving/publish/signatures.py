"""The functions that TensorFlow Serving calls: one signature for each kind of request.

TensorFlow Serving compares the names of inputs with the signature, but not their shapes. A request without the batch
dimension can therefore abort the whole server process inside a kernel. Every signature starts with `tf.ensure_shape`,
which turns such a request into an error reply.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from robust_tf.data.transforms import AS_STORED, Decoding, decode, evaluation_transform
from robust_tf.models import features_of
from robust_tf.serving.publish.probe import AttackProbe, run_probe
from robust_tf.serving.wire.names import PROBE_SIGNATURE

TOP_K = 5  # largest number of class names in a reply

# Without limits, an image file of a few kilobytes could fill the server's memory when it is decoded and resized.
_MAX_PIXELS = 50_000_000
_MAX_SIDE_RATIO = 20

# How far outside [0, 1] pixels may lie. A cubic resize overshoots by less than this; pixels in other ranges (0 to 255,
# -1 to 1) exceed it.
_PIXEL_TOLERANCE = 0.05


def decode_images(
    image_bytes: tf.Tensor, *, image_size: int, resize_size: int, decoding: Decoding = AS_STORED
) -> tf.Tensor:
    """Decodes and crops images as in the evaluation of the classifier.

    Args:
        image_bytes: Encoded images of any size, (batch,) string: JPEG, PNG, GIF (first frame), BMP or WebP. Gray
            images become RGB.
        image_size: Side of the images to return, in pixels.
        resize_size: Length in pixels to which the shorter side is resized before the center crop.
        decoding: How EXIF rotation and transparency are treated, as in training.

    Returns:
        Images, (batch, image_size, image_size, 3) float32 in [0, 1].
    """

    def prepare(encoded: tf.Tensor) -> tf.Tensor:
        image = decode_limited(encoded, decoding)
        return evaluation_transform(image, image_size=image_size, resize_size=resize_size)

    return tf.map_fn(prepare, image_bytes, fn_output_signature=tf.TensorSpec([image_size, image_size, 3], tf.float32))


def decode_limited(encoded: tf.Tensor, decoding: Decoding) -> tf.Tensor:
    """Decodes an image, and refuses it if it would take too much memory.

    Args:
        encoded: Encoded image, a scalar string: JPEG, PNG, GIF (first frame), BMP or WebP.
        decoding: How EXIF rotation and transparency are treated, as in training.

    Returns:
        Image, (height, width, 3) uint8. The run fails with INVALID_ARGUMENT if the image is refused.
    """
    image = decode(encoded, decoding)
    size = tf.shape(image, out_type=tf.int64)[:2]
    checks = [
        tf.debugging.assert_less_equal(
            tf.reduce_prod(size),
            tf.constant(_MAX_PIXELS, tf.int64),
            f"An image must have at most {_MAX_PIXELS} pixels.",
        ),
        tf.debugging.assert_less_equal(
            tf.reduce_max(size),
            _MAX_SIDE_RATIO * tf.reduce_min(size),
            f"An image must be at most {_MAX_SIDE_RATIO} times as long as it is wide.",
        ),
    ]
    with tf.control_dependencies(checks):
        return tf.identity(image)


def build_signatures(
    classifier: keras.Model,
    *,
    labels: Sequence[str],
    resize_size: int,
    decoding: Decoding = AS_STORED,
    attack_probe: AttackProbe | None = None,
) -> dict[str, Callable[..., dict[str, tf.Tensor]]]:
    """Returns the serving functions of a classifier, by signature name, ready for `tf.saved_model.save`.

    Every input and output has a fixed name, and the batch may have any size. Inputs and outputs are float32, int64,
    string or (in `predict_uint8` only) uint8, because TensorFlow Serving's REST interface cannot carry half precision.

        serving_default  image_bytes (batch,) string           -> probabilities, logits, classes, top_k
        predict_pixels   images (batch, H, W, 3) float32, [0, 1] -> the same
        predict_uint8    images (batch, H, W, 3) uint8           -> the same
        features         images (batch, H, W, 3) float32, [0, 1] -> features (batch, feature_dim), see `features_of`
        classify         inputs (batch,) serialized tf.Example with `image/encoded` -> classes, scores
        preview          image_bytes (batch,) string           -> preview_image_bytes (batch,) string, PNG
        attack_probe     image_bytes, label, epsilon (batch,) each -> see below; only if `attack_probe` is given

    `preview` shows an encoded image as the classifier sees it: decoded, resized and cropped.
    `probabilities` and `logits` are (batch, classes) in the order of the labels. `top_k` holds the indices of the k
    most probable classes, int64, the most probable first, and `classes` holds their names. `attack_probe` takes a class
    index as `label`, where -1 stands for the predicted class. It answers with `robust` (1 or 0), `margin` (logit of the
    label minus the largest other logit, at the worst point found), `adversarial_class`, `adversarial_probabilities`,
    and two PNG pictures of the size that the classifier sees, `clean_image_bytes` and `adversarial_image_bytes`.

    Args:
        classifier: Model from images, (batch, height, width, 3) float32 in [0, 1], to logits, as `plain_classifier`
            returns it.
        labels: Names of the classes in the order of the logits.
        resize_size: Length in pixels to which the shorter side of an encoded image is resized.
        decoding: How EXIF rotation and transparency of encoded images are treated, as in training.
        attack_probe: Attack to serve in addition to the predictions. None serves no attack.
    """
    _, height, width, channels = classifier.input_shape
    image_shape = [None, height, width, channels]
    pixels = tf.TensorSpec(image_shape, tf.float32, name="images")
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    feature_model = features_of(classifier)
    names = tf.constant(list(labels))
    top_k = min(TOP_K, len(labels))

    def images_of(image_bytes: tf.Tensor) -> tf.Tensor:
        return decode_images(image_bytes, image_size=height, resize_size=resize_size, decoding=decoding)

    def logits_of(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(classifier(images, training=False), tf.float32)

    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = logits_of(images)
        probabilities = tf.nn.softmax(logits)
        best = tf.math.top_k(probabilities, top_k).indices
        return {
            "probabilities": probabilities,
            "logits": logits,
            "classes": tf.gather(names, best),
            "top_k": tf.cast(best, tf.int64),
        }

    @tf.function(input_signature=[encoded])
    def serving_default(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(images_of(tf.ensure_shape(image_bytes, [None])))

    @tf.function(input_signature=[pixels])
    def predict_pixels(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(checked_pixels(tf.ensure_shape(images, image_shape)))

    @tf.function(input_signature=[tf.TensorSpec(image_shape, tf.uint8, name="images")])
    def predict_uint8(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(tf.cast(tf.ensure_shape(images, image_shape), tf.float32) / 255.0)

    @tf.function(input_signature=[pixels])
    def features(images: tf.Tensor) -> dict[str, tf.Tensor]:
        values = feature_model(checked_pixels(tf.ensure_shape(images, image_shape)), training=False)
        return {"features": tf.cast(values, tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        examples = tf.io.parse_example(
            tf.ensure_shape(inputs, [None]), {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
        )
        best = tf.math.top_k(tf.nn.softmax(logits_of(images_of(examples["image/encoded"]))), top_k)
        # TensorFlow Serving's Classify accepts no other names than these two.
        return {"classes": tf.gather(names, best.indices), "scores": best.values}

    @tf.function(input_signature=[encoded])
    def preview(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"preview_image_bytes": encode_png(images_of(tf.ensure_shape(image_bytes, [None])))}

    signatures = {
        "serving_default": serving_default,
        "predict_pixels": predict_pixels,
        "predict_uint8": predict_uint8,
        "features": features,
        "classify": classify,
        "preview": preview,
    }
    if attack_probe is None:
        return signatures

    @tf.function(
        input_signature=[
            encoded,
            tf.TensorSpec([None], tf.int64, name="label"),
            tf.TensorSpec([None], tf.float32, name="epsilon"),
        ]
    )
    def probe(image_bytes: tf.Tensor, label: tf.Tensor, epsilon: tf.Tensor) -> dict[str, tf.Tensor]:
        label, epsilon = tf.ensure_shape(label, [None]), tf.ensure_shape(epsilon, [None])
        checks = [
            tf.debugging.assert_greater_equal(label, tf.constant(-1, tf.int64), "label must be a class index, or -1."),
            tf.debugging.assert_less(label, tf.constant(len(labels), tf.int64), "label must be a class index, or -1."),
            tf.debugging.assert_greater_equal(epsilon, 0.0, "epsilon must be at least 0."),
            tf.debugging.assert_all_finite(epsilon, "epsilon must be finite."),
        ]
        with tf.control_dependencies(checks):
            images = images_of(tf.ensure_shape(image_bytes, [None]))
            label = tf.where(label < 0, tf.argmax(logits_of(images), axis=-1), label)
        worst = run_probe(logits_of, images, label, epsilon, probe=attack_probe)
        return {
            "robust": tf.cast(worst.margin > 0, tf.int64),
            "margin": worst.margin,
            "adversarial_class": tf.gather(names, tf.argmax(worst.logits, axis=-1)),
            "adversarial_probabilities": tf.nn.softmax(worst.logits),
            "clean_image_bytes": encode_png(images),
            "adversarial_image_bytes": encode_png(worst.images_adv),
        }

    return signatures | {PROBE_SIGNATURE: probe}


def checked_pixels(images: tf.Tensor) -> tf.Tensor:
    """Returns the images unchanged. Pixels clearly outside [0, 1], or NaN, make the run fail with INVALID_ARGUMENT.

    Args:
        images: Images (batch, height, width, 3) float32.
    """
    low, high = tf.reduce_min(images), tf.reduce_max(images)
    check = tf.debugging.Assert(  # this fails for NaN too, because any comparison with NaN is false
        tf.reduce_all((images >= -_PIXEL_TOLERANCE) & (images <= 1.0 + _PIXEL_TOLERANCE)),
        ["Pixels must be in [0, 1]. Received: from", low, "to", high],
    )
    with tf.control_dependencies([check]):
        return tf.identity(images)


def encode_png(images: tf.Tensor) -> tf.Tensor:
    """Encodes images as PNG.

    Args:
        images: Images (batch, height, width, 3) float32 in [0, 1].

    Returns:
        Encoded images, (batch,) string.
    """
    as_uint8 = tf.cast(tf.round(tf.clip_by_value(images, 0.0, 1.0) * 255.0), tf.uint8)
    return tf.map_fn(tf.io.encode_png, as_uint8, fn_output_signature=tf.TensorSpec([], tf.string))
