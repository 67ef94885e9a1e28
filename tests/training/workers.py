"""Jobs on several devices of this machine: worker processes on loopback, or two logical CPUs in one process."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

# With this seed and learning rate no activation is so close to the kink of a ReLU that the last bit decides its
# gradient. With seed 0 one is, on some processors: two workers then differ from one device by 7e-3, here by 1e-6.
FLAGS = (
    "--dataset=digits --classes=0,1,2 --subset=96 --architecture=resnet8 --image_size=8 --norm=l2 --epsilon=0.5 "
    "--attack_steps=2 --eval_steps=3 --batch_size=16 --learning_rate=0.01 --seed=1 --sync_batchnorm "
    "--checkpoint_every_steps=2"
).split()

_ON_TWO_CPUS = """
import sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from robust_tf import train
train.main(["train", *sys.argv[1:]])
"""


def job(workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts the program on one device."""
    return _process(["-m", "robust_tf.train"], workdir, *flags)


def job_on_two_cpus(workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts the program in one process with two devices."""
    return _process(["-c", _ON_TWO_CPUS], workdir, "--distribution=mirrored", *flags)


def start_worker(index: int, ports: list[int], workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts one process of a job with several workers on this machine."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
    return _process(["-m", "robust_tf.train"], workdir, "--distribution=multi_worker", *flags, TF_CONFIG=config)


def free_ports(count: int) -> list[int]:
    """Returns ports that are free at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    """Reads what a process prints until a line holds the text. Returns all of it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} is missing in:\n{''.join(lines)}")


def wait_until(condition: Callable[[], bool], *, seconds: float = 300) -> None:
    """Waits until other processes have made a condition true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"Not after {seconds} s.")
        time.sleep(0.05)


def _process(how: list[str], workdir: pathlib.Path, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, *how, *FLAGS, f"--workdir={workdir}", f"--data_dir={workdir.parent / 'tfds'}", *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
