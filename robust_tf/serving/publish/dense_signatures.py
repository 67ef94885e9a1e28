"""The functions that TensorFlow Serving calls for a detector or a segmenter: one signature for each kind of request.

As in `robust_tf.serving.publish.signatures`, every signature starts with `tf.ensure_shape`, because TensorFlow Serving
itself does not check shapes.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from robust_tf.data.boxes.geometry import evaluation_view
from robust_tf.data.transforms import AS_STORED, Decoding
from robust_tf.serving.publish.signatures import checked_pixels, decode_limited
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, IMAGE_BYTES_SIGNATURE, MASK_OUTPUT, PREVIEW_SIGNATURE
from robust_tf.tasks.table import DENSE_TASKS, task_type_of

RAW_SIGNATURE = "raw_outputs"
PREVIEW_SIDE = 1024  # longest side of a preview in pixels, so that the preview of a photo stays below a few megabytes

Functions = dict[str, Callable[..., dict[str, tf.Tensor]]]


def build_dense_signatures(network: keras.Model, *, labels: Sequence[str], decoding: Decoding = AS_STORED) -> Functions:
    """Returns the serving functions of a detector or a segmenter, by signature name, for `tf.saved_model.save`.

    Every input and output has a fixed name and begins with the batch, which may have any size.

        serving_default  images (batch, size, size, 3) float32, [0, 1] -> see below, in pixels of the square
        image_bytes      image_bytes (batch,) string                   -> see below, in pixels of the encoded image
        raw_outputs      images (batch, size, size, 3) float32, [0, 1] -> the outputs of the network, float32
        preview          image_bytes (batch,) string                   -> preview_image_bytes (batch,) string, PNG

    A detector answers with its detections by descending score, padded to 100. `boxes` is (batch, 100, 4) float32 [top,
    left, bottom, right] in pixels, `scores` is (batch, 100) float32, `classes` is (batch, 100) int64 with -1 in the
    padding, `labels` is (batch, 100) string with their names, and `count` is (batch,) int64. In `image_bytes`, boxes
    are clipped to the image. The encoded image is scaled as in evaluation: it keeps its aspect ratio, and the rest of
    the square is gray.

    A segmenter answers to `serving_default` with `mask`, (batch, size, size) uint8, the class of each pixel, and
    `probabilities`, (batch, size, size) float32, the probability of that class. It answers to `image_bytes` with
    `mask_png_bytes`, (batch,) string, a gray PNG with the height and width of the encoded image in which the value of
    a pixel is its class, and `labels`, (batch, classes) string, the names of all classes.

    `image_bytes` also answers with `image_sizes`, (batch, 2) int64, height and width of each image. `preview` shows the
    encoded image in which these pixels count, after decoding, with at most 1024 pixels a side. `raw_outputs` returns
    the offsets `boxes` and the logits `classes` of a detector, or the `logits` of a segmenter.

    Args:
        network: Detector or segmenter, (batch, size, size, 3) float32 in [0, 1] to its outputs.
        labels: Names of the classes.
        decoding: How EXIF rotation and transparency of encoded images are treated, as in training.
    """
    size = network.input_shape[1]
    shape = [None, size, size, 3]
    pixels = tf.TensorSpec(shape, tf.float32, name="images")
    encoded = tf.TensorSpec([None], tf.string, name="image_bytes")
    detects = task_type_of(network) == "detection"
    predict = _detections(network, labels) if detects else _mask(network)
    finish = _on_original if detects else _as_png(labels)

    @tf.function(input_signature=[pixels])
    def serving_default(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(checked_pixels(tf.ensure_shape(images, shape)))

    @tf.function(input_signature=[encoded])
    def image_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images, sizes = squares(
            tf.ensure_shape(image_bytes, [None]), image_size=size, keep_aspect=detects, decoding=decoding
        )
        return {**finish(predict(images), sizes, size), "image_sizes": tf.cast(sizes, tf.int64)}

    @tf.function(input_signature=[pixels])
    def raw_outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = network(checked_pixels(tf.ensure_shape(images, shape)), training=False)
        by_name = outputs if detects else {"logits": outputs}
        return {name: tf.cast(value, tf.float32) for name, value in by_name.items()}

    @tf.function(input_signature=[encoded])
    def preview(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pictures = tf.map_fn(
            lambda each: _preview(each, decoding),
            tf.ensure_shape(image_bytes, [None]),
            fn_output_signature=tf.TensorSpec([], tf.string),
        )
        return {"preview_image_bytes": pictures}

    return {
        DEFAULT_SIGNATURE: serving_default,
        IMAGE_BYTES_SIGNATURE: image_bytes,
        RAW_SIGNATURE: raw_outputs,
        PREVIEW_SIGNATURE: preview,
    }


def squares(
    image_bytes: tf.Tensor, *, image_size: int, keep_aspect: bool, decoding: Decoding
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes and scales images as in the evaluation of the network.

    Args:
        image_bytes: Encoded images of any size, (batch,) string.
        image_size: Side of the square, in pixels.
        keep_aspect: Whether the aspect ratio is kept, as for detection. The rest of the square is then gray.
        decoding: How EXIF rotation and transparency are treated.

    Returns:
        Images, (batch, image_size, image_size, 3) float32 in [0, 1], and the height and width of each encoded image,
        (batch, 2) int32.
    """

    def prepare(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = decode_limited(encoded, decoding)
        size = tf.shape(image)[:2]
        view = evaluation_view(size[0], size[1], image_size=image_size, keep_aspect=keep_aspect)
        return view.image(image, image_size), size

    specs = (tf.TensorSpec([image_size, image_size, 3], tf.float32), tf.TensorSpec([2], tf.int32))
    images, sizes = tf.map_fn(prepare, image_bytes, fn_output_signature=specs)
    return images, sizes


def _detections(network: keras.Model, labels: Sequence[str]) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    task = DENSE_TASKS["detection"]
    names = tf.constant([*labels, ""])

    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        found = task.predict(network, images)
        classes = found["classes"]
        return {
            "boxes": found["boxes"],
            "scores": found["scores"],
            "classes": tf.cast(classes, tf.int64),
            "labels": tf.gather(names, tf.where(classes < 0, len(labels), classes)),
            "count": tf.cast(found["count"], tf.int64),
        }

    return predict


def _on_original(found: dict[str, tf.Tensor], sizes: tf.Tensor, image_size: int) -> dict[str, tf.Tensor]:
    """Returns the detections in pixels of the encoded images, without those that are only in the gray rest."""
    sides = tf.cast(sizes, tf.float32)
    scale = float(image_size) / tf.reduce_max(sides, axis=1)
    boxes = found["boxes"] / scale[:, None, None]
    boxes = tf.minimum(boxes, tf.tile(sides, [1, 2])[:, None])
    seen = (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3]) & (found["classes"] >= 0)
    values = {
        "boxes": tf.where(seen[..., None], boxes, 0.0),
        "scores": tf.where(seen, found["scores"], 0.0),
        "classes": tf.where(seen, found["classes"], tf.constant(-1, tf.int64)),
        "labels": tf.where(seen, found["labels"], ""),
    }
    order = tf.argsort(tf.cast(~seen, tf.int32), axis=1, stable=True)
    packed = {name: tf.gather(value, order, axis=1, batch_dims=1) for name, value in values.items()}
    return {**packed, "count": tf.reduce_sum(tf.cast(seen, tf.int64), axis=1)}


