"""Compares the speed of the training pipeline with Pillow in worker processes, as in PyTorch programs.

    python -m tests.bench.pipeline [--images=2048] [--rounds=5] [--workers=2] [--memory]

Both read JPEG files of 500x375 pixels and return random 224-pixel crops, flipped at random, as float32 in [0, 1] in
batches of 64. They take turns in one run. The worker processes pass their batches on in shared memory, as PyTorch's
DataLoader does. With --memory, the program also shows how the memory of a process grows as it reads 20,000 images.
"""

import argparse
import io
import math
import multiprocessing
import pathlib
import random
import subprocess
import sys
import tempfile
from multiprocessing import shared_memory
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT, SIZE, BATCH = 500, 375, 224, 64
NUM_FILES = 512
MEMORY_IMAGES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="Number of images in each round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="Number of worker processes that run Pillow.")
    parser.add_argument("--augmentation", default="random_resized_crop")
    parser.add_argument("--memory", action="store_true", help="Also show how the memory of a process grows.")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # folder with the images that the watched process reads
    arguments = parser.parse_args()
    if arguments.memory_of:
        _watch_memory(pathlib.Path(arguments.memory_of), arguments.augmentation)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        num_bytes = _write_images(folder)
        print(f"{NUM_FILES} JPEG files of {WIDTH}x{HEIGHT}, {num_bytes / NUM_FILES / 1000:.0f} kB each")
        _compare(folder, arguments)
        if arguments.memory:
            command = [sys.executable, "-m", "tests.bench.pipeline", f"--memory_of={folder}"]
            subprocess.run([*command, f"--augmentation={arguments.augmentation}"], check=True)


def _compare(folder: pathlib.Path, arguments: argparse.Namespace) -> None:
    from tests.bench.timing import interleaved

    with PillowLoop(sorted(map(str, folder.rglob("*.jpg"))), arguments.workers) as loop:
        dataset = _pipeline(folder, epochs=math.ceil(arguments.images / NUM_FILES), augmentation=arguments.augmentation)
        batches = arguments.images // BATCH
        names = {"robust_tf": "robust_tf", "Pillow": f"Pillow, {arguments.workers} processes"}
        cases = {
            names["robust_tf"]: lambda: _consume(dataset, batches),
            names["Pillow"]: lambda: loop.run(batches),
        }
        timings = interleaved(cases, repeats=arguments.rounds, warmup=1)
    for name, timing in timings.items():
        rates = sorted(batches * BATCH / seconds for seconds in timing.repeats)
        median = batches * BATCH / timing.median
        print(f"{name:24}{median:8.0f} images/s (median of {arguments.rounds}; {rates[0]:.0f} to {rates[-1]:.0f})")
    print(f"ratio {timings[names['Pillow']].median / timings[names['robust_tf']].median:.2f}")


# Ours ------------------------------------------------------------------------------------------------------------


def _pipeline(folder: pathlib.Path, *, epochs: int, augmentation: str) -> Any:
    """Returns training batches. Imports TensorFlow here, because the workers of the loop start faster without it."""
    from robust_tf.environment import set_tensorflow_defaults

    set_tensorflow_defaults()
    from robust_tf.config.data import DataConfig
    from robust_tf.data import load_task

    data = DataConfig(dataset=f"folder:{folder}", image_size=SIZE, augmentation=augmentation, cache="none")
    task = load_task(data, batch_size=BATCH)
    # Twice as many epochs, because each lacks the images that are held out.
    return task.train(first_epoch=0, epochs=2 * epochs)


def _consume(dataset: Any, batches: int) -> None:
    for images, _ in dataset.take(batches):
        if images.shape[1:] != (SIZE, SIZE, 3):
            raise AssertionError(images.shape)


def _watch_memory(folder: pathlib.Path, augmentation: str) -> None:
    images = 0
    sizes = []
    for batch, _ in _pipeline(folder, epochs=math.ceil(MEMORY_IMAGES / NUM_FILES), augmentation=augmentation):
        images += len(batch)
        if images // 2000 > len(sizes):
            sizes.append(_resident_mib())
            print(f"after {images:6} images {sizes[-1]:.0f} MiB", flush=True)
        if images >= MEMORY_IMAGES:
            break
    print(f"growth from 4,000 to {MEMORY_IMAGES:,} images: {sizes[-1] - sizes[1]:+.0f} MiB")


def _resident_mib() -> float:
    fields = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("VmRSS:")) / 1024


# The loop --------------------------------------------------------------------------------------------------------


class PillowLoop:
    """Worker processes that write batches to slots of shared memory. There are two slots for each worker."""

    def __init__(self, paths: list[str], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._paths = paths
        num_slots = 2 * workers
        self._memory = shared_memory.SharedMemory(create=True, size=num_slots * _batch_bytes())
        self._tasks, self._done = context.Queue(), context.Queue()
        self._slots = list(range(num_slots))
        self._workers = [
            context.Process(target=_work, args=(self._memory.name, self._tasks, self._done), daemon=True)
            for _ in range(workers)
        ]

    def __enter__(self) -> "PillowLoop":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.join()
        self._memory.close()
        self._memory.unlink()

    def run(self, batches: int) -> None:
        asked = received = 0
        while received < batches:
            while self._slots and asked < batches:
                self._tasks.put((self._slots.pop(), random.choices(self._paths, k=BATCH)))
                asked += 1
            slot = self._done.get()
            batch = _batch_in(self._memory, slot)
            if batch.shape != (BATCH, 3, SIZE, SIZE):
                raise AssertionError(batch.shape)
            del batch
            self._slots.append(slot)
            received += 1


def _work(memory_name: str, tasks: multiprocessing.Queue, done: multiprocessing.Queue) -> None:
    memory = shared_memory.SharedMemory(name=memory_name)
    while (task := tasks.get()) is not None:
        slot, paths = task
        np.stack([_load(path) for path in paths], out=_batch_in(memory, slot))
        done.put(slot)
    memory.close()


def _load(path: str) -> np.ndarray:
    """Does the same as torchvision's RandomResizedCrop, RandomHorizontalFlip and ToTensor, with Pillow."""
    with open(path, "rb") as file:
        image = Image.open(file).convert("RGB")
    top, left, height, width = _window(image.height, image.width)
    image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    return pixels.astype(np.float32) / np.float32(255.0)


def _window(height: int, width: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _batch_bytes() -> int:
    return BATCH * 3 * SIZE * SIZE * 4


def _batch_in(memory: shared_memory.SharedMemory, slot: int) -> np.ndarray:
    return np.ndarray((BATCH, 3, SIZE, SIZE), np.float32, memory.buf, slot * _batch_bytes())


# Images ----------------------------------------------------------------------------------------------------------


def _write_images(folder: pathlib.Path) -> int:
    """Writes random parts of scikit-learn's two photographs, one class for each. Returns the size of all files."""
    from sklearn.datasets import load_sample_images

    rng = random.Random(0)
    num_bytes = 0
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(NUM_FILES):
        photograph = photographs[number % 2]
        share = rng.uniform(0.6, 1.0)
        width, height = int(photograph.width * share), int(photograph.height * share)
        left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
        part = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=92)
        path = folder / str(number % 2) / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
        num_bytes += len(buffer.getvalue())
    return num_bytes


if __name__ == "__main__":
    main()
