"""A local server that speaks enough of the hub's protocol for snapshot_download."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves one repository from a dict of file contents; `served` lists the files that were fetched."""

    def __init__(self, repository: str, files: dict[str, bytes]):
        self.repository, self.files, self.served = repository, files, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(send_body=False)

            def do_GET(self) -> None:
                self.answer(send_body=True)

            def answer(self, send_body: bool) -> None:
                path = self.path.split("?")[0].strip("/")
                if path.startswith(f"api/models/{hub.repository}/tree/"):
                    return self.reply(json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"}, send_body)
                if path.startswith(f"api/models/{hub.repository}"):
                    return self.reply(json.dumps(hub.info()).encode(), {"Content-Type": "application/json"}, send_body)
                name = path.removeprefix(f"{hub.repository}/resolve/").partition("/")[2]
                if not path.startswith(f"{hub.repository}/resolve/") or name not in hub.files:
                    self.send_error(404)
                    return None
                if send_body:
                    hub.served.append(name)
                content = hub.files[name]
                etag = hashlib.sha1(content).hexdigest()
                return self.reply(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, send_body)

            def reply(self, content: bytes, headers: dict[str, str], send_body: bool) -> None:
                self.send_response(200)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if send_body:
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def info(self) -> dict:
        siblings = [{"rfilename": name} for name in self.files]
        return {
            "id": self.repository,
            "modelId": self.repository,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.files.items()
        ]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
