"""A chat completion server on this machine that answers as a test tells it to."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server does with one request. A body that is bytes is sent as it is."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: threading.Event | None = None  # send the head and the first bytes of the body, then wait for this
    dribble: bool = False  # with stall: send a blank every 20 ms meanwhile
    reset: bool = False  # send half of the body, then break the connection off with a TCP reset


def completion(*texts: str, finish: str = "stop", **extra: Any) -> dict[str, Any]:
    """A reply as OpenAI documents it."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None}
        for n, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 11, "completion_tokens": 7 * len(texts), "total_tokens": 11 + 7 * len(texts)}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    } | extra


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server's, which would print it among what a command says."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Attributes: `url`, `port`, the `requests` seen (JSON), their `headers` (lower case), `most_open` at a time."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Answer], port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_open = self._open = 0
        self.dead = False
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions", self.path
                sent = self.rfile.read(length := int(self.headers["Content-Length"]))
                if len(sent) < length:  # by a client that was killed
                    return
                body = json.loads(sent)
                with lock:
                    server._open += 1
                    server.most_open = max(server.most_open, server._open)
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    answer = reply(number, body)
                    self.answer(Answer(b"", reset=True) if server.dead else answer)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has given up
                finally:
                    with lock:
                        server._open -= 1

            def answer(self, answer: Answer) -> None:
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                head = {"Content-Type": "application/json", "Content-Length": str(len(content))} | answer.headers
                for name, value in head.items():
                    self.send_header(name, value)
                self.end_headers()
                if answer.reset:
                    self.wfile.write(content[: len(content) // 2])
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    raise ConnectionResetError
                if answer.stall is not None:
                    self.wfile.write(content[:5])
                    while not answer.stall.wait(0.02):
                        if answer.dribble:
                            self.wfile.write(b" ")
                    self.close_connection = True
                    return
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Listener(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def die(self) -> None:
        """Break off what is being answered and refuse all connections from now on."""
        self.dead = True
        self._server.socket.close()

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(*answers: Any, port: int = 0) -> Iterator[Server]:
    """A server that gives these answers in turn and the last one from then on; a function gives its own."""

    def reply(number: int, body: dict[str, Any]) -> Answer:
        answer = answers[min(number, len(answers) - 1)]
        found = answer(body) if callable(answer) else answer
        return found if isinstance(found, Answer) else Answer(found)

    with Server(reply, port) as server:
        yield server
