"""Google Cloud Storage's JSON interface in memory, as far as a run uses it.

  python tests/fake_gcs.py    prints the environment for processes to use it

Enough for gcsfs (what etils reads and writes gs:// with) and for tensorstore
(what Orbax does): it stands in for a bucket where there is none.
"""

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

BUCKET = "bucket"


class FakeGcs(http.server.ThreadingHTTPServer):
  """Serves one bucket until `shutdown`.

  Attributes:
    objects: name -> (bytes, generation).
    url: of the server.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.uploads: dict[str, tuple[str, bytearray]] = {}
    self.generations = itertools.count(1)
    self.lock = threading.Lock()
    self.url = f"http://127.0.0.1:{self.server_address[1]}"
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, *_) -> None:
    """Says nothing: gcsfs asks twice at once and drops the slower answer."""

  def environment(self) -> dict[str, str]:
    """Variables that lead gcsfs and tensorstore here."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: FakeGcs

  def log_message(self, *_) -> None:
    pass

  def _handle(self) -> None:
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path = url.path.removeprefix("/download").removeprefix("/upload")
    name = re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)", path)
    copy = re.fullmatch(
      r"/storage/v1/b/[^/]+/o/([^/]+)/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+)",
      path,
    )
    unquote = urllib.parse.unquote
    with self.server.lock:
      if "upload_id" in query:
        self._continue(query["upload_id"], body)
      elif url.path.startswith("/upload"):
        self._upload(query, body)
      elif copy:
        source = unquote(copy[1])
        if source not in self.server.objects:
          return self._send(404)
        rewrite = copy[2] != "moveTo"
        data, _ = self.server.objects[source]
        self._store(unquote(copy[3]), data, {}, rewrite)
        if not rewrite:
          del self.server.objects[source]
      elif name:
        self._object(unquote(name[1]), query)
      elif re.fullmatch(r"/storage/v1/b/[^/]+/o", path):
        self._list(query)
      elif re.fullmatch(r"/storage/v1/b/[^/]+", path):
        self._send(200, {"kind": "storage#bucket", "name": BUCKET})
      else:
        self._send(404)

  do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

  def _send(self, status: int, data: dict | bytes = b"", **headers) -> None:
    if isinstance(data, dict):
      data = json.dumps(data).encode()
      headers["Content-Type"] = "application/json"
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _resource(self, name: str) -> dict:
    data, generation = self.server.objects[name]
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": BUCKET,
      "size": str(len(data)),
      "generation": str(generation),
      "metageneration": "1",
      "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }

  def _refused(self, name: str, query: dict) -> bool:
    """Whether a condition on the generation does not hold."""
    generation = self.server.objects.get(name, (b"", 0))[1]
    wanted = query.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != generation

  def _store(self, name: str, data: bytes, query: dict, rewrite=False) -> None:
    if self._refused(name, query):
      return self._send(412)
    self.server.objects[name] = data, next(self.server.generations)
    resource = self._resource(name)
    self._send(
      200, {"done": True, "resource": resource} if rewrite else resource
    )

  def _object(self, name: str, query: dict) -> None:
    if name not in self.server.objects:
      return self._send(404)
    data, generation = self.server.objects[name]
    if self.command == "DELETE":
      if self._refused(name, query):
        return self._send(412)
      del self.server.objects[name]
      return self._send(204)
    if query.get("alt") != "media":
      return self._send(200, self._resource(name))
    if self._refused(name, query):
      return self._send(412)
    if query.get("ifGenerationNotMatch") == str(generation):
      return self._send(304)
    headers = {"x_goog_generation": str(generation)}
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not span:
      return self._send(200, data, **headers)
    if span[1]:
      start = int(span[1])
      end = min(int(span[2]) + 1 if span[2] else len(data), len(data))
    else:
      start, end = max(len(data) - int(span[2]), 0), len(data)
    if start >= len(data):
      return self._send(416, Content_Range=f"bytes */{len(data)}")
    headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    self._send(206, data[start:end], **headers)

  def _list(self, query: dict) -> None:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    names, prefixes = [], set()
    for name in sorted(self.server.objects):
      rest = name.removeprefix(prefix)
      if not name.startswith(prefix) or not (
        query.get("startOffset", "") <= name < query.get("endOffset", "\x7f")
      ):
        continue
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        names.append(name)
    found = {"kind": "storage#objects", "prefixes": sorted(prefixes)}
    self._send(200, found | {"items": [self._resource(n) for n in names]})

  def _upload(self, query: dict, body: bytes) -> None:
    kind, name = query["uploadType"], query.get("name", "")
    if kind == "media":
      return self._store(name, body, query)
    if kind == "resumable":
      name = name or json.loads(body)["name"]
      upload = str(len(self.server.uploads))
      self.server.uploads[upload] = name, bytearray()
      where = f"{self.server.url}{self.path}&upload_id={upload}"
      return self._send(200, Location=where)
    boundary = re.search(
      r"boundary=\"?([^\";]+)", self.headers["Content-Type"]
    )[1].strip("'")
    _, first, second, _ = body.split(b"--" + boundary.encode())
    name = json.loads(
      first.partition(b"\n\n")[2] or first.split(b"\r\n\r\n")[1]
    )["name"]
    head = b"\r\n\r\n" if b"\r\n\r\n" in second else b"\n\n"
    data = second.partition(head)[2]
    self._store(name, data.removesuffix(b"\n").removesuffix(b"\r"), query)

  def _continue(self, upload: str, body: bytes) -> None:
    name, data = self.server.uploads[upload]
    data += body
    if self.headers.get("Content-Range", "").endswith("/*"):
      return self._send(308, Range=f"bytes=0-{len(data) - 1}")
    self._store(name, bytes(data), {})


if __name__ == "__main__":
  for key, value in FakeGcs().environment().items():
    print(f"export {key}={value}", flush=True)
  threading.Event().wait()
