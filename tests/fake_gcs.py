"""A small stand-in for Google Cloud Storage, in memory, on loopback: its JSON API as far as used.

What the clients ask (gcsfs, google-cloud-storage, tensorstore): objects are listed, read whole or
in part, uploaded in one piece or several, renamed, copied and deleted, each with the generation
that is demanded. Facts: cloud.google.com/storage/docs/json_api/v1. Not here: credentials, old
versions, gRPC.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from typing import Any
from collections.abc import Iterator

PAGE = 7  # results to a page: few, so that clients must ask for the next


class Fake:
  """A server with one bucket.

  Attributes:
    objects: {name: (generation, contents)}; tests change it to do damage.
    requests: (method, path, bytes received) of every request.
    refused: methods that are forbidden (403).
    url: where it listens.
  """

  def __init__(self, bucket: str = "bucket"):
    self.bucket, self.objects, self.requests, self.uploads = bucket, {}, [], {}
    self.lock, self.count, self.url, self.refused = threading.RLock(), 0, "", set()

  def environment(self) -> dict[str, str]:
    """What makes the clients of a process come here, without credentials."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",  # tensorstore's
      "NO_GCE_CHECK": "true",
      "CLOUDSDK_CONFIG": "/nonexistent",
      "GOOGLE_APPLICATION_CREDENTIALS": "",
    }

  def names(self, prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def put(self, name: str, contents: bytes, conditions: dict[str, str]) -> dict[str, Any]:
    with self.lock:
      self._check(name, conditions)
      self.count += 1
      self.objects[name] = (self.count, bytes(contents))
      return self.describe(name)

  def get(self, name: str, conditions: dict[str, str]) -> tuple[int, bytes]:
    with self.lock:
      if name not in self.objects:
        raise Refused(404, f"No such object: {self.bucket}/{name}")
      self._check(name, conditions)
      return self.objects[name]

  def delete(self, name: str, conditions: dict[str, str]) -> None:
    with self.lock:
      self.get(name, conditions)
      del self.objects[name]

  def describe(self, name: str) -> dict[str, Any]:
    generation, contents = self.objects[name]
    return {
      "kind": "storage#object",
      "id": f"{self.bucket}/{name}/{generation}",
      "name": name,
      "bucket": self.bucket,
      "generation": str(generation),
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "size": str(len(contents)),
      "md5Hash": base64.b64encode(hashlib.md5(contents).digest()).decode(),
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }

  def list(self, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    with self.lock:
      found = {}  # of names and of prefixes, in one order
      for name in self.names(prefix):
        head, cut, tail = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if cut and not (tail == "" and query.get("includeTrailingDelimiter") == "true"):
          found[prefix + head + cut] = None
        else:
          found[name] = self.describe(name)
      start, end = query.get("startOffset", ""), query.get("endOffset", "")
      after = query.get("pageToken", "")
      keys = [k for k in sorted(found) if k >= start and (not end or k < end) and k > after]
    page = min(int(query.get("maxResults", PAGE)), PAGE)
    result: dict[str, Any] = {"kind": "storage#objects"}
    items = [found[key] for key in keys[:page] if found[key]]
    prefixes = [key for key in keys[:page] if not found[key]]
    if items:
      result["items"] = items
    if prefixes:
      result["prefixes"] = prefixes
    if keys[page:]:
      result["nextPageToken"] = keys[page - 1]
    return result

  def _check(self, name: str, conditions: dict[str, str]) -> None:
    generation = self.objects[name][0] if name in self.objects else 0
    wanted, unwanted = (conditions.get(f"ifGeneration{how}") for how in ("Match", "NotMatch"))
    if wanted is not None and int(wanted) != generation:
      raise Refused(412, f"{name} has generation {generation}, not {wanted}")
    if unwanted is not None and int(unwanted) == generation:
      raise Refused(304, f"{name} still has generation {generation}")


class Refused(Exception):
  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


@contextlib.contextmanager
def running(bucket: str = "bucket") -> Iterator[Fake]:
  """Serves a new, empty bucket until the block ends."""
  fake = Fake(bucket)

  class Handler(_Handler):
    pass

  Handler.fake = fake
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.handle_error = lambda *_: None  # a client that is killed leaves its connections
  server.daemon_threads = True
  fake.url = f"http://127.0.0.1:{server.server_address[1]}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield fake
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  fake: Fake

  def _serve(self) -> None:
    body = self._body()
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    with self.fake.lock:
      self.fake.requests.append((self.command, parts.path, len(body)))
    try:
      status, headers, answer = self._answer(parts.path, query, body)
    except Refused as error:
      status, headers = error.status, {}
      answer = json.dumps({"error": {"code": status, "message": str(error)}}).encode()
    if isinstance(answer, dict):
      headers = {"Content-Type": "application/json; charset=UTF-8", **headers}
      answer = json.dumps(answer).encode()
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(answer)))
    self.end_headers()
    if self.command != "HEAD" and status not in (204, 304):
      with contextlib.suppress(ConnectionError):  # a client asked twice and takes the first answer
        self.wfile.write(answer)

  do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    pieces = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      pieces.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(pieces)

  def _answer(self, path, query, body) -> tuple[int, dict[str, str], Any]:
    fake = self.fake
    if self.command in fake.refused:
      raise Refused(403, f"anyone does not have {self.command} access to {path}")
    if path == "/batch/storage/v1":
      return self._batch(body)
    match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/(.+))?", path)
    if not match:
      raise Refused(404, f"not in this fake: {self.command} {path}")
    room, asked, objects, rest = match.groups()
    if asked != fake.bucket:
      raise Refused(404, "The specified bucket does not exist.")
    if not objects:
      return 200, {}, {"kind": "storage#bucket", "id": asked, "name": asked, "location": "US"}
    if room == "/upload":
      return self._upload(query, body)
    if rest is None:
      return 200, {}, fake.list(query)
    move = re.fullmatch(r"([^/]+)/(?:moveTo|rewriteTo/b/[^/]+)/o/([^/]+)", rest)
    if move:
      source, target = map(urllib.parse.unquote, move.groups())
      with fake.lock:
        contents = fake.get(source, {})[1]
        resource = fake.put(target, contents, query)
        if "/moveTo/" in rest:
          fake.delete(source, {})
          return 200, {}, resource
      size = resource["size"]
      done = {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": resource}
      return 200, {}, {"kind": "storage#rewriteResponse", **done}
    name = urllib.parse.unquote(rest)
    if self.command == "DELETE":
      fake.delete(name, query)
      return 204, {}, b""
    with fake.lock:
      generation, contents = fake.get(name, query)
      if query.get("generation", str(generation)) != str(generation):
        raise Refused(404, f"{name} has no generation {query['generation']}")
      resource = fake.describe(name)
    if query.get("alt") != "media":
      return 200, {}, resource
    headers = {
      "Content-Type": resource["contentType"],
      "X-Goog-Generation": str(generation),
      "X-Goog-Hash": f"md5={resource['md5Hash']}",
    }
    ranged = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not ranged:
      return 200, headers, contents
    first, last = ranged.groups()
    if not first:
      first, last = max(0, len(contents) - int(last)), ""
    first, last = int(first), min(int(last or len(contents)), len(contents) - 1)
    if first > last:
      raise Refused(416, f"{name} has {len(contents)} bytes")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(contents)}"
    return 206, headers, contents[first : last + 1]

  def _upload(self, query, body) -> tuple[int, dict[str, str], Any]:
    fake = self.fake
    kind = query.get("uploadType")
    if kind == "media":
      return 200, {}, fake.put(query["name"], body, query)
    if kind == "multipart":
      told = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      _, described, piece, _ = body.split(b"--" + told, 3)
      name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
      contents = re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1]
      contents = contents[:-2] if contents.endswith(b"\r\n") else contents[:-1]
      return 200, {}, fake.put(name, contents, query)
    if kind == "resumable" and "upload_id" not in query:
      with fake.lock:
        session = str(len(fake.uploads))
        name = query.get("name") or json.loads(body)["name"]
        fake.uploads[session] = (name, query, bytearray())
      place = f"{fake.url}/upload/storage/v1/b/{fake.bucket}/o?uploadType=resumable"
      return 200, {"Location": f"{place}&upload_id={session}"}, {}
    if kind == "resumable":
      name, conditions, received = fake.uploads[query["upload_id"]]
      received += body
      total = self.headers.get("Content-Range", "").rpartition("/")[2]
      if total not in ("", "*", str(len(received))):
        return 308, {"Range": f"bytes=0-{len(received) - 1}"}, b""
      return 200, {}, fake.put(name, received, conditions)
    raise Refused(400, f"uploadType={kind} is not in this fake")

  def _batch(self, body: bytes) -> tuple[int, dict[str, str], Any]:
    """Several deletions as one request."""
    boundary, parts = "batch_of_answers", []
    for i, asked in enumerate(re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+) HTTP", body)):
      try:
        self.fake.delete(urllib.parse.unquote(asked.decode()), {})
        status = "204 No Content"
      except Refused:
        status = "404 Not Found"
      parts.append(
        f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{i}>\r\n\r\n"
        f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
      )
    answer = "".join(parts) + f"--{boundary}--"
    return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, answer.encode()

  def log_message(self, *arguments) -> None:
    pass
