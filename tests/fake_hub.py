"""A local server that speaks the Hugging Face hub's protocol.

  with fake_hub.serving({"org/name": directory}) as hub:
    hub.url, hub.requests

'gated/...' asks for a token; another name than those given is not found. The
protocol: huggingface_hub's hf_api.py (repo_info, list_repo_tree) and
file_download.py (get_hf_file_metadata).
"""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class Hub:
  """What is served, and what was asked for."""

  def __init__(self, repositories):
    """Maps 'org/name' to the directory of its files."""
    self.repositories = {k: pathlib.Path(v) for k, v in repositories.items()}
    self.requests = []
    self.url = ""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    hub = self.server.hub
    path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
    hub.requests.append((self.command, path))
    parts = path.strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    parts = parts[2:] if api else parts
    name = "/".join(parts[:2])
    if name not in hub.repositories:
      return self._error(401, "RepoNotFound")
    if name.startswith("gated/"):
      if self.headers.get("Authorization") != f"Bearer {TOKEN}":
        return self._error(403, "GatedRepo")
    kind, revision, rest = parts[2], parts[3], "/".join(parts[4:])
    if revision not in ("main", "v1", SHA):
      return self._error(404, "RevisionNotFound")
    directory = hub.repositories[name]
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    if api and kind == "revision":
      names = [{"rfilename": str(p.relative_to(directory))} for p in files]
      info = {"_id": "1", "id": name, "sha": SHA, "siblings": names}
      return self._json(info | {"private": False, "tags": [], "downloads": 0})
    if api and kind == "tree":
      return self._json([self._entry(p, directory) for p in files])
    assert kind == "resolve", path
    file = directory / rest
    if not file.is_file():
      return self._error(404, "EntryNotFound")
    data = file.read_bytes()
    headers = {"X-Repo-Commit": SHA, "ETag": f'"{_digest(data)}"'}
    return self._send(200, data, headers)

  def _entry(self, path, directory):
    data = path.read_bytes()
    return {
      "type": "file",
      "path": str(path.relative_to(directory)),
      "size": len(data),
      "oid": _digest(data),
    }

  def _json(self, value):
    headers = {"Content-Type": "application/json", "X-Repo-Commit": SHA}
    self._send(200, json.dumps(value).encode(), headers)

  def _error(self, status, code):
    self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

  def _send(self, status, data, headers):
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)


def _digest(data):
  return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serving(repositories):
  """Serves on 127.0.0.1 until the block ends."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.hub = hub = Hub(repositories)
  hub.url = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
