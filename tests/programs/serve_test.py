"""sr_jax.serve: what it answers by HTTP, whom it refuses, and the page in a headless browser.

The page is tried by tests/browser/drive_alpha.mjs, as is the one that sr_jax.interpolate writes;
tests/headless.py says where the browser comes from.
"""

import io
import json
import re
import socket
import struct
import threading
import zlib

import headless
import numpy as np
import pytest
from PIL import Image
from tiny_models import make_model, photo
from werkzeug.test import Client

from sr_jax import UserError, interpolate, serve, upscale
from sr_jax.images.files import read_image, write_image
from sr_jax.models.write import save_model
from sr_jax.upscaling import engines
from sr_jax.upscaling import network as networks

ORIGIN = "http://127.0.0.1:8100"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Folder of two models of one network, psnr.safetensors and gan.safetensors."""
  folder = tmp_path_factory.mktemp("models")
  for i, name in enumerate(("psnr", "gan")):
    save_model(folder / f"{name}.safetensors", make_model("residualnet", seed=i, blocks=1))
  return folder


def app_of(**limits):
  ends = [make_model("residualnet", seed=i, blocks=1) for i in range(2)]
  return serve.make_app(*ends, **limits)


@pytest.fixture(scope="module")
def client():
  return Client(app_of(max_bytes=100_000, max_pixels=3000))


def post(client, path: str, data: bytes = b"", host: str = "127.0.0.1:8100", **headers):
  headers = {key.replace("_", "-"): value for key, value in headers.items()}
  return client.post(path, base_url=f"http://{host}", data=data, headers=headers)


def png(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, kind, **options)
  return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)))


def by_command_line(models, folder, data: bytes, alpha: float, engine: str = "jax") -> np.ndarray:
  (folder / "photo.png").write_bytes(data)
  interpolate.main([
    "--psnr", str(models / "psnr.safetensors"), "--gan", str(models / "gan.safetensors"),
    "--alpha", str(alpha), "--output", str(folder / "mixed.safetensors"),
  ])  # fmt: skip
  upscale.main([
    "--model", str(folder / "mixed.safetensors"), "--input", str(folder / "photo.png"),
    "--output", str(folder / "up"), "--engine", engine,
  ])  # fmt: skip
  return np.asarray(Image.open(folder / "up" / "photo.png"))


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


@pytest.mark.parametrize(
  "alpha, data",
  [
    (0.35, png(photo(40, 50))),
    (1.0, png(photo(40, 50), exif=SIDEWAYS)),
    (0.5, png(np.dstack([photo(30, 44), photo(30, 44, channels=0)]))),
    (0.5, png(photo(30, 44, channels=0))),
    (0.5, png(photo(30, 44, channels=0).astype(np.uint16) * 257 + 3)),
  ],
  ids=["colour", "turned", "transparent", "grey", "16 bits"],
)
def test_the_pixels_are_those_of_the_command_line(models, client, tmp_path, alpha, data):
  reply = post(client, f"/upscale?alpha={alpha}", data)
  assert reply.status_code == 200 and reply.mimetype == "image/png", reply.text
  expected = by_command_line(models, tmp_path, data, alpha)
  assert pixels(reply.data).dtype == expected.dtype
  np.testing.assert_array_equal(pixels(reply.data), expected)


def test_the_engine_is_that_of_the_command_line(models, monkeypatch, tmp_path):
  """One that is easy to tell from JAX stands for OpenVINO; it is opened once for each model."""
  opened = []

  def open_engine(model, choice):
    opened.append((model.info["digest"], choice))
    forward = lambda lr: lr.repeat(4, axis=2).repeat(4, axis=3)  # noqa: E731
    return engines.Engine("blocks", forward=forward)

  monkeypatch.setattr(engines, "open_engine", open_engine)
  image = photo(40, 50)
  client = Client(app_of(engine="openvino"))
  for _ in range(2):
    reply = post(client, "/upscale?alpha=0.35", png(image))
  np.testing.assert_array_equal(pixels(reply.data), image.repeat(4, axis=0).repeat(4, axis=1))
  expected = by_command_line(models, tmp_path, png(image), 0.35, "openvino")
  np.testing.assert_array_equal(pixels(reply.data), expected)
  assert opened == [opened[0]] * 2 and opened[0][1] == "openvino", "of one model, by both programs"


def test_photographs_of_all_sizes_share_few_programs():
  shapes, padded = set(), []

  def run(tile, shape):
    shapes.add(shape)
    padded.append(shape[0] * shape[1] / tile[..., 0].size)
    return lambda: tile

  network = networks.Network(1, 3, 1, run, run, False, 1000)
  rng = np.random.default_rng(0)
  for height, width in rng.integers(100, 300, (40, 2)):
    data = png(np.full((height, width, 3), (1, 2, 3), np.uint8))
    assert pixels(serve.upscale(network, data, 10**6)).shape == (height, width, 3)
  assert len(shapes) <= 16 and 1.1 < np.mean(padded) <= max(padded) <= 2.25


def test_alpha_makes_a_difference(client):
  srs = [pixels(post(client, f"/upscale?alpha={a}", png(photo(40, 50))).data) for a in (0, 0.5, 1)]
  assert all((a != b).mean() > 0.1 for a, b in zip(srs, srs[1:], strict=False))


def test_a_photograph_comes_back_upright_and_without_its_data(client):
  image = photo(20, 30)
  reply = post(client, "/photograph", png(image, exif=SIDEWAYS))
  np.testing.assert_array_equal(pixels(reply.data), np.rot90(image, -1))
  assert not Image.open(io.BytesIO(reply.data)).getexif()


def test_the_page_holds_all_that_it_needs_and_may_ask_this_server_alone(client):
  reply = client.get("/", base_url=ORIGIN)
  policy = re.search(r'Security-Policy" content="([^"]+)"', reply.text)[1]
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  assert not re.search(r"(src|href)=\"(?!data:)", reply.text)
  assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
  assert reply.headers["X-Content-Type-Options"] == "nosniff"
  assert "Access-Control-Allow-Origin" not in reply.headers


def bomb() -> bytes:
  """A PNG of 60,000 x 60,000 pixels in a few hundred bytes, whose pixels never come."""

  def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check

  head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999)))
    + chunk(b"IEND", b"")
  )  # fmt: skip


MULTIPART = (
  b'--x\r\nContent-Disposition: form-data; name="f"; filename="../../e.png"\r\n\r\n1\r\n--x--'
)


@pytest.mark.parametrize("path", ["/photograph", "/upscale?alpha=0.5"])
@pytest.mark.parametrize(
  "data, status, message",
  [
    (bomb(), 413, "60000x60000 pixels and may have 3000 in all.*--max_pixels"),
    (png(photo(60, 60)), 413, "60x60 pixels"),
    (b"", 400, "no photograph was sent"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "must be a whole"),
    (b"MZ" * 500, 400, "must be a whole"),
    (png(photo(40, 40))[:900], 400, "must be a whole"),
    (MULTIPART, 400, "must be a whole"),
    (bytes(100_001), 413, "may have 100000 bytes: shrink it.*--max_megabytes"),
  ],
  ids=["bomb", "large", "empty", "svg", "program", "torn", "path in a name", "file too large"],
)
def test_a_hostile_upload_ends_in_a_message(client, path, data, status, message):
  reply = post(client, path, data)
  assert (reply.status_code, reply.mimetype) == (status, "text/plain")
  assert re.search(message, reply.text) and len(reply.text.splitlines()) == 1
  assert "Traceback" not in reply.text and "object at" not in reply.text
  assert post(client, "/photograph", png(photo(8, 8))).status_code == 200, "and it serves on"


@pytest.mark.parametrize(
  "alpha", ["", "x", "-0.1", "1.1", "nan", "inf", "1e999", "0.5;rm", "9" * 99]
)
def test_an_alpha_that_is_none(client, alpha):
  reply = post(client, f"/upscale?alpha={alpha}", png(photo(8, 8)))
  assert reply.status_code == 400 and "try /upscale?alpha=0.5" in reply.text


@pytest.mark.parametrize(
  "host", ["evil.example", "127.0.0.1.evil.example:8100", "localhost.evil.example", "192.168.1.9",
           "localhost.", "[::1", "a@127.0.0.1@evil.example"],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_refused(client, host):
  for method, path in (("GET", "/"), ("POST", "/photograph")):
    environ = {"HTTP_HOST": host}
    reply = client.open(path, method=method, environ_overrides=environ, data=png(photo(8, 8)))
    assert reply.status_code == 403 and "this server is not called" in reply.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8100"])
def test_names_of_this_machine_are_taken_at_any_port(client, host):
  assert post(client, "/photograph", png(photo(8, 8)), host=host).status_code == 200


@pytest.mark.parametrize(
  "headers",
  [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1:8100"},
    {"Origin": "http://127.0.0.1:9999"}, {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site", "Origin": ORIGIN}, {"Origin": ""},
  ],
)  # fmt: skip
def test_what_another_sites_page_sends_is_refused(client, headers):
  reply = post(client, "/upscale?alpha=0.5", png(photo(8, 8)), **headers)
  assert reply.status_code == 403 and "another site's page" in reply.text
  assert post(client, "/photograph", png(photo(8, 8)), Origin=ORIGIN,
              Sec_Fetch_Site="same-origin").status_code == 200  # fmt: skip


def test_all_names_by_choice(models):
  client = Client(app_of(names=("box", "localhost"), any_address=True))
  hosts = {"192.168.1.9:8100": 200, "[fe80::1]": 200, "box": 200, "evil.example": 403, "": 403}
  for host, status in hosts.items():
    reply = client.get("/", environ_overrides={"HTTP_HOST": host})
    assert reply.status_code == status, host


@pytest.mark.parametrize(
  "method, path, status",
  [("GET", "/upscale", 405), ("POST", "/", 405), ("PUT", "/photograph", 405), ("HEAD", "/", 200),
   ("GET", "/../../etc/passwd", 404), ("GET", "//etc/passwd", 404), ("OPTIONS", "/upscale", 405)],
)  # fmt: skip
def test_other_paths_and_methods(client, method, path, status):
  assert client.open(path, base_url=ORIGIN, method=method).status_code == status


def test_more_requests_than_it_has_places_for_are_told_to_wait(monkeypatch):
  monkeypatch.setattr(serve, "WAITING", 1)
  began, go_on = threading.Event(), threading.Event()
  replies = []

  def slow(network, data, max_pixels):
    began.set()
    assert go_on.wait(60)
    return data

  monkeypatch.setattr(serve, "upscale", slow)
  client = Client(app_of())
  first = threading.Thread(
    target=lambda: replies.append(post(client, "/upscale?alpha=1", png(photo(8, 8))))
  )
  first.start()
  assert began.wait(60)
  reply = post(Client(client.application), "/upscale?alpha=0", png(photo(8, 8)))
  go_on.set()
  first.join()
  assert reply.status_code == 503 and "try again" in reply.text
  assert replies[0].status_code == 200
  assert post(client, "/upscale?alpha=1", png(photo(8, 8))).status_code == 200, "places come back"


@pytest.fixture
def server():
  """A server on a port of this machine, with limits of 100 kB and 20,000 pixels."""
  server = serve.make_server(app_of(max_bytes=100_000, max_pixels=20_000), "127.0.0.1", 0)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
  thread.start()
  yield server
  server.shutdown()
  thread.join()


def talk(server, *parts: bytes) -> bytes:
  """Sends bytes as they are, and returns the whole answer."""
  with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
    for part in parts:
      connection.sendall(part)
    connection.shutdown(socket.SHUT_WR)
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
  "request_lines, status, message",
  [
    (b"Content-Length: 999999999999\r\n\r\nabc", b"413", b"may have 100000 bytes"),
    (b"Content-Length: -5\r\n\r\nabc", b"400", b""),
    (b"Content-Length: 5000\r\n\r\nabc", b"400", b""),
    (b"Transfer-Encoding: chunked\r\n\r\n" + b"186A1\r\n" + bytes(100_001) + b"\r\n0\r\n\r\n",
     b"413", b"may have 100000 bytes"),
    (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400", b""),
  ],
  ids=["huge length", "negative length", "torn", "chunked and too large", "bad chunks"],
)  # fmt: skip
def test_lengths_that_lie(server, request_lines, status, message):
  head = b"POST /photograph HTTP/1.1\r\nHost: 127.0.0.1\r\n"
  answer = talk(server, head, request_lines)
  assert answer.split(b" ")[1] == status, answer[:300]
  assert message in answer and b"Traceback" not in answer
  assert b" 200 " in talk(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[:20]


@pytest.mark.parametrize(
  "sent",
  [b"", b"POST /photograph HT", b"POST /photograph HTTP/1.1\r\nHost: localhost\r\n",
   b"POST /photograph HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc"],
  ids=["nothing", "half a line", "half a head", "half a body"],
)  # fmt: skip
def test_a_client_that_falls_silent_is_given_up(server, monkeypatch, sent):
  monkeypatch.setattr(serve, "PATIENCE", 0.2)
  with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
    connection.sendall(sent)
    while connection.recv(65536):  # a timeout of this end would be an error
      pass


def test_it_listens_to_this_machine_alone(server):
  assert server.socket.getsockname()[0] == "127.0.0.1"


def test_an_address_that_is_taken_is_told(server):
  with pytest.raises(UserError, match=f"--port={server.port} cannot be served.*--port=0"):
    serve.make_server(app_of(), "127.0.0.1", server.port)
  with pytest.raises(UserError, match="--host=203.0.113.1 .*try --host=127.0.0.1"):
    serve.make_server(app_of(), "203.0.113.1", 0)


@pytest.mark.parametrize(
  "host, shown, is_open",
  [
    ("", "127.0.0.1", False), ("localhost", "localhost", False), ("127.0.0.2", "127.0.0.2", False),
    ("0.0.0.0", "0.0.0.0", True), ("::1", "[::1]", False),
  ],
)  # fmt: skip
def test_it_is_open_to_others_only_if_it_is_told_so(
  models, monkeypatch, capsys, host, shown, is_open
):
  """Who is answered, by the application that the program makes for an address."""
  apps = []

  class Server:
    port = 8100

    def serve_forever(self):
      pass

  monkeypatch.setattr(serve, "make_server", lambda app, host, port: apps.append(app) or Server())
  ends = [f"--{name}={models / name}.safetensors" for name in ("psnr", "gan")]
  serve.main([*ends, *([f"--host={host}"] if host else [])])
  told = capsys.readouterr()
  assert f"http://{shown}:8100 is ready" in told.out
  assert ("there is no password" in told.err) == is_open
  others = 200 if is_open else 403
  answers = {"192.168.1.9": others, socket.gethostname().lower(): others, "evil.example": 403}
  answers |= {"localhost": 200, shown: 200}  # which this machine may be called, too
  for name, status in answers.items():
    reply = Client(apps[0]).get("/", environ_overrides={"HTTP_HOST": f"{name}:8100"})
    assert reply.status_code == status, name


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--max_pixels=0"], "--max_pixels=0 must be 1 or more; try --max_pixels=1000000"),
    (["--max_megabytes=nan"], "--max_megabytes=nan must be above 0.*try --max_megabytes=32"),
    (["--port=99999"], "--port=99999 must be from 0 to 65535; try --port=0"),
    (["--gan=other"], "must be the same network"),
  ],
)
def test_settings_that_are_refused(models, monkeypatch, flags, message):
  monkeypatch.chdir(models)
  save_model(models / "other.safetensors", make_model("rrdbnet"))
  flags = [flag.replace("other", "other.safetensors") for flag in flags]
  arguments = ["--psnr=psnr.safetensors", "--gan=gan.safetensors", *flags]
  with pytest.raises(UserError, match=message):
    serve.main(arguments)


# In a browser.


@pytest.mark.developer
def test_a_photograph_is_dropped_dragged_and_downloaded(models, server, tmp_path):
  data = png(photo(40, 50), "JPEG", quality=95)
  names = {"café <b>&.photo.jpg": data, "bomb.png": bomb(), "notes.txt": b"no image",
           "huge.png": bytes(100_001)}  # fmt: skip
  for name, contents in names.items():
    (tmp_path / name).write_bytes(contents)
  seen = headless.drive(
    "drive_alpha.mjs", f"http://127.0.0.1:{server.port}/", tmp_path / "seen", *map(str, [
      tmp_path / name for name in names
    ]),
  )  # fmt: skip
  assert seen["errors"] == [] and seen["dialogs"] == []
  assert {url.split("/")[2] for url in seen["requests"]} <= {f"127.0.0.1:{server.port}"}
  assert seen["start"]["right"] == "alpha 0.5" and seen["end"]["right"] == "alpha 0.85"
  assert seen["download"]["name"] == "café <b>&.photo_x4_alpha0.85.png".replace("<b>", "_b_")
  got = read_image(seen["download"]["path"])
  np.testing.assert_array_equal(got, by_command_line(models, tmp_path, data, 0.85))
  check_wipe_and_zoom(seen, 200, 160)
  told = seen["told"]
  assert "60000x60000 pixels" in told["bomb.png"] and "must be a whole" in told["notes.txt"]
  assert "huge.png has 100001 bytes and may have 100000" in told["huge.png"]
  assert seen["after"]["right"] == "alpha 0.85", "what was shown before is still there"


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
  """alpha.html of two photographs, one of them larger than the page has room for."""
  folder = tmp_path_factory.mktemp("page")
  write_image(folder / "small.png", photo(40, 50))
  write_image(folder / "turned <i>.png", photo(30, 20))
  (folder / "broken.png").write_bytes(b"no image")
  with pytest.raises(UserError, match="1 of 3 photographs are not shown:\n.*broken.png"):
    interpolate.main([
      "--psnr", str(models / "psnr.safetensors"), "--gan", str(models / "gan.safetensors"),
      "--sweep", "0:1:0.25", "--output", str(folder / "out"), "--input",
      *(str(folder / name) for name in ("small.png", "turned <i>.png", "broken.png")),
    ])  # fmt: skip
  return folder / "out" / "alpha.html"


def test_the_page_of_an_own_photograph_has_the_frames_of_each_alpha(page, models, client):
  assert [path.name for path in page.parent.iterdir()] == ["alpha.html"]
  text = page.read_text(encoding="utf-8")
  data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
  assert data["alphas"] == [0, 0.25, 0.5, 0.75, 1]
  assert [one["name"] for one in data["photos"]] == ["small.png", "turned <i>.png"]
  assert "connect-src 'none'" in text and "<i>" not in text.partition("</main>")[0]
  for one, image in zip(data["photos"], (photo(40, 50), photo(30, 20)), strict=True):
    assert "without loss" in one["about"]
    for alpha, frame in zip(data["alphas"], one["frames"], strict=True):
      theirs = pixels(post(client, f"/upscale?alpha={alpha}", png(image)).data).astype(int)
      assert np.abs(headless.decoded(frame) - theirs).max() <= 1  # weights are mixed elsewhere
    np.testing.assert_array_equal(headless.decoded(one["before"]), image)


@pytest.mark.developer
def test_the_page_of_an_own_photograph_is_used_offline(page, tmp_path):
  seen = headless.drive("drive_alpha.mjs", page.as_uri(), tmp_path / "seen")
  assert seen["errors"] == [] and seen["requests"] == []
  assert seen["start"]["right"] == "alpha 0.5" and seen["end"]["right"] == "alpha 0.75"
  check_wipe_and_zoom(seen, 200, 160)


def check_wipe_and_zoom(seen: dict, width: int, height: int) -> None:
  """What the driver did with the picture of this size, and what came of it."""
  assert seen["start"]["natural"] == [width, height]
  assert seen["start"]["split"] == "50%" and seen["wiped"]["split"] == "25%"
  assert seen["start"]["frame"] != seen["end"]["frame"]
  fit = min(seen["stage"][0] / width, seen["stage"][1] / height)
  assert seen["start"]["zoom"] == pytest.approx(fit, rel=1e-3)
  assert seen["zoomed"]["zoom"] > 1.5 * fit
  # The point under the pointer stays there, and a drag moves the picture with it.
  assert seen["zoomed"]["under"] == pytest.approx(seen["end"]["under"], abs=1)
  assert seen["moved"]["at"] == pytest.approx(
    [seen["zoomed"]["at"][0] + 30, seen["zoomed"]["at"][1] + 20], abs=1.5
  )
  assert seen["overflow"] == [0, 0]
  assert float(seen["fitted"]["split"].rstrip("%")) == pytest.approx(25, abs=1)
  assert seen["pinched"]["zoom"] == pytest.approx(3 * seen["fitted"]["zoom"], rel=0.02)
  assert seen["pushed"]["at"][0] == pytest.approx(seen["pinched"]["at"][0] + 40, abs=1.5)
