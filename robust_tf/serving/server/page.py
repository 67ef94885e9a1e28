"""The web page at `GET /`, which shows the served models and what they answer to an image."""

import base64
import functools
import hashlib
import importlib.resources
import re

from starlette.responses import Response


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    html = importlib.resources.files("robust_tf.serving.server").joinpath("page.html").read_bytes()
    script = re.search(rb"<script>(.*)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[1] if script else b"").digest()).decode()
    # The browser runs only the script in the page, and lets it contact only this server.
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def page() -> Response:
    """Returns the page. Its script reads everything else through the REST interface."""
    html, headers = _page()
    return Response(html, headers=headers, media_type="text/html")