def _mask(network: keras.Model) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = tf.nn.softmax(tf.cast(network(images, training=False), tf.float32))
        return {
            "mask": tf.cast(tf.argmax(probabilities, axis=-1), tf.uint8),
            "probabilities": tf.reduce_max(probabilities, axis=-1),
        }

    return predict


def _as_png(labels: Sequence[str]) -> Callable[[dict[str, tf.Tensor], tf.Tensor, int], dict[str, tf.Tensor]]:
    names = tf.constant(list(labels))

    def finish(found: dict[str, tf.Tensor], sizes: tf.Tensor, image_size: int) -> dict[str, tf.Tensor]:
        def encode(mask_and_size: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            mask, size = mask_and_size
            for axis in (0, 1):
                # The pixel of the square in which the center of the pixel of the image lies, in exact integers.
                positions = (2 * tf.range(size[axis]) + 1) * image_size // (2 * size[axis])
                mask = tf.gather(mask, positions, axis=axis)
            return tf.io.encode_png(mask[..., None])

        pictures = tf.map_fn(encode, (found["mask"], sizes), fn_output_signature=tf.TensorSpec([], tf.string))
        return {MASK_OUTPUT: pictures, "labels": tf.tile(names[None], [tf.shape(sizes)[0], 1])}

    return finish


def _preview(encoded: tf.Tensor, decoding: Decoding) -> tf.Tensor:
    image = decode_limited(encoded, decoding)
    longest = tf.reduce_max(tf.shape(image)[:2])

    def smaller() -> tf.Tensor:
        size = tf.cast(tf.shape(image)[:2], tf.float64) * (PREVIEW_SIDE / tf.cast(longest, tf.float64))
        size = tf.maximum(tf.cast(tf.round(size), tf.int32), 1)
        resized = tf.image.resize(image, size, antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(resized, 0.0, 255.0)), tf.uint8)

    return tf.io.encode_png(tf.cond(longest > PREVIEW_SIDE, smaller, lambda: image))
