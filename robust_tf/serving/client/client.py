"""Connects to a server, over REST or gRPC.

For example, to classify a picture:

    with connect("http://localhost:8501", model_name="pets") as client:
        for prediction in client.classify([open("cat.jpg", "rb").read()]):
            print(prediction[0].label, prediction[0].probability)
"""

from robust_tf.errors import UserError
from robust_tf.serving.client.base import Client
from robust_tf.serving.client.retries import RETRY_SECONDS, Retries


def connect(
    server: str,
    *,
    model_name: str = "",
    version: int | None = None,
    label: str = "",
    timeout_seconds: float = 60.0,
    token: str = "",
    ca_file: str = "",
    retry_seconds: float = RETRY_SECONDS,
) -> Client:
    """Returns a client for one model of a server.

    Args:
        server: Address of the server: "http://host:8501", "https://host", "grpc://host:8500" or "grpcs://host:8443"
            (gRPC over TLS). gRPC needs TensorFlow and the extra `serve`.
        model_name: Name of the model. It may be left out if the server is a `robust_tf.serve` with a single model.
        version: Number of the version. None uses the latest.
        label: Label of the version. Give a version or a label, not both.
        timeout_seconds: Longest time that a request may take, in seconds.
        token: Token for a proxy in front of the server, sent as "Authorization: Bearer ...". gRPC sends it over TLS
            only.
        ca_file: PEM file of the authority that signed the server's certificate, if this machine does not trust that
            authority.
        retry_seconds: Longest time, in seconds, to keep repeating a request that the server refuses because it is busy
            (RESOURCE_EXHAUSTED or UNAVAILABLE, or 429 or 503 over REST). 0 means a single try.

    Raises:
        UserError: The address or a combination of arguments is not valid, or `model_name` is needed.
        ServerError: `model_name` is left out, and the server does not say which models it has.

    Example:
        >>> client = connect("http://localhost:8501", model_name="pets")
        >>> client.classify([open("cat.jpg", "rb").read()])[0][0].label  # doctest: +SKIP
        'Abyssinian'
        >>> client.close()
    """
    scheme, separator, rest = server.partition("://")
    if not separator or not rest or scheme not in ("http", "https", "grpc", "grpcs"):
        raise UserError(
            "A server is http://host:port, https://host:port, grpc://host:port or grpcs://host:port. Received: "
            f"{server!r}."
        )
    if version is not None and label:
        raise UserError(f"Choose either a version or a label, not both. Received: version={version}, label={label!r}.")
    if scheme == "grpc" and (token or ca_file):
        given = " and ".join(name for name, value in (("a token", token), ("a CA file", ca_file)) if value)
        raise UserError(
            f"gRPC takes a token or a CA file over TLS only. Received: {server} with {given}. Use grpcs://."
        )
    if scheme == "http" and ca_file:
        raise UserError(f"A CA file is for a server with TLS. Received: {server} with {ca_file}. Use https://.")
    retries = Retries(retry_seconds)
    if scheme in ("grpc", "grpcs"):
        if not model_name:
            raise UserError("Over gRPC, the model must be named. Received: model_name=''.")
        # The protos of gRPC import TensorFlow, which REST does not need.
        from robust_tf.serving.client.grpc_client import GrpcClient

        return GrpcClient(
            rest,
            model_name=model_name,
            version=version,
            label=label,
            timeout_seconds=timeout_seconds,
            secure=scheme == "grpcs",
            token=token,
            ca_file=ca_file,
            retries=retries,
        )
    # Imported here because httpx is slow to load, and programs import this module before they parse their flags.
    from robust_tf.serving.client.rest_client import RestClient

    return RestClient(
        server,
        model_name=model_name,
        version=version,
        label=label,
        timeout_seconds=timeout_seconds,
        token=token,
        ca_file=ca_file,
        retries=retries,
    )
