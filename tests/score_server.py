"""Small servers for the tests, in this process: one answers with what it is told, the other speaks the chat protocol of OpenAI."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import uvicorn
from starlette.applications import Starlette

Reply = tuple[int, bytes]  # status and body


class ScoreServer:
    """Answers each POST with reply(question, number of the question, headers); `paths` lists where they went."""

    def __init__(self, reply: Callable[[dict, int, dict], Reply]):
        self.paths, server = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.paths.append(self.path)
                status, body = reply(question, len(server.paths), dict(self.headers))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "ScoreServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class AppServer:
    """An app of rewards/serve.py on a free port."""

    def __init__(self, app: Starlette):
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.uvicorn.servers[0].sockets[0].getsockname()[1]}/score"

    def __exit__(self, *error: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()


def chat_reply(logprobs: dict[str, float]) -> bytes:
    """What a chat endpoint answers, the likeliest tokens first."""
    top = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in logprobs.items()]
    choice = {"index": 0, "message": {"role": "assistant", "content": top[0]["token"]}, "finish_reason": "length"}
    return json.dumps(
        {"object": "chat.completion", "choices": [choice | {"logprobs": {"content": [top[0] | {"top_logprobs": top}]}}]}
    ).encode()
