"""Puts transparent images on a background of one color, within a TensorFlow graph."""

import tensorflow as tf

# More than in any GIF that a program writes. These limits end the loops for files that are crafted to be slow.
_MAX_EXTENSIONS = 64
_MAX_BLOCKS = 4096
_BYTES = [bytes([value]) for value in range(256)]


def on_background(image: tf.Tensor, value: int) -> tf.Tensor:
    """Returns an image on a background of one gray level.

    Args:
        image: Image, (height, width, 3 or 4) uint8. The fourth channel is the opacity. The other channels must not have
            been multiplied by it.
        value: Value of the background in all three channels, 0 to 255.

    Returns:
        (height, width, 3) uint8, rounded to the nearest integer.
    """
    opaque = tf.fill(tf.concat([tf.shape(image)[:2], [1]], 0), tf.constant(255, tf.uint8))
    alpha = tf.cast(tf.concat([image, opaque], -1)[..., 3:4], tf.int32)
    color = tf.cast(image[..., :3], tf.int32)
    return tf.cast((color * alpha + value * (255 - alpha) + 127) // 255, tf.uint8)


def opaque_gif(encoded: tf.Tensor, value: int) -> tf.Tensor:
    """Returns a GIF whose first frame has the color of the background instead of transparent pixels.

    TensorFlow's decoder returns no opacity for a GIF, and makes transparent pixels black. In a GIF, all transparent
    pixels have one color of the palette, which no other pixel has. The function replaces this color with the
    background and clears the flag for transparency.

    Args:
        encoded: Encoded GIF, a scalar string.
        value: Value of the background in all three channels, 0 to 255.

    Returns:
        The changed GIF, a scalar string.

    Source: GIF89a specification, sections 18 to 23.
    """
    # The zero at the end is read in place of the bytes that a truncated file lacks. The decoder then refuses the file.
    data = tf.concat([tf.io.decode_raw(encoded, tf.uint8), [0]], 0)
    last = tf.size(data) - 1

    def byte(position: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.gather(data, tf.minimum(position, last)), tf.int32)

    def after_blocks(position: tf.Tensor) -> tf.Tensor:
        (end,) = tf.while_loop(
            lambda block: byte(block) != 0,
            lambda block: (block + 1 + byte(block),),
            (position,),
            maximum_iterations=_MAX_BLOCKS,
        )
        return end + 1

    def palette(flags: tf.Tensor) -> tf.Tensor:
        """Returns the number of colors in the palette that is described by a byte of flags."""
        return tf.where(flags >= 128, 2 ** (flags % 8 + 1), 0)

    def next_extension(position: tf.Tensor, control: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return after_blocks(position + 2), tf.where(byte(position + 1) == 0xF9, position, control)

    global_colors = palette(byte(tf.constant(10)))
    frame, control = tf.while_loop(
        lambda position, _: byte(position) == 0x21,
        next_extension,
        (13 + 3 * global_colors, tf.constant(-1)),
        maximum_iterations=_MAX_EXTENSIONS,
    )
    local_colors = palette(byte(frame + 9))
    has_own = local_colors > 0
    table, colors = tf.where(has_own, frame + 10, 13), tf.where(has_own, local_colors, global_colors)
    flags, transparent = byte(control + 3), byte(control + 6)
    is_transparent = (byte(frame) == 0x2C) & (control >= 0) & (flags % 2 == 1) & (transparent < colors)

    def replaced(text: tf.Tensor, position: tf.Tensor, new: tf.Tensor, count: int) -> tf.Tensor:
        rest = tf.minimum(position + count, tf.strings.length(text))
        return tf.strings.join(
            [tf.strings.substr(text, 0, position), new, tf.strings.substr(text, rest, tf.strings.length(text) - rest)]
        )

    def patched() -> tf.Tensor:
        text = replaced(encoded, control + 3, tf.gather(tf.constant(_BYTES), flags - 1), 1)
        return replaced(text, table + 3 * transparent, tf.constant(_BYTES[value] * 3), 3)

    return tf.cond(is_transparent, patched, lambda: tf.identity(encoded))
