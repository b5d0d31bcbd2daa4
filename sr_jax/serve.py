"""Serves a small local page: drop a photograph, drag alpha, compare, download.

  python -m sr_jax.serve --psnr srresnet --gan srgan
  python -m sr_jax.serve --psnr RUN/psnr --gan RUN --port 8100 --max_pixels 4000000

Open the address that is printed. alpha 0 is the PSNR model, 1 the GAN model. What is downloaded has
the pixels that sr_jax.interpolate and sr_jax.upscale make. No photograph is stored.

Only this machine reaches the page, unless --host says otherwise; there is no password. Requests of
other sites' pages are refused.

Programs can ask too: POST the bytes of an image file to /upscale?alpha=0.5, and get a PNG.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import contextlib
import functools
import io
import ipaddress
import math
import re
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
import urllib.parse

import numpy as np
from PIL import Image
from werkzeug import serving
from werkzeug.exceptions import (
  BadRequest,
  Forbidden,
  HTTPException,
  MethodNotAllowed,
  NotFound,
  RequestEntityTooLarge,
  ServiceUnavailable,
)
from werkzeug.wrappers import Request, Response

from sr_jax import UserError
from sr_jax import cli
from sr_jax import command
from sr_jax.evaluation import alpha as alpha_page
from sr_jax.images import reading
from sr_jax.images.files import read_image_and_alpha
from sr_jax.machine.memory import memory, ran_out
from sr_jax.models.interpolation import interpolate, interpolate_models
from sr_jax.models.model import Model
from sr_jax.models.read import read_model
from sr_jax.networks import trees
from sr_jax.networks.build import build_generator
from sr_jax.upscaling import engines
from sr_jax.upscaling import files
from sr_jax.upscaling import network as networks
from sr_jax.upscaling import stream

LOCAL = ("localhost", "127.0.0.1", "::1")
PATIENCE = 30  # seconds that a client may be silent
WAITING = 8  # requests at a time, of which one is computed
_LARGER = "shrink it, or start sr_jax.serve with a larger --max_megabytes"
HEADERS = {
  "Cache-Control": "no-store",
  "Content-Security-Policy": "frame-ancestors 'none'",  # the rest is in the page itself
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
}


def make_app(
  psnr: Model,
  gan: Model,
  *,
  engine: str = "jax",
  max_bytes: int = 32_000_000,
  max_pixels: int = 1_000_000,
  names: Collection[str] = LOCAL,
  any_address: bool = False,
) -> Callable:
  """Makes the WSGI application.

  Args:
    psnr: the model of alpha 0.
    gan: the model of alpha 1, of the same network.
    engine: what upscales, as for `engines.open_engine`.
    max_bytes: how large a photograph's file may be.
    max_pixels: how many pixels a photograph may have.
    names: what a request's Host may be, without a port. A site whose name was made to point to this
      machine (DNS rebinding) sends its own name there.
    any_address: whether Host may be any IP address too, which no site's name is.

  Raises:
    UserError: the models are not of one network.
  """
  interpolate_models(psnr, gan, 0.5)
  scale = build_generator(gan.name, gan.kwargs).scale
  mixed = functools.lru_cache(maxsize=4)(functools.partial(make_mixed, psnr, gan, engine))
  free, computing = threading.BoundedSemaphore(WAITING), threading.Lock()
  page = alpha_page.render_live(
    "Choose alpha by eye",
    f"Enlarges a photograph {scale} times; alpha 0 is the PSNR model, alpha 1 the GAN model. At "
    f"most {max_pixels:,} pixels and {max_bytes / 1e6:g} MB; it stays on the machine that serves "
    "this page.",
    scale,
    max_bytes,
    _LARGER,
  )

  def answer(request: Request) -> Response:
    _check_origin(request, names, any_address)
    action = {"/": ("GET", None), "/photograph": ("POST", None), "/upscale": ("POST", _alpha)}
    if request.path not in action:
      raise NotFound("there is /, /photograph and /upscale?alpha=0.5")
    method, parse = action[request.path]
    if request.method != method and not (method == "GET" and request.method == "HEAD"):
      raise MethodNotAllowed([method], f"{request.path} is for {method}")
    if method == "GET":
      return Response(page, mimetype="text/html")
    alpha = parse and parse(request.args.get("alpha", ""))
    with _place(free):
      data = _body(request, max_bytes, max_pixels)
      if alpha is None:
        return Response(_upright(data, max_pixels), mimetype="image/png")
      with computing:
        return Response(upscale(mixed(alpha), data, max_pixels), mimetype="image/png")

  @Request.application
  def app(request: Request) -> Response:
    try:
      response = answer(request)
    except HTTPException as error:
      response = Response(f"{error.description}\n", error.code, mimetype="text/plain")
    except (UserError, OSError) as error:
      response = Response(f"{error}\n", 400, mimetype="text/plain")
    except (MemoryError, RuntimeError) as error:
      if not ran_out(error):
        raise
      told = "the memory does not suffice; give a smaller photograph\n"
      response = Response(told, 507, mimetype="text/plain")
    response.headers.update(HEADERS)
    return response

  return app


def _body(request: Request, max_bytes: int, max_pixels: int) -> bytes:
  """Reads the body of a request, which may be an image.

  Raises:
    HTTPException: it is too large, or empty.
  """
  too_large = RequestEntityTooLarge(f"the file may have {max_bytes} bytes: {_LARGER}")
  if (request.content_length or 0) > max_bytes:
    raise too_large
  # A request in chunks does not tell its length before; of a longer one Werkzeug cuts the end.
  request.max_content_length = max_bytes + 1
  data = request.get_data(cache=False)
  if len(data) > max_bytes:
    raise too_large
  if not data:
    raise BadRequest("no photograph was sent; the request's body must be an image file")
  header = reading.read_header(data)
  height, width = header.size if header else (0, 0)
  if height * width > max_pixels:
    raise RequestEntityTooLarge(
      f"the photograph has {width}x{height} pixels and may have {max_pixels} in all: crop or "
      "shrink it, or start sr_jax.serve with a larger --max_pixels"
    )
  return data


def _upright(data: bytes, max_pixels: int) -> bytes:
  """Makes a PNG file of an image file, for the page to show: upright, 8 bits, nothing but pixels.

  Raises:
    BadRequest: it is no image.
  """
  try:
    rgb, transparency = read_image_and_alpha(data, max_pixels=max_pixels)
  except UserError as error:  # Pillow calls the bytes an object at an address
    raise BadRequest(re.sub(r" <_io\.BytesIO [^>]*>", "", str(error))) from error
  image = rgb if transparency is None else np.dstack([rgb, transparency])
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # it is read once and thrown away
  return buffer.getvalue()


def make_mixed(psnr: Model, gan: Model, engine: str, alpha: float) -> networks.Network:
  """Makes the network between two models.

  Args:
    psnr: the model of alpha 0.
    gan: the model of alpha 1.
    engine: as for `engines.open_engine`.
    alpha: in [0, 1].
  """
  variables = interpolate(psnr.variables, gan.variables, alpha)
  model = Model(gan.name, gan.kwargs, variables, {"digest": trees.digest(variables)})
  forward = engines.open_engine(model, engine).forward
  return networks.make_network(build_generator(gan.name, gan.kwargs), variables, forward)


def upscale(network: networks.Network, data: bytes, max_pixels: int) -> bytes:
  """Upscales a photograph as sr_jax.upscale does with --first-frame and --format=png.

  Args:
    network: of `make_mixed`.
    data: an image file.
    max_pixels: that it may have.

  Returns:
    A PNG file.

  Raises:
    UserError: it cannot be read.
  """
  png = io.BytesIO()
  task = files.Task("photograph", data, reading.read_header(data), "png", png)
  free, _ = memory()
  tiling = stream.fitting(network, free // 2 or 2**33)
  options = files.Options(format="png", first_frame=True, max_pixels=max_pixels)
  shapes = stream.standing_programs(network, tiling)
  outcome = files.upscale_files([task], network, tiling, options, shapes=shapes)
  if outcome.failed:
    raise UserError(*outcome.failed.values())
  return png.getvalue()


def _alpha(text: str) -> float:
  try:
    alpha = float(text)
  except ValueError:
    alpha = math.nan
  if not 0 <= alpha <= 1:
    raise BadRequest(f"alpha={text[:40]!r} must be a number from 0 to 1; try /upscale?alpha=0.5")
  return alpha


def _check_origin(request: Request, names: Collection[str], any_address: bool) -> None:
  """Refuses what a page of another site makes a browser send.

  Raises:
    Forbidden: Host is not a name of this server, or the request comes from another site's page.
  """
  host = request.headers.get("Host", "")
  try:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
  except ValueError:  # no address in brackets
    name = ""
  if name not in names and not (any_address and _is_address(name)):
    raise Forbidden(
      f"this server is not called {host[:100]!r}; open it as {' or '.join(names)}, or start "
      "sr_jax.serve with --host"
    )
  origin = request.headers.get("Origin")
  site = request.headers.get("Sec-Fetch-Site", "same-origin")
  foreign = origin not in (None, f"http://{host}") or site not in ("same-origin", "none")
  if request.method not in ("GET", "HEAD") and foreign:
    raise Forbidden("the request comes from another site's page; use the page of this server")


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


@contextlib.contextmanager
def _place(free: threading.BoundedSemaphore) -> Iterator[None]:
  """Holds one of few places, so that requests do not fill the memory.

  Raises:
    ServiceUnavailable: all are taken.
  """
  if not free.acquire(blocking=False):
    raise ServiceUnavailable(f"{WAITING} photographs are being upscaled; try again in a while")
  try:
    yield
  finally:
    free.release()


class _Handler(serving.WSGIRequestHandler):
  """Gives up on clients that are silent for too long; logs errors alone."""

  def setup(self) -> None:
    self.timeout = PATIENCE
    super().setup()

  def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
    pass


def make_server(app: Callable, host: str, port: int) -> serving.BaseWSGIServer:
  """Binds the server, which then has `port` and `serve_forever`.

  Raises:
    UserError: the address cannot be had.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, port), family=family) as listening:
      return serving.make_server(
        host, listening.getsockname()[1], app, threaded=True, request_handler=_Handler,
        fd=listening.fileno(),
      )  # fmt: skip
  except (OSError, OverflowError) as error:
    raise UserError(
      f"--host={host} --port={port} cannot be served ({error}); try --host=127.0.0.1 --port=0, "
      "which takes any port that is free"
    ) from error


