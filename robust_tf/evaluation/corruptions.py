"""The 15 common corruptions at five severities, for images of any size.

The severities are those of ImageNet-C for images above 64 pixels, and those of CIFAR-10-C for smaller images. Lengths
in pixels (radii and displacements) are scaled with the size of the image, but are never less than in CIFAR-10-C. The
random numbers are our own, so the images differ from those of the published files. One corruption differs in kind: the
published frost consists of photographs, and ours is a synthetic texture of similar brightness.

Each function takes a square image, (height, width, channels) float in [0, 1]; the parameters of a severity; the unit,
which is the number of pixels of the image for each pixel of the published size (224 or 32); and a random generator. It
returns the corrupted image, whose values may lie outside [0, 1].

To add a corruption, write such a function and list it with its parameters in `CORRUPTIONS`.

Source: Hendrycks and Dietterich 2019, arXiv 1903.12261.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy import ndimage

from robust_tf.errors import UserError, unknown_name

Image = np.ndarray[Any, np.dtype[np.float64]]

SEVERITIES = (1, 2, 3, 4, 5)
_LARGEST_SMALL = 64  # largest side, in pixels, of images that are corrupted as in CIFAR-10-C
_SMALL_SIDE, _LARGE_SIDE = 32, 224  # sides, in pixels, of the images in CIFAR-10-C and ImageNet-C


def corrupt(images: np.ndarray, name: str, severity: int, *, ids: Sequence[int], seed: int = 0) -> np.ndarray:
    """Returns corrupted copies of images.

    A gray image, whose channels are equal, stays gray, because its noise is the same in all channels.

    Args:
        images: Images, (batch, size, size, 3) float in [0, 1].
        name: Key of `CORRUPTIONS`.
        severity: Severity from 1 to 5.
        ids: Ids of the images, (batch,) integers. The random numbers depend on the id and the seed, so an image is
            corrupted in the same way in any batch.
        seed: Seed for the random numbers, 0 or more.

    Returns:
        Images, (batch, size, size, 3) float32 in [0, 1], rounded to multiples of 1/255 like the published files.

    Raises:
        UserError: If the corruption or the severity is unknown.

    Example:
        >>> import numpy as np
        >>> from robust_tf.evaluation.corruptions import corrupt
        >>> images = np.full((2, 32, 32, 3), 0.5, np.float32)
        >>> brighter = corrupt(images, "brightness", 5, ids=[0, 1])
        >>> brighter.shape, round(float(brighter.mean()), 2)
        ((2, 32, 32, 3), 0.8)
    """
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity must be 1, 2, 3, 4 or 5. Received: severity={severity}.")
    corruption = CORRUPTIONS[name]
    side = images.shape[1]
    small = side <= _LARGEST_SMALL
    parameters = (corruption.small if small else corruption.large)[severity - 1]
    # At least 1, because the blurs of CIFAR-10-C would otherwise be less than a pixel wide in smaller images.
    unit = max(1.0, side / _SMALL_SIDE) if small else side / _LARGE_SIDE
    number = list(CORRUPTIONS).index(name)
    results = []
    for image, identity in zip(images, ids, strict=True):
        rng = np.random.default_rng([seed, number, severity, int(identity)])
        gray = np.ptp(image, axis=-1).max() == 0
        pixels = np.asarray(image[..., :1] if gray else image, np.float64)
        result = corruption.function(pixels, parameters, unit, rng)
        results.append(np.broadcast_to(result, image.shape))
    return (np.round(np.clip(np.stack(results), 0.0, 1.0) * 255.0) / 255.0).astype(np.float32)


# Noise -----------------------------------------------------------------------------------------------------------


def _gaussian_noise(image: Image, std: float, _unit: float, rng: np.random.Generator) -> Image:
    return image + rng.normal(scale=std, size=image.shape)


def _shot_noise(image: Image, photons: float, _unit: float, rng: np.random.Generator) -> Image:
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: Image, share: float, _unit: float, rng: np.random.Generator) -> Image:
    draw = rng.random(image.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, image))


# Blur ------------------------------------------------------------------------------------------------------------


def _defocus_blur(image: Image, parameters: tuple[float, ...], unit: float, _rng: np.random.Generator) -> Image:
    radius, softness = parameters
    if radius >= 1:
        radius = max(1.0, radius * unit)
    reach = max(1, math.ceil(radius)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = ndimage.gaussian_filter((x**2 + y**2 <= radius**2).astype(float), softness)
    blurred: Image = ndimage.convolve(image, (disk / disk.sum())[..., None], mode="mirror")
    return blurred


def _glass_blur(image: Image, parameters: Any, unit: float, rng: np.random.Generator) -> Image:
    sigma, reach, rounds = parameters[0] * unit, max(1, round(parameters[1] * unit)), parameters[2]
    image = _blurred(image, sigma)
    rows, columns = np.indices(image.shape[:2])
    for _ in range(rounds):  # each pixel comes from a nearby place; the offsets are -reach to reach - 1, as published
        dy, dx = rng.integers(-reach, reach, size=(2, *image.shape[:2]))
        image = _clamped(image, rows + dy, columns + dx)
    return _blurred(image, sigma)


def _motion_blur(image: Image, parameters: tuple[float, ...], unit: float, rng: np.random.Generator) -> Image:
    radius, sigma = parameters
    return _smeared(image, radius * unit, sigma * unit, rng.uniform(-45.0, 45.0))


def _zoom_blur(image: Image, parameters: Any, _unit: float, _rng: np.random.Generator) -> Image:
    zooms = np.arange(*parameters)
    return (image + sum(_zoomed(image, zoom) for zoom in zooms)) / (len(zooms) + 1)


# Weather ---------------------------------------------------------------------------------------------------------


def _snow(image: Image, parameters: tuple[float, ...], unit: float, rng: np.random.Generator) -> Image:
    mean, std, zoom, threshold, radius, sigma, kept = parameters
    flakes = _zoomed(rng.normal(mean, std, size=(*image.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0.0, flakes), 0.0, 1.0)
    flakes = _smeared(flakes, radius * unit, sigma * unit, rng.uniform(-135.0, -45.0))
    whitened = np.maximum(image, _luma(image) * 1.5 + 0.5)
    return np.clip(kept * image + (1.0 - kept) * whitened, 0.0, 1.0) + flakes + np.rot90(flakes, k=2)


def _frost(image: Image, parameters: tuple[float, ...], _unit: float, rng: np.random.Generator) -> Image:
    kept, added = parameters
    side = image.shape[0]
    # The ridges of two fractals look like needles of ice. Squaring leaves less frost between them.
    ridges = 1.0 - np.abs(2.0 * _plasma(side, 1.6, rng) - 1.0)
    veins = 1.0 - np.abs(2.0 * _plasma(side, 1.3, rng) - 1.0)
    ice = (0.6 * ridges + 0.4 * veins)[..., None] ** 2
    tint = np.array([0.85, 0.95, 1.0])
    frost: Image = added * ice * (tint if image.shape[-1] == 3 else tint.mean())
    return kept * image + frost


def _fog(image: Image, parameters: tuple[float, ...], _unit: float, rng: np.random.Generator) -> Image:
    density, decay = parameters
    brightest = float(image.max())
    fog = density * _plasma(image.shape[0], decay, rng)[..., None]
    return (image + fog) * brightest / (brightest + density)


# Brightness, contrast and digital --------------------------------------------------------------------------------


def _brightness(image: Image, added: float, _unit: float, _rng: np.random.Generator) -> Image:
    # Raises the V of HSV. Hue and saturation stay the same, and black, which has neither, becomes gray.
    value: Image = image.max(axis=-1, keepdims=True)
    raised = np.minimum(value + added, 1.0)
    return np.where(value > 0, image / np.where(value > 0, value, 1.0), 1.0) * raised


def _contrast(image: Image, factor: float, _unit: float, _rng: np.random.Generator) -> Image:
    mean: Image = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def _elastic_transform(image: Image, parameters: tuple[float, ...], _unit: float, rng: np.random.Generator) -> Image:
    strength, smoothness, tilt = (value * image.shape[0] for value in parameters)
    side = image.shape[0]
    # A random affine map, given by the new places of three points, followed by a smooth random displacement.
    center, arm = side // 2, side // 3
    corners = np.array([[center + arm, center + arm], [center + arm, center - arm], [center - arm, center - arm]])
    moved = corners + rng.uniform(-tilt, tilt, size=(3, 2))
    # Maps places in the result to places in the image.
    affine = np.linalg.solve(np.hstack([moved, np.ones((3, 1))]), corners)
    rows, columns = np.indices((side, side))
    dy, dx = (
        strength * ndimage.gaussian_filter(rng.uniform(-1.0, 1.0, (side, side)), smoothness, truncate=3.0)
        for _ in range(2)
    )
    places = np.stack([rows + dy, columns + dx, np.ones_like(dy)], axis=-1) @ affine
    return np.stack(
        [
            ndimage.map_coordinates(image[..., channel], (places[..., 0], places[..., 1]), order=1, mode="mirror")
            for channel in range(image.shape[-1])
        ],
        axis=-1,
    )


def _pixelate(image: Image, share: float, _unit: float, _rng: np.random.Generator) -> Image:
    side = image.shape[0]
    small = max(1, int(side * share))
    reduced = tf.image.resize(image, (small, small), method="area")
    pixelated: np.ndarray = tf.image.resize(reduced, (side, side), method="nearest").numpy()
    return pixelated


def _jpeg_compression(image: Image, quality: int, _unit: float, _rng: np.random.Generator) -> Image:
    encoded = tf.io.encode_jpeg(np.round(image * 255.0).astype(np.uint8), quality=quality)
    decoded: Image = tf.io.decode_jpeg(encoded, channels=image.shape[-1]).numpy() / 255.0
    return decoded


# Helpers ---------------------------------------------------------------------------------------------------------


def _blurred(image: Image, sigma: float) -> Image:
    blurred: Image = ndimage.gaussian_filter(image, (sigma, sigma, 0.0), mode="nearest")
    return blurred


def _clamped(image: Image, rows: Any, columns: Any) -> Image:
    """Returns the pixels at the given places. Places outside of the image get the nearest pixel of the border."""
    last = image.shape[0] - 1
    clamped: Image = image[np.clip(rows, 0, last), np.clip(columns, 0, last)]
    return clamped


def _smeared(image: Image, radius: float, sigma: float, degrees: float) -> Image:
    """Blurs the image in one direction with one half of a Gaussian, like a moving object that leaves a trail."""
    steps = np.arange(2 * max(1, round(radius)) + 1)
    weights = np.exp(-(steps**2) / (2.0 * sigma**2))
    rows, columns = np.indices(image.shape[:2])
    angle = math.radians(degrees)
    result = np.zeros_like(image)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        result += weight * _clamped(
            image, rows + round(step * math.sin(angle)), columns + round(step * math.cos(angle))
        )
    return result


def _zoomed(image: Image, zoom: float) -> Image:
    """Enlarges the center of the image to the size of the image."""
    center = (image.shape[0] - 1) / 2
    offset = center - center / zoom
    matrix = np.array([1 / zoom, 1 / zoom, 1.0])
    zoomed: Image = ndimage.affine_transform(image, matrix, (offset, offset, 0.0), order=1, mode="nearest")
    return zoomed


def _luma(image: Image) -> Image:
    if image.shape[-1] == 1:
        return image
    luma: Image = image @ np.array([0.299, 0.587, 0.114])  # weights of ITU-R 601
    return luma[..., None]


def _plasma(side: int, decay: float, rng: np.random.Generator) -> Image:
    """Returns a random cloud, (side, side) in [0, 1], made by the diamond-square algorithm on a torus.

    Args:
        side: Side of the cloud, in pixels.
        decay: Factor by which the random displacement decreases from one level to the next.
        rng: Random generator.
    """
    size = 1 << max(1, math.ceil(math.log2(side)))
    cloud: Image = np.zeros((size, size))
    step, amplitude = size, 1.0
    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        sums = corners + np.roll(corners, -1, axis=0)
        sums = sums + np.roll(sums, -1, axis=1)
        middles = sums / 4 + amplitude * rng.uniform(-1.0, 1.0, corners.shape)
        cloud[half::step, half::step] = middles
        beside = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
        cloud[::step, half::step] = beside / 4 + amplitude * rng.uniform(-1.0, 1.0, corners.shape)
        below = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
        cloud[half::step, ::step] = below / 4 + amplitude * rng.uniform(-1.0, 1.0, corners.shape)
        step, amplitude = half, amplitude / decay
    cloud = cloud[:side, :side] - float(cloud.min())
    return cloud / max(float(cloud.max()), 1e-12)


# The table -------------------------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """One corruption.

    Attributes:
        function: Function that corrupts one image. The docstring of this module describes its arguments.
        large: Parameters of each severity for images above 64 pixels (ImageNet-C).
        small: Parameters of each severity for images up to 64 pixels (CIFAR-10-C).
    """

    function: Callable[[Image, Any, float, np.random.Generator], Image]
    large: tuple[Any, ...]
    small: tuple[Any, ...]


# The parameters are those of the code that was published with arXiv 1903.12261.
CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(  # radius, softness of the edge
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Corruption(  # sigma, displacement, rounds
        _glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Corruption(  # radius, sigma
        _motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Corruption(  # first zoom, end of the zooms, step
        _zoom_blur,
        ((1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
        ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)),
    ),
    "snow": Corruption(  # mean, std, zoom and threshold of the flakes, radius and sigma of their motion, share kept
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(  # share of the image that is kept, share of the frost that is added
        _frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": Corruption(  # density, decay of the cloud
        _fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    # Strength, smoothness and tilt as shares of the side. The published code uses 244 instead of 224 pixels.
    "elastic_transform": Corruption(
        _elastic_transform,
        tuple(
            tuple(value * 244 / 224 for value in row)
            for row in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}
