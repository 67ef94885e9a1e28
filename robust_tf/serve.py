"""Serves models over REST and gRPC as TensorFlow Serving does, for a laptop and for tests.

    python -m robust_tf.serve --model_name=pets --model_base_path=E/pets

Then open http://localhost:8501/ in a browser. With --check, the program only checks the files, folders, versions and
labels that the flags name, and exits with 1 if something is wrong. The flags are those of `tensorflow_model_server`,
the server for production.
"""

import importlib.metadata
import logging
import signal
import sys
from collections.abc import Sequence

import robust_tf
from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import parse_flags
from robust_tf.serving.server.serve_config import ServeConfig


def main(argv: Sequence[str]) -> int:
    """Serves until SIGTERM or Ctrl-C, finishes the requests that were accepted, and returns the exit code.

    Args:
        argv: Name of the program and its arguments.
    """
    config, rest = parse_flags(ServeConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {rest[0]!r}.")
    if config.version:
        print(
            f"robust_tf server: {robust_tf.__version__}\nTensorFlow Library: {importlib.metadata.version('tensorflow')}"
        )
        return 0
    start_tensorflow()
    try:
        # TensorFlow takes seconds to import, which --help and a mistyped flag need not wait for.
        from robust_tf.serving.server.check import check
        from robust_tf.serving.server.server import Server
    except ModuleNotFoundError as error:
        raise UserError(
            f"The server needs more packages: pip install 'robust_tf[serve]'. Missing: {error.name}."
        ) from error

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if config.check:
        report = check(config)
        print("\n".join(report.lines))
        return int(report.failed)
    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.ask_to_stop())
    try:
        if server.start():
            print(f"Ready: {config.addresses()}", flush=True)
        server.wait()
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv))
