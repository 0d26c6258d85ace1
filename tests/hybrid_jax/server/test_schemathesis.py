"""Requests made from the server's own OpenAPI document: nothing breaks, and all that is answered is stated there.

A server without a model answers them, over real HTTP. docs/server.md has the command of a larger run.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hybrid_jax.server.openapi import document
from tests.hybrid_jax.server.test_faults import start_faulty

pytestmark = pytest.mark.slow
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SCHEMA = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = start_faulty(tmp_path_factory.mktemp("stated"), "oracle", "--step", "0")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@SCHEMA.parametrize()
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_is_answered_is_stated(case, served):
    case.call_and_validate(base_url=served.url, checks=CHECKS, timeout=30)
