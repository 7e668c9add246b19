"""A server on loopback that speaks as much of OpenAI's protocol as a reader needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LLMServer(ThreadingHTTPServer):
    """Answers with the last word of the last passage, and fails where it is told to.

    Attributes:
        asked: The prompts it got.
        refused: Prompts with one of these texts are refused.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.refused: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: LLMServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        self.server.asked.append(prompt)
        if self.path != "/v1/chat/completions" or any(t in prompt for t in self.server.refused):
            self._reply(400, {"error": {"message": "no such luck"}})
            return
        passages = prompt.partition("\n\nQuestion:")[0].splitlines()
        answer = f" {passages[-1].split()[-1]}\n"
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        self._reply(200, {**head, "choices": [choice], "usage": usage})

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def llm_server() -> Iterator[LLMServer]:
    with LLMServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
