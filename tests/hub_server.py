"""A hub on this machine: as much of it as a download of one public repository needs."""

import hashlib
import http.server
import json
from pathlib import Path


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download of one public model needs; connections close after each answer."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    name = "someone/tiny"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        server = self.server
        server.requests.append(f"{self.command} {self.path.split('?')[0]}")  # type: ignore[attr-defined]
        folder: Path | None = server.folder  # type: ignore[attr-defined]
        status, body, headers = server.status, b"", {}  # type: ignore[attr-defined]
        if folder is not None:
            status, body, headers = self._hub(folder)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = _answer

    def _hub(self, folder: Path) -> tuple[int, bytes, dict[str, str]]:
        path = self.path.split("?")[0]
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if path.startswith(f"/api/models/{self.name}/revision/") or path == f"/api/models/{self.name}":
            content = {"id": self.name, "sha": self.commit, "private": False, "tags": [], "siblings": [{"rfilename": file} for file in files]}
            return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}
        if path.startswith(f"/api/models/{self.name}/tree/"):
            entries = [{"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": self._tag(folder / file)} for file in files]
            return 200, json.dumps(entries).encode(), {"Content-Type": "application/json", "X-Repo-Commit": self.commit}
        file = folder / "/".join(path.split("/")[5:])  # after /owner/name/resolve/revision/
        if path.startswith(f"/{self.name}/resolve/") and file.is_file():
            return 200, file.read_bytes(), {"ETag": f'"{self._tag(file)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        return 404, b"", {"X-Error-Code": "EntryNotFound"}

    @staticmethod
    def _tag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()
