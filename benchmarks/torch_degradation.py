"""Real-ESRGAN's degradation of one image in plain PyTorch, what is drawn handed in.

Written from its public description, without sr_jax: one image at a time, of the size that it has,
in the dtype that it has. Images are [1, 3, H, W] in [0, 1]. The tests compare sr_jax with it, and
`benchmarks/degradations.py` times it. Import it inside of tests that are marked `developer`.
"""

import io
import math

import numpy as np
from PIL import Image
import scipy.special
import torch
import torch.nn.functional as F

KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")
MODES = ("area", "bilinear", "bicubic")


def kernel(drawn) -> np.ndarray:
  """The blur kernel of what was drawn, embedded in 21x21."""
  side = int(drawn["side"])
  axis = np.arange(side) - side // 2
  x, y = np.meshgrid(axis, axis)
  if drawn["kind"] == len(KINDS):
    k = sinc(side, drawn["cutoff"])
  else:
    name = KINDS[int(drawn["kind"])]
    sigma_x = sigma_y = float(drawn["sigma_x"])
    angle = 0.0
    if "aniso" in name:
      sigma_y, angle = float(drawn["sigma_y"]), float(drawn["angle"])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    points = np.stack([x, y], -1)
    q = np.einsum("hwi,ij,hwj->hw", points, inverse, points)
    if "generalised" in name:
      k = np.exp(-0.5 * q ** float(drawn["beta"]))
    elif "plateau" in name:
      k = 1 / (1 + q ** float(drawn["beta"]))
    else:
      k = np.exp(-0.5 * q)
  k = k / k.sum()
  return np.pad(k, (21 - side) // 2)


def sinc(side, cutoff) -> np.ndarray:
  axis = np.arange(side) - side // 2
  r = np.hypot(*np.meshgrid(axis, axis))
  with np.errstate(invalid="ignore", divide="ignore"):
    k = cutoff * scipy.special.j1(cutoff * r) / (2 * np.pi * r)
  k[side // 2, side // 2] = cutoff**2 / (4 * np.pi)
  return k / k.sum()


def blur(image: torch.Tensor, k: np.ndarray) -> torch.Tensor:
  reach = k.shape[-1] // 2
  weight = torch.as_tensor(k, dtype=image.dtype)[None, None].expand(3, 1, -1, -1)
  return F.conv2d(F.pad(image, (reach,) * 4, mode="reflect"), weight, groups=3)


def sharpen(image: torch.Tensor) -> torch.Tensor:
  sigma = 0.3 * (50 * 0.5 - 1) + 0.8
  taps = np.exp(-((np.arange(51) - 25) ** 2) / (2 * sigma**2))
  taps /= taps.sum()
  gaussian = np.outer(taps, taps)
  difference = image - blur(image, gaussian)
  mask = blur((difference.abs() * 255 > 10).to(image.dtype), gaussian)
  return mask * (image + 0.5 * difference).clamp(0, 1) + (1 - mask) * image


def luma(image: torch.Tensor) -> torch.Tensor:
  r, g, b = image.unbind(1)
  return (0.299 * r + 0.587 * g + 0.114 * b)[:, None]


def add_noise(image: torch.Tensor, drawn, normal: torch.Tensor, poisson) -> torch.Tensor:
  if drawn["gaussian"]:
    normal = normal[:, :1] if drawn["grey"] else normal
    return (image + normal * (float(drawn["sigma"]) / 255)).clamp(0, 1)
  seen = luma(image) if drawn["grey"] else image
  seen = (seen * 255).round().clamp(0, 255) / 255
  n = 2 ** math.ceil(math.log2(len(torch.unique(seen))))
  noise = poisson(seen * n, normal[:, : seen.shape[1]]) / n - seen
  return (image + noise * float(drawn["poisson_scale"])).clamp(0, 1)


def jpeg_tables() -> tuple[np.ndarray, np.ndarray]:
  """The standard's tables of luma and chroma, as libjpeg writes them at quality 50."""
  file = io.BytesIO()
  Image.new("RGB", (16, 16)).save(file, "JPEG", quality=50)
  return tuple(np.reshape(Image.open(file).quantization[i], (8, 8)) for i in (0, 1))


TABLES = jpeg_tables()
WAVES = np.cos((2 * np.arange(8)[None] + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
WAVES[0] /= math.sqrt(2)


def jpeg(image: torch.Tensor, quality: float) -> torch.Tensor:
  height, width = image.shape[2:]
  image = image.clamp(0, 1)
  image = F.pad(image, (0, -width % 16, 0, -height % 16)) * 255
  r, g, b = image.unbind(1)
  planes = [
    0.299 * r + 0.587 * g + 0.114 * b - 128,
    F.avg_pool2d(-0.168736 * r - 0.331264 * g + 0.5 * b, 2),
    F.avg_pool2d(0.5 * r - 0.418688 * g - 0.081312 * b, 2),
  ]
  scale = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
  waves = torch.as_tensor(WAVES, dtype=image.dtype)
  decoded = []
  for plane, table in zip(planes, (TABLES[0], TABLES[1], TABLES[1]), strict=True):
    h, w = plane.shape[1:]
    cells = plane.reshape(1, h // 8, 8, w // 8, 8)
    steps = torch.as_tensor(table * scale, dtype=image.dtype)[None, None, :, None, :]
    frequencies = torch.einsum("uy,vx,niyjx->niujv", waves, waves, cells)
    frequencies = (frequencies / steps).round() * steps
    cells = torch.einsum("uy,vx,niujv->niyjx", waves, waves, frequencies)
    decoded.append(cells.reshape(1, h, w))
  y, cb, cr = decoded
  y = y + 128
  cb, cr = (p.repeat_interleave(2, 1).repeat_interleave(2, 2) for p in (cb, cr))
  rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
  return rgb.clamp(0, 255)[:, :, :height, :width] / 255


def interpolate(image: torch.Tensor, mode, **how) -> torch.Tensor:
  return F.interpolate(image, mode=MODES[int(mode)], **how)


def degrade(hr: torch.Tensor, first, second, end, scale: int, normal, poisson) -> torch.Tensor:
  """Degrades an image, without the last rounding.

  Args:
    hr: [1, 3, H, W] in [0, 1].
    first: {what: number} of the first pass.
    second: of the second.
    end: of the end.
    scale: HR size / LR size.
    normal: (number of the pass, height, width) -> standard normal numbers [1, 3, height, width].
    poisson: (means, standard normal numbers) -> Poisson's numbers.
  """
  side = hr.shape[-1]
  small = side // scale
  out = blur(sharpen(hr), kernel(first))
  out = interpolate(out, first["mode"], scale_factor=float(first["factor"]))
  out = add_noise(out, first, normal(0, *out.shape[2:]), poisson)
  out = jpeg(out, float(first["quality"]))
  if second["blurred"]:
    out = blur(out, kernel(second))
  size = int(small * float(second["factor"]))
  out = interpolate(out, second["mode"], size=(size, size))
  out = add_noise(out, second, normal(1, size, size), poisson)
  pulse = np.pad(np.ones((1, 1)), 10)
  last = pulse
  if end["filtered"]:
    k = sinc(int(end["side"]), float(end["cutoff"]))
    last = np.pad(k, (21 - k.shape[0]) // 2)
  if end["jpeg_last"]:
    out = blur(interpolate(out, end["mode"], size=(small, small)), last)
    out = jpeg(out, float(second["quality"]))
  else:
    out = jpeg(out, float(second["quality"]))
    out = blur(interpolate(out, end["mode"], size=(small, small)), last)
  return out.clamp(0, 1)
