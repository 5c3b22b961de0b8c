"""An operator's program: changes `user_config` of a running application, well and badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.e2e.conftest import free_port

OPTIONS = {"model": "nano-jamba", "stages": 2, "expert_shards": 2, "dtype": "float32"}
ASKED = {"prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEMPLATE = "{{ messages[0].content }}{{ messages[0].content }}"


def deploy(port: int, user_config: object, **options: Any) -> None:
    """As `serve deploy` does, whose server needs a dashboard."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": "nano",
        "import_path": "deploy.app:build",
        "args": {**OPTIONS, **options},
        "deployments": [{"name": "Ingress", "user_config": user_config}],
    }
    http = {"host": "127.0.0.1", "port": port}
    config = ServeDeploySchema.model_validate({"http_options": http, "applications": [application]})
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(config)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Server:
    """What clients see of it."""

    def __init__(self, port: int) -> None:
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def is_ready(self) -> bool:
        try:
            return self._client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def version(self) -> dict[str, Any]:
        return dict(self._client.get("/version").json())

    def processes(self) -> set[tuple[str, int]]:
        found = self._client.get("/v1/experts").json()
        return {(found["replica_id"], actor["pid"]) for actor in found["actors"]}

    def prompt_tokens(self) -> int:
        body = {**CHAT, "max_tokens": 1}
        usage = self._client.post("/v1/chat/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens"])

    def stream(self, tokens: list[int]) -> None:
        """Every token of one long answer, as it comes."""
        body = {**ASKED, "stream": True, "return_token_ids": True}
        with self._client.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += choice["token_ids"]


def check_changes(server: Server, port: int) -> None:
    expected: list[int] = []
    server.stream(expected)
    assert len(expected) == ASKED["max_tokens"]
    processes, prompt_tokens = server.processes(), server.prompt_tokens()
    tokens: list[int] = []
    stream = threading.Thread(target=server.stream, args=(tokens,))
    stream.start()
    wait_until(lambda: bool(tokens), "the stream has begun")
    changed = {"temperature": 0.5, "chat_template": TEMPLATE, "max_waiting_seqs": 3}
    deploy(port, changed)
    wait_until(lambda: server.version()["user_config"]["temperature"] == 0.5, "it is in force")
    assert server.prompt_tokens() < prompt_tokens
    stream.join()
    assert tokens == expected
    deploy(port, {**changed, "temperature": 9})
    wait_until(lambda: "user_config_refused" in server.version(), "it is refused")
    assert "temperature=9" in server.version()["user_config_refused"]
    assert server.version()["user_config"]["temperature"] == 0.5
    deploy(port, {})
    wait_until(lambda: server.version()["user_config"] == {}, "the options are in force")
    assert server.prompt_tokens() == prompt_tokens
    assert server.processes() == processes


def check_a_bad_start(server: Server, port: int) -> None:
    """A new replica refuses it before it reads a weight; the old one goes on."""
    from ray import serve

    def told() -> bool:
        deployments = serve.status().applications["nano"].deployments.values()
        return any("user_config: top_p=7" in each.message for each in deployments)

    deploy(port, {"top_p": 7}, max_num_seqs=5)
    wait_until(told, "the status says why")


def main() -> None:
    from deploy.local_ray import ray_session

    with ray_session(4.0):
        from ray import serve

        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(port, {"temperature": 0.25})
        server = Server(port)
        wait_until(server.is_ready, "it is ready")
        assert server.version()["user_config"] == {"temperature": 0.25}
        check_changes(server, port)
        check_a_bad_start(server, port)
        serve.shutdown()
    print("changed without a restart")


if __name__ == "__main__":
    main()
