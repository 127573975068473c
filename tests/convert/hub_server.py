"""A stand-in for the HF hub: the requests that huggingface_hub makes to download a model.

    python hub_server.py FOLDER

FOLDER holds owner/name folders with the models' files; "owner/gated" answers that its owner wants
to be asked. Prints its port, then every path that is asked for.
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    root: Path

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = unquote(self.path).partition("?")[0].strip("/")
        print(self.command, path, flush=True)
        parts = path.split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        folder = self.root / owner / name
        if name == "gated":
            return self.fail(403, "GatedRepo")
        if not folder.is_dir():
            return self.fail(401, "RepoNotFound")
        if is_api:
            if rest[1:] not in ([], ["main"], [COMMIT]):
                return self.fail(404, "RevisionNotFound")
            files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            siblings = [{"rfilename": file} for file in files]
            if rest[:1] == ["tree"]:
                entries = [
                    {
                        "type": "file",
                        "path": file,
                        "size": (folder / file).stat().st_size,
                        "oid": "0",
                    }
                    for file in files
                ]
                return self.answer(200, json.dumps(entries).encode())
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if rest[:1] != ["resolve"]:
            return self.fail(404, "EntryNotFound")
        file = folder.joinpath(*rest[2:])
        if not file.is_file():
            return self.fail(404, "EntryNotFound")
        data = file.read_bytes()
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.answer(200, data, ETag=tag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
