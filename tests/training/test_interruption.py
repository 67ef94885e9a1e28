"""A signal ends the process in time, even if the main thread is stuck in C++; and only then without a last save."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from robust_tf.training import interruption
from robust_tf.training.interruption import PendingSignal, Watch, signals_held_back
from tests.training.workers import wait_until

# Loaded by its path, because importing the package also imports TensorFlow. A lock that is taken twice is a call into
# C that no signal interrupts, like a collective operation that waits for a lost worker.
STUCK = """
import ctypes, importlib.util, sys, threading
spec = importlib.util.spec_from_file_location("interruption", sys.argv[1])
interruption = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interruption)
mutex = ctypes.create_string_buffer(64)
lock = (ctypes.PyDLL if sys.argv[2] == "python's lock is held" else ctypes.CDLL)(None).pthread_mutex_lock
lock(mutex)

def stuck(ended):
    return "There is no answer from worker 1." if sys.argv[2] == "worker lost" else ""

if sys.argv[2] == "python's lock is held":
    with interruption.signals_end_process():
        print("ready", flush=True)
        lock(mutex)
with interruption.signals_held_back(), interruption.Watch(stuck).running():
    print("ready", flush=True)
    lock(mutex)
"""


def stuck_process(how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", STUCK, str(pathlib.Path(interruption.__file__)), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_that_waits_for_a_lost_worker(number, code):
    process = stuck_process("worker lost")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.startswith("Interrupted. There is no answer from worker 1. ") and "last checkpoint" in err


@pytest.mark.slow
def test_a_process_whose_workers_answer_ends_at_the_second_signal():
    process = stuck_process("workers answer")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.startswith("Interrupted. A second signal was received.")


def test_a_signal_ends_a_process_in_which_no_python_runs():
    process = stuck_process("python's lock is held")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM  # which a shell reports as 143


def test_a_process_that_comes_back_is_not_ended(monkeypatch):
    """The main thread returns from a long step, saves, and leaves; nothing is left of the watch."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    asked = threading.Event()

    def stuck(ended) -> str:
        asked.set()
        wait_until(ended, seconds=30)
        return "No longer true."

    handlers, threads = [signal.getsignal(number) for number in interruption._SIGNALS], threading.active_count()
    with pytest.raises(interruption.Interrupted), signals_held_back() as pending, Watch(stuck).running() as watch:
        assert watch.signal_number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(30)
        assert pending.received and watch.signal_number == signal.SIGTERM
    wait_until(lambda: threading.active_count() == threads, seconds=30)
    assert exits == []
    assert [signal.getsignal(number) for number in interruption._SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_watch_asks_until_the_worker_is_lost(monkeypatch, capsys):
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    answers = ["", "", "There is no answer from worker 2."]
    watch = Watch(lambda ended: answers.pop(0) if answers else "")
    with pytest.raises(interruption.Interrupted), signals_held_back(), watch.running():
        time.sleep(0.7)
        assert len(answers) == 3  # nothing is asked without a signal
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: bool(exits), seconds=30)
    assert exits == [130]
    assert "no answer from worker 2" in capsys.readouterr().err


def test_outside_the_main_thread_a_watch_does_nothing():
    numbers = []

    def work() -> None:
        with Watch(lambda ended: "stuck").running() as watch:
            numbers.append(watch.signal_number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert numbers == [None]


def test_the_second_signal_raises():
    pending = PendingSignal()
    pending.receive(signal.SIGTERM, None)
    with pytest.raises(interruption.Interrupted) as caught:
        pending.receive(signal.SIGINT, None)
    assert caught.value.exit_code == 130
