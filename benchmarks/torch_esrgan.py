"""ESRGAN in PyTorch, for timing: the other side of benchmarks/train.py and benchmarks/infer.py.

Networks and updates are those that BasicSR runs, with random weights and without its files. MODES
go from what it runs as shipped to what PyTorch can do:

  basicsr: eager, NCHW, float32 with TF32 allowed (on NVIDIA), five forward passes of D a step.
  channels_last: the same, NHWC.
  amp: channels_last, bfloat16 by autocast, fused Adam on CUDA, EMA in one kernel.
  compile: amp by torch.compile(mode='reduce-overhead'), which has CUDA graphs. D's loss is one
    program, so its two forward passes of the fakes become one: four a step.
  compile-max: the same with mode='max-autotune', which takes minutes to compile.

In inference, amp and compile hold bfloat16 weights, so that there are no casts.
"""

import contextlib
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import flops
from benchmarks import side_by_side


class Mode(NamedTuple):
  channels_last: bool = False
  bfloat16: bool = False
  compile: str = ""


MODES = {
  "basicsr": Mode(),
  "channels_last": Mode(channels_last=True),
  "amp": Mode(True, True),
  "compile": Mode(True, True, "reduce-overhead"),
  "compile-max": Mode(True, True, "max-autotune"),
}


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = True):
  return nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=bias)


def activate(x: torch.Tensor) -> torch.Tensor:
  return F.leaky_relu(x, 0.2, inplace=True)


class Dense(nn.Module):
  def __init__(self, features: int, growth: int):
    super().__init__()
    widths = [features + i * growth for i in range(5)]
    self.grow = nn.ModuleList(conv(width, growth) for width in widths[:4])
    self.shrink = conv(widths[4], features)

  def forward(self, x):
    parts = [x]
    for layer in self.grow:
      parts.append(activate(layer(torch.cat(parts, 1))))
    return x + 0.2 * self.shrink(torch.cat(parts, 1))


class Block(nn.Module):
  def __init__(self, features: int, growth: int):
    super().__init__()
    self.dense = nn.Sequential(*(Dense(features, growth) for _ in range(3)))

  def forward(self, x):
    return x + 0.2 * self.dense(x)


class Generator(nn.Module):
  """RRDBNet x4."""

  def __init__(self, features: int = 64, blocks: int = 23, growth: int = 32):
    super().__init__()
    self.conv_first = conv(3, features)
    self.body = nn.Sequential(*(Block(features, growth) for _ in range(blocks)))
    self.conv_body = conv(features, features)
    self.ups = nn.ModuleList(conv(features, features) for _ in range(2))
    self.conv_hr = conv(features, features)
    self.conv_last = conv(features, 3)

  def forward(self, lr):
    x = self.conv_first(lr)
    x = x + self.conv_body(self.body(x))
    for up in self.ups:
      x = activate(up(F.interpolate(x, scale_factor=2, mode="nearest")))
    return self.conv_last(activate(self.conv_hr(x)))


class Discriminator(nn.Module):
  """BasicSR's VGGStyleDiscriminator for images of side x side, below 256."""

  def __init__(self, side: int, features: int = 64):
    super().__init__()
    layers, inputs = [], 3
    for stage, wide in enumerate((1, 2, 4, 8, 8)):
      outputs = features * wide
      layers.append(conv(inputs, outputs, bias=stage == 0))
      layers += [nn.BatchNorm2d(outputs)] if stage else []
      layers += [nn.LeakyReLU(0.2, True), conv(outputs, outputs, 4, 2, bias=False)]
      layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, True)]
      inputs, side = outputs, side // 2
    self.features = nn.Sequential(*layers)
    self.linear1, self.linear2 = nn.Linear(inputs * side**2, 100), nn.Linear(100, 1)

  def forward(self, image):
    return self.linear2(activate(self.linear1(self.features(image).flatten(1))))


class VGG(nn.Module):
  """VGG19 to conv5_4 before its activation, torchvision's input; random, without gradients."""

  def __init__(self, width: float = 1.0):
    super().__init__()
    layers, inputs = [], 3
    for block, (count, channels) in enumerate(flops.VGG19):
      layers += [nn.MaxPool2d(2)] if block else []
      for _ in range(count):
        layers += [conv(inputs, max(1, round(channels * width))), nn.ReLU(True)]
        inputs = max(1, round(channels * width))
    self.features = nn.Sequential(*layers[:-1])
    self.requires_grad_(False)
    self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
    self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

  def forward(self, image):
    return self.features((image - self.mean) / self.std)


