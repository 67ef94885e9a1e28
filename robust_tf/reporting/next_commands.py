"""The commands that a training job prints when it is finished, quoted for a shell."""

import base64
import json
import pathlib
import shlex
import urllib.parse

from robust_tf.config.run import RunConfig

# A test image of at most this many bytes fits into a command.
_LARGEST_SAMPLE = 1000


def next_commands(run: RunConfig, sample: bytes, *, signature_name: str = "") -> list[str]:
    """Returns the command that starts TensorBoard and, after an export, the commands that start and query a server.

    Args:
        run: Run settings of a finished job.
        sample: Encoded test image for the query. It is not used without an export.
        signature_name: Signature that takes encoded images. "" stands for the default.
    """
    commands = [shlex.join(["tensorboard", "--logdir", str(pathlib.Path(run.workdir).parent)])]
    if run.export_dir:
        name = run.served_name
        base = pathlib.Path(run.export_dir).resolve() / name
        serve = ["python", "-m", "robust_tf.serve", "--rest_api_port=8501", f"--model_name={name}"]
        serve.append(f"--model_base_path={base}")
        commands += [f"python -m pip install '.[serve]' && {shlex.join(serve)}", _query(name, sample, signature_name)]
    return commands


def _query(name: str, sample: bytes, signature_name: str) -> str:
    """Returns a command that sends a test image to the server. A small image is part of the command itself."""
    if len(sample) > _LARGEST_SAMPLE:
        predict = ["python", "-m", "robust_tf.predict", "--server=http://localhost:8501", f"--model_name={name}"]
        return shlex.join([*predict, "IMAGE_OR_FOLDER"])
    signature = {"signature_name": signature_name} if signature_name else {}
    request = json.dumps({**signature, "instances": [{"b64": base64.b64encode(sample).decode("ascii")}]})
    url = f"http://localhost:8501/v1/models/{urllib.parse.quote(name, safe='')}:predict"
    return shlex.join(["curl", "-d", request, url])