def main(argv: Sequence[str]) -> None:
  parser = command.parser("serve", __doc__)
  parser.add_argument(
    "--psnr", required=True, help="the PSNR-oriented model: a run, a file or a name"
  )
  parser.add_argument(
    "--gan", required=True, help="the model fine-tuned from it: a run, a file or a name"
  )
  parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 for all")
  parser.add_argument("--port", type=int, default=8100, help="0 for any that is free")
  parser.add_argument(
    "--max_pixels", type=int, default=1_000_000, help="of a photograph; larger ones are refused"
  )
  parser.add_argument(
    "--max_megabytes", type=float, default=32, help="of a file; larger ones are refused"
  )
  parser.add_argument(
    "--engine",
    choices=engines.CHOICES,
    default="auto",
    help="what upscales on a CPU, as for sr_jax.upscale; jax starts sooner at each new alpha",
  )
  args = parser.parse_args(argv)
  if args.max_pixels < 1:
    raise UserError(f"--max_pixels={args.max_pixels} must be 1 or more; try --max_pixels=1000000")
  if not 0 < args.max_megabytes <= 2000:
    raise UserError(
      f"--max_megabytes={args.max_megabytes:g} must be above 0 and at most 2000; try "
      "--max_megabytes=32"
    )
  if not 0 <= args.port <= 65535:
    raise UserError(
      f"--port={args.port} must be from 0 to 65535; try --port=0, which takes any that is free"
    )
  is_local = args.host == "localhost" or (
    _is_address(args.host) and ipaddress.ip_address(args.host).is_loopback
  )
  app = make_app(
    read_model(args.psnr),
    read_model(args.gan),
    engine=args.engine,
    max_bytes=int(args.max_megabytes * 1e6),
    max_pixels=args.max_pixels,
    names=dict.fromkeys([args.host, *LOCAL, *([] if is_local else [socket.gethostname().lower()])]),
    any_address=not is_local,
  )
  server = make_server(app, args.host, args.port)
  if not is_local:
    print(f"whoever reaches port {server.port} of this machine can use it: there is no password",
          file=sys.stderr)  # fmt: skip
  shown = f"[{args.host}]" if ":" in args.host else args.host
  print(f"http://{shown}:{server.port} is ready; Ctrl-C ends it", flush=True)
  server.serve_forever()  # until Ctrl-C, which it takes for its end


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