def bce(logits: torch.Tensor, real: bool) -> torch.Tensor:
  return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def make_train_step(
  what: str, mode: str, batch_size: int, hr_patch: int, networks: dict[str, Any]
) -> tuple[Callable[[], torch.Tensor], dict[str, nn.Module]]:
  """One update of BasicSR's SRModel (what 'psnr') or ESRGANModel ('gan') on a fixed batch.

  It is long because it keeps BasicSR's own order of forwards and backwards, in one piece.

  Returns:
    A function that updates and returns the generator's loss, and the networks by name.
  """
  device, how, gan = _device(), MODES[mode], what == "gan"
  layout = torch.channels_last if how.channels_last else torch.contiguous_format

  def place(module):
    return module.to(device, memory_format=layout)

  def images(side):
    image = torch.rand(batch_size, 3, side, side, device=device)
    return image.contiguous(memory_format=layout)

  g, ema = (place(Generator(**networks["generator"])) for _ in range(2))
  ema.requires_grad_(False)
  modules = {"generator": g}
  if gan:
    d = modules["discriminator"] = place(Discriminator(hr_patch, networks["discriminator"]))
    vgg = place(VGG(networks["vgg"])).eval()
  lr, hr = images(hr_patch // flops.SCALE), images(hr_patch)

  def adam(module, rate):
    fused = how.bfloat16 and device.type == "cuda"
    return torch.optim.Adam(module.parameters(), rate, (0.9, 0.99), fused=fused or None)

  optimizer_g = adam(g, 1e-4 if gan else 2e-4)
  optimizer_d = adam(d, 1e-4) if gan else None

  def autocast():
    if not how.bfloat16:
      return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

  def loss_g(lr, hr):
    sr = g(lr).float()
    loss = F.l1_loss(sr, hr)
    if gan:
      with torch.no_grad():
        wanted = vgg(hr).float()
      loss = 1e-2 * loss + F.l1_loss(vgg(sr).float(), wanted)
      real, fake = d(hr).detach().float(), d(sr).float()
      relative = bce(real - fake.mean(), False) + bce(fake - real.mean(), True)
      loss = loss + 5e-3 * relative / 2
    return loss, sr.detach()

  def loss_d(sr, hr):  # what backward_d adds up, as one program
    real, fake = d(hr).float(), d(sr).float()
    return (bce(real - fake.detach().mean(), True) + bce(fake - real.detach().mean(), False)) / 2

  def backward_d(sr, hr):  # as BasicSR: two forward passes of the fakes, so that each can be freed
    with autocast():
      fake, real = d(sr).detach().float(), d(hr).float()
      loss = bce(real - fake.mean(), True) / 2
    loss.backward()
    with autocast():
      fake = d(sr).float()
      loss = bce(fake - real.detach().mean(), False) / 2
    loss.backward()

  if how.compile:
    loss_g, loss_d = (torch.compile(f, mode=how.compile) for f in (loss_g, loss_d))

  def step() -> torch.Tensor:
    if how.compile:
      torch.compiler.cudagraph_mark_step_begin()
    if gan:
      d.requires_grad_(False)
    optimizer_g.zero_grad(set_to_none=True)
    with autocast():
      loss, sr = loss_g(lr, hr)
    if how.compile:  # the graphs' own memory is written over
      loss_now, sr = loss.detach().clone(), sr.clone()
    else:
      loss_now = loss.detach()
    loss.backward()
    optimizer_g.step()
    if gan:
      d.requires_grad_(True)
      optimizer_d.zero_grad(set_to_none=True)
      if how.compile:
        with autocast():
          loss = loss_d(sr, hr)
        loss.backward()
      else:
        backward_d(sr, hr)
      optimizer_d.step()
    with torch.no_grad():
      if how.bfloat16:
        torch._foreach_lerp_(list(ema.parameters()), list(g.parameters()), 0.001)
      else:
        for average, new in zip(ema.parameters(), g.parameters(), strict=True):
          average.mul_(0.999).add_(new, alpha=0.001)
    return loss_now

  return step, modules


def make_upscale(
  mode: str, batch_size: int, size: int, networks: dict[str, Any]
) -> tuple[Callable[[], torch.Tensor], dict[str, nn.Module]]:
  """RRDBNet on a fixed batch of LR images of size x size; returns as `make_train_step`."""
  device, how = _device(), MODES[mode]
  layout = torch.channels_last if how.channels_last else torch.contiguous_format
  dtype = torch.bfloat16 if how.bfloat16 else torch.float32
  g = Generator(**networks["generator"]).to(device, dtype).to(memory_format=layout).eval()
  lr = torch.rand(batch_size, 3, size, size, device=device, dtype=dtype)
  lr = lr.contiguous(memory_format=layout)
  forward = torch.compile(g, mode=how.compile) if how.compile else g

  def upscale() -> torch.Tensor:
    with torch.inference_mode():
      return forward(lr)[0, 0, 0, 0]

  return upscale, {"generator": g}


def prepare(row: dict[str, Any], case: dict[str, Any]) -> side_by_side.Prepared:
  """Makes a case of `train.py` or `infer.py` ready to be timed; see `side_by_side`."""
  torch.manual_seed(0)
  device = _device()
  if device.type == "cuda":
    torch.cuda.empty_cache()
    torch.backends.cudnn.benchmark = True  # as BasicSR
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  mode, batch_size, networks = row["mode"], case["batch_size"], case["networks"]
  if case["what"] == "infer":
    step, modules = make_upscale(mode, batch_size, case["size"], networks)
  else:
    step, modules = make_train_step(case["what"], mode, batch_size, case["hr_patch"], networks)

  def run(count: int) -> float:
    for _ in range(count):
      value = step()
    return float(value)  # waits

  begin = time.perf_counter()
  run(1)
  first = time.perf_counter() - begin
  if device.type == "cuda":
    torch.cuda.reset_peak_memory_stats()

  def peak_bytes() -> int:
    if device.type == "cuda":
      return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  facts = {
    "platform": "gpu" if device.type == "cuda" else "cpu",
    "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    "version": torch.__version__,
    "compile_s": first,  # a first step: torch.compile, cuDNN's search
    "parameters": {
      name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
    },
  }
  return side_by_side.Prepared(run, peak_bytes, facts)


def _device() -> torch.device:
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")
