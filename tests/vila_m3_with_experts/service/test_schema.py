"""Property-based requests made from the service's own OpenAPI schema: none of them may be a fault of the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from scripted_service import MODEL, Running, running_service

RULES = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, ct_file: Path) -> Iterator[Running]:
    with running_service(tmp_path_factory.mktemp("schema")) as started:
        yield started


def check(case: Any) -> None:
    if case.path.startswith("/v1/chat/completions") and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL  # else nearly every request ends at the model's name
    response = case.call(timeout=120)
    case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400 and "json" in str(response.headers.get("content-type")):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_a_fault_of_the_server(running: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @RULES
        @given(case=operation.as_strategy(generation_mode=mode))
        def check_all(case: Any) -> None:  # hypothesis keeps its settings on the function, so each needs its own
            check(case)

        try:
            check_all()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE, operation.label  # a route without parameters has no wrong ones
        count += 1
    assert count > 15


def test_the_schema_names_every_route_of_openai(running: Running) -> None:
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    wanted = {"/v1/chat/completions", "/v1/models", "/v1/files", "/v1/files/{file_id}/content", "/health", "/metrics"}
    assert wanted <= set(paths)
