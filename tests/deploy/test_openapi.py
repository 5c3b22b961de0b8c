"""/openapi.json: complete, valid, and kept by schemathesis' cases, thousands of them on request."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
import torch
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from safetensors.torch import load_file, save_file
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from deploy.demo import nano_checkpoint
from deploy.http_api import build_api
from deploy.http_options import HttpOptions
from deploy.openai_schema import ChatRequest
from deploy.openapi import OPERATIONS, openapi_document
from deploy.unsupported import IGNORED_FIELDS, REFUSED_FIELDS
from tests.deploy.conftest import running_service
from tests.deploy.http_client import client_of, is_openai_error
from tests.deploy.http_server import threaded_server

MakeApi = Callable[..., Any]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
POSTS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/classify", "/classify"),
    *("/tokenize", "/detokenize"),
)


async def document_of(api: Any, **options: Any) -> Any:
    async with client_of(api.app(**options)) as client:
        headers = {"Authorization": "Bearer k"}
        return (await client.get("/openapi.json", headers=headers)).json()


async def test_every_route_is_there_and_described(make_api: MakeApi) -> None:
    api = make_api()
    document = await document_of(api)
    served = {r.path.replace(":path", "") for r in api.app().routes if isinstance(r, APIRoute)}
    assert set(document["paths"]) == served
    for path, entry in document["paths"].items():
        assert path in OPERATIONS or entry["get" if "get" in entry else "post"]["summary"] == path
    assert set(POSTS) <= served
    for path in POSTS:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "404", "408", "413", "415", "429", "503"} <= set(
            operation["responses"]
        )
        streams = "text/event-stream" in operation["responses"]["200"]["content"]
        assert streams == path.endswith("completions")
    assert {"get", "head"} == set(document["paths"]["/health"])


async def test_every_schema_is_a_schema_and_every_reference_leads_somewhere(
    make_api: MakeApi,
) -> None:
    document = await document_of(make_api())
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate(schema)
    text = json.dumps(document)
    prefix = '"#/components/schemas/'
    names = {part.partition('"')[0] for part in text.split(prefix)[1:]}
    assert names <= set(schemas)


async def test_keys_and_strictness_show(make_api: MakeApi) -> None:
    document = await document_of(make_api())
    assert "securitySchemes" not in document["components"]
    assert "401" not in document["paths"]["/v1/models"]["get"]["responses"]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is True
    document = await document_of(make_api(strict=True), api_keys=("k",))
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, entry in document["paths"].items():
        for operation in entry.values():
            is_open = path in ("/health", "/ready")
            assert bool(operation["security"]) == ("401" in operation["responses"]) != is_open
    for name in ("ChatRequest", "CompletionRequest", "ClassifyRequest", "StreamOptions"):
        assert document["components"]["schemas"][name]["additionalProperties"] is False


async def test_what_is_not_served_is_said(make_api: MakeApi) -> None:
    """What the schema allows of a refused field, the API takes; and nothing else of it."""
    document = await document_of(make_api())
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    api = make_api(ids=[70] * 300)
    user = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    refused = REFUSED_FIELDS.keys() - ChatRequest.model_fields.keys()
    assert refused
    async with client_of(api.app()) as client:
        for name in refused:
            assert None in fields[name]["enum"]
            for value in (*fields[name]["enum"], {"odd": 1}, "odd", 7):
                response = await client.post("/v1/chat/completions", json={**user, name: value})
                allowed = value in fields[name]["enum"]
                assert response.status_code == (200 if allowed else 400), (name, value)
    for name in IGNORED_FIELDS:
        assert name in fields


def test_a_route_that_nobody_described_is_named() -> None:
    document = openapi_document([("/v1/new", "POST"), ("/other", "GET")])
    assert document["paths"]["/v1/new"]["post"]["requestBody"]
    assert document["paths"]["/other"]["get"]["responses"]["200"]


class Cases:
    """Schemathesis' cases for every operation, each checked; counts what was answered."""

    def __init__(self, document: Any, per_operation: int, **call: Any) -> None:
        self._schema = schemathesis.openapi.from_dict(document)
        self._per_operation = per_operation
        self._call = call
        load_all_checks()
        self._checks = [CHECKS.get_one(name) for name in CHECK_NAMES]
        self.statuses: Counter[int] = Counter()

    def run(self) -> None:
        """Every operation with cases that fit the schema, and with cases that do not."""
        for found in self._schema.get_all_operations():
            operation = found.ok()
            for mode in MODES if operation.method == "post" else MODES[:1]:
                few = operation.method != "post"
                examples = max(2, self._per_operation // 20) if few else self._per_operation
                self._fuzz(operation, mode, examples)

    def _fuzz(self, operation: Any, mode: GenerationMode, examples: int) -> None:
        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call(**self._call)
            self.statuses[response.status_code] += 1
            case.validate_response(response, checks=self._checks)
            if response.status_code >= 400:
                assert is_openai_error(response.json()), response.text
                assert len(response.content) < 4000

        check()


def test_a_few_hundred_cases(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 300)
    app = api.app()
    document = openapi_document([(path, "POST") for path in POSTS] + READS)
    cases = Cases(document, per_operation=25, app=app)
    cases.run()
    assert cases.statuses.total() >= 200, cases.statuses
    assert cases.statuses[200] > 10, cases.statuses
    assert cases.statuses[400] > 20, cases.statuses
    assert api.service._admission.live == 0


READS = [(path, "GET") for path in ("/v1/models", "/v1/models/{name}", "/v1/experts", "/version")]
READS += [(path, "GET") for path in ("/metrics", "/health", "/ready", "/openapi.json")]
READS += [("/health", "HEAD")]


def two_headed(folder: Path) -> Path:
    """A random model that generates and classifies, with the texts of a nano model."""
    from tests.tiny import write_tiny

    write_tiny("jamba", folder, classifier=True, vocab_size=512, id2label={"0": "no", "1": "yes"})
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(512, 64, generator=torch.manual_seed(6)) / 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["JambaForSequenceClassification", "JambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(nano_checkpoint("nano-jamba") / name, folder)
    return folder


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    folder = two_headed(tmp_path_factory.mktemp("model"))
    with (
        running_service(folder, executor="local", max_model_len=128, max_num_seqs=16) as service,
        threaded_server(build_api(service, options=HttpOptions(request_timeout_s=60))) as base,
    ):
        yield service, base


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", [*POSTS, "reads"])
def test_thousands_of_cases_on_a_real_model(real_server: tuple[Any, str], path: str) -> None:
    service, base = real_server
    routes = READS if path == "reads" else [(path, "POST")]
    cases = Cases(openapi_document(routes), per_operation=300, base_url=base)
    cases.run()
    print(f"{path}: {cases.statuses.total()} cases: {dict(sorted(cases.statuses.items()))}")
    assert service._admission.live == 0
