"""A local server that speaks enough of the hub's protocol for snapshot_download and for upload_folder."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves one repository from a dict of file contents; `served` lists the files that were fetched.

    A repository without files is made by its first upload. Who has the token may upload, and sees what is private. All files
    come within the commit, since this hub names none that is to be stored elsewhere.
    """

    def __init__(self, repository: str, files: dict[str, bytes], token: str = "hf_write"):
        self.repository, self.files, self.served, self.token = repository, files, [], token
        self.visible = bool(files)  # to everybody
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(send_body=False)

            def do_GET(self) -> None:
                self.answer(send_body=True)

            def answer(self, send_body: bool) -> None:
                if not hub.visible and not self.has_token():
                    return self.send_error(401)
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

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.has_token():
                    return self.send_error(401)
                status = 409 if self.path == "/api/repos/create" and hub.files else 200  # one that exists
                answer = hub.posted(self.path.strip("/"), [json.loads(line) for line in body.splitlines()])
                return self.reply(json.dumps(answer).encode(), {"Content-Type": "application/json"}, True, status)

            def has_token(self) -> bool:
                return self.headers["Authorization"] == f"Bearer {hub.token}"

            def reply(self, content: bytes, headers: dict[str, str], send_body: bool, status: int = 200) -> None:
                self.send_response(status)
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
            "private": not self.visible,
        }

    def posted(self, path: str, lines: list[dict]) -> dict:
        """What the hub does with the lines of a POST, and what it answers."""
        if path == "api/repos/create":
            assert f"{lines[0]['organization']}/{lines[0]['name']}" == self.repository
            if not self.files:  # else it is there already and stays as visible as it is
                self.visible = lines[0]["visibility"] == "public"
            return {"url": f"{self.url}/{self.repository}"}
        if path == "api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"api/models/{self.repository}/preupload/main":
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]}
        assert path == f"api/models/{self.repository}/commit/main", path
        new = [line["value"] for line in lines if line["key"] == "file"]
        self.files |= {file["path"]: base64.b64decode(file["content"]) for file in new}
        return {"commitUrl": f"{self.url}/{self.repository}/commit/{COMMIT}", "commitOid": COMMIT}

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
