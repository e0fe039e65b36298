"""Property-based requests made from the service's own OpenAPI schema: none of them may be a fault of the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from scripted_service import MODEL, Running, running_service


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, ct_file: Path) -> Iterator[Running]:
    with running_service(tmp_path_factory.mktemp("schema")) as started:
        yield started


@pytest.fixture
def schema(running: Running) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


loaded = schemathesis.pytest.from_fixture("schema")


@loaded.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_no_request_is_a_fault_of_the_server(case: Any) -> None:
    if case.path.startswith("/v1/chat/completions") and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL  # else nearly every request ends at the model's name
    response = case.call(timeout=60)
    case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_schema_names_every_route_of_openai(running: Running) -> None:
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    wanted = {"/v1/chat/completions", "/v1/models", "/v1/files", "/v1/files/{file_id}/content", "/health", "/metrics"}
    assert wanted <= set(paths)
