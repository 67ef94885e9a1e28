"""A local server that speaks TensorFlow Serving's REST and gRPC, for a laptop and for tests.

    python -m robust_tf.serve --model_name=pets --model_base_path=E/pets

then open http://localhost:8501/ in a browser. With --check it looks at the files, folders, versions and labels that the
flags name, loads nothing, and ends with 1 when something is wrong. The flags are those of `tensorflow_model_server`;
production runs the real one.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from robust_tf.environment import set_tensorflow_defaults
from robust_tf.errors import UserError, exit_on_user_error


def main(argv: Sequence[str]) -> int:
    """Serves until SIGTERM or Ctrl-C, then finishes what was accepted; gives the exit code."""
    set_tensorflow_defaults()
    try:
        from robust_tf.flags import parse_flags
        from robust_tf.serving.server.check import check
        from robust_tf.serving.server.server import ServeConfig, Server
    except ModuleNotFoundError as error:
        raise UserError(
            f"The server needs more packages: pip install 'robust_tf[serve]'. Missing: {error.name}."
        ) from error

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config, rest = parse_flags(ServeConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"Everything is a flag, --name=value. Received: {rest[0]!r}.")
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
