"""Short forms of the long tests: load while versions change, killed exporters, damaged requests."""

import pytest

from tests.serving import fuzz, kill, load


@pytest.mark.slow
@pytest.mark.parametrize("batching", [False, True])
def test_no_request_fails_and_no_answer_is_wrong_while_versions_change(batching):
    figures = load.run(swaps=4, clients=8, swap_every=1, batching=batching)
    assert figures["failures"] == 0, figures["first_failures"]
    assert figures["exit_code"] == 0
    assert figures["versions_seen"] == figures["versions_published"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("savedmodel",), ("savedmodel", "onnx", "litert")])
def test_killed_exporter_leaves_no_broken_version(formats):
    figures = kill.run(kills=2, seed=0, formats=formats)
    assert figures["broken"] == []
    assert list(figures["published"]) == list(formats) and min(figures["published"].values()) > 0


@pytest.mark.slow
def test_damaged_requests_get_client_errors(embedded):
    figures = fuzz.run(embedded.url, embedded.target, requests=250, seed=0)
    assert figures["wrong"] == []
    assert figures["seen"]["HTTP 400"] > 50
    assert figures["seen"]["gRPC INVALID_ARGUMENT"] > 50
