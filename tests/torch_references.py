"""The networks once more, in plain PyTorch: what ours are compared with.

Written from the papers and from the published checkpoints' key names, without sr_jax. Images are
NCHW. Import it inside of tests that are marked `developer`.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv3(i, o, **options):
  return nn.Conv2d(i, o, 3, padding=1, **options)


class DenseBlock(nn.Module):
  def __init__(self, features, growth):
    super().__init__()
    for k in range(1, 5):
      setattr(self, f"conv{k}", conv3(features + (k - 1) * growth, growth))
    self.conv5 = conv3(features + 4 * growth, features)

  def forward(self, x):
    x1 = F.leaky_relu(self.conv1(x), 0.2)
    x2 = F.leaky_relu(self.conv2(torch.cat((x, x1), 1)), 0.2)
    x3 = F.leaky_relu(self.conv3(torch.cat((x, x1, x2), 1)), 0.2)
    x4 = F.leaky_relu(self.conv4(torch.cat((x, x1, x2, x3), 1)), 0.2)
    return x + 0.2 * self.conv5(torch.cat((x, x1, x2, x3, x4), 1))


class RRDB(nn.Module):
  def __init__(self, features, growth):
    super().__init__()
    self.rdb1 = DenseBlock(features, growth)
    self.rdb2 = DenseBlock(features, growth)
    self.rdb3 = DenseBlock(features, growth)

  def forward(self, x):
    return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
  """x4, or with `unshuffle` 2 and 4 BasicSR's x2 and x1."""

  def __init__(self, features, blocks, growth, unshuffle=1):
    super().__init__()
    self.unshuffle = unshuffle
    self.conv_first = conv3(3 * unshuffle**2, features)
    self.body = nn.Sequential(*[RRDB(features, growth) for _ in range(blocks)])
    self.conv_body = conv3(features, features)
    self.conv_up1 = conv3(features, features)
    self.conv_up2 = conv3(features, features)
    self.conv_hr = conv3(features, features)
    self.conv_last = conv3(features, 3)

  def forward(self, x):
    x = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
    x = x + self.conv_body(self.body(x))
    for up in (self.conv_up1, self.conv_up2):
      x = F.leaky_relu(up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
    return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class PlainBlock(nn.Module):
  def __init__(self, features, slope):
    super().__init__()
    self.slope = slope
    self.conv1 = conv3(features, features)
    self.conv2 = conv3(features, features)

  def forward(self, x):
    return x + self.conv2(F.leaky_relu(self.conv1(x), self.slope))


class ResidualNet(RRDBNet):
  def __init__(self, features, blocks):
    super().__init__(features, 0, 1)
    self.body = nn.Sequential(*[PlainBlock(features, 0.2) for _ in range(blocks)])


class MSRResNet(nn.Module):
  def __init__(self, features, blocks):
    super().__init__()
    self.conv_first = conv3(3, features)
    self.body = nn.Sequential(*[PlainBlock(features, 0.0) for _ in range(blocks)])
    self.upconv1 = conv3(features, 4 * features)
    self.upconv2 = conv3(features, 4 * features)
    self.conv_hr = conv3(features, features)
    self.conv_last = conv3(features, 3)

  def forward(self, lr):
    x = self.body(F.leaky_relu(self.conv_first(lr), 0.1))
    x = F.leaky_relu(F.pixel_shuffle(self.upconv1(x), 2), 0.1)
    x = F.leaky_relu(F.pixel_shuffle(self.upconv2(x), 2), 0.1)
    x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.1))
    return x + F.interpolate(lr, scale_factor=4, mode="bilinear", align_corners=False)


class BatchNormBlock(nn.Module):
  def __init__(self, features, slopes):
    super().__init__()
    self.conv1 = conv3(features, features)
    self.bn1 = nn.BatchNorm2d(features)
    self.prelu = nn.PReLU(slopes)
    self.conv2 = conv3(features, features)
    self.bn2 = nn.BatchNorm2d(features)

  def forward(self, x):
    return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


class SRResNet(nn.Module):
  def __init__(self, features, blocks, slopes=1):
    super().__init__()
    self.conv_first = nn.Conv2d(3, features, 9, padding=4)
    self.prelu_first = nn.PReLU(slopes)
    self.body = nn.Sequential(*[BatchNormBlock(features, slopes) for _ in range(blocks)])
    self.conv_body = conv3(features, features)
    self.bn_body = nn.BatchNorm2d(features)
    self.conv_up1 = conv3(features, 4 * features)
    self.prelu_up1 = nn.PReLU(slopes)
    self.conv_up2 = conv3(features, 4 * features)
    self.prelu_up2 = nn.PReLU(slopes)
    self.conv_last = nn.Conv2d(features, 3, 9, padding=4)

  def forward(self, x):
    x = self.prelu_first(self.conv_first(x))
    x = x + self.bn_body(self.conv_body(self.body(x)))
    x = self.prelu_up1(F.pixel_shuffle(self.conv_up1(x), 2))
    x = self.prelu_up2(F.pixel_shuffle(self.conv_up2(x), 2))
    return self.conv_last(x)


class _Classifier(nn.Module):
  """Convolutions, BatchNorm on all but the first, and two linear layers."""

  def forward(self, x):
    x = F.leaky_relu(self.conv0_0(x), 0.2)
    for name in self.names:
      conv, bn = getattr(self, f"conv{name}"), getattr(self, f"bn{name}")
      x = F.leaky_relu(bn(conv(x)), 0.2)
    x = F.leaky_relu(self.linear1(x.flatten(1)), 0.2)
    return self.linear2(x).squeeze(1)


class VGGDiscriminator(_Classifier):
  def __init__(self, features, size):
    super().__init__()
    widths = [1, 2, 4, 8, 8] if size < 256 else [1, 2, 4, 8, 8, 8]
    self.conv0_0 = conv3(3, features)
    self.names, channels = [], features
    for stage, width in enumerate(widths):
      out = features * width
      if stage > 0:
        setattr(self, f"conv{stage}_0", conv3(channels, out, bias=False))
        self.names.append(f"{stage}_0")
      setattr(self, f"conv{stage}_1", nn.Conv2d(out, out, 4, 2, 1, bias=False))
      self.names.append(f"{stage}_1")
      channels = out
    for name in self.names:
      setattr(self, f"bn{name}", nn.BatchNorm2d(features * widths[int(name[0])]))
    self.linear1 = nn.Linear(channels * (size // 2 ** len(widths)) ** 2, 100)
    self.linear2 = nn.Linear(100, 1)


class SRGANDiscriminator(_Classifier):
  def __init__(self, features, size):
    super().__init__()
    self.conv0_0 = conv3(3, features)
    self.names, channels = [], features
    plan = [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)]
    for (width, stride), name in zip(
      plan, ("0_1", "1_0", "1_1", "2_0", "2_1", "3_0", "3_1"), strict=True
    ):
      setattr(self, f"conv{name}", conv3(channels, features * width, stride=stride))
      setattr(self, f"bn{name}", nn.BatchNorm2d(features * width))
      self.names.append(name)
      channels = features * width
    self.linear1 = nn.Linear(channels * (size // 16) ** 2, 16 * features)
    self.linear2 = nn.Linear(16 * features, 1)


class UNetDiscriminator(nn.Module):
  def __init__(self, f):
    super().__init__()

    def normed(i, o, k=3, s=1):
      return nn.utils.spectral_norm(nn.Conv2d(i, o, k, s, 1, bias=False), n_power_iterations=1)

    self.conv0 = conv3(3, f)
    self.conv1 = normed(f, 2 * f, 4, 2)
    self.conv2 = normed(2 * f, 4 * f, 4, 2)
    self.conv3 = normed(4 * f, 8 * f, 4, 2)
    self.conv4 = normed(8 * f, 4 * f)
    self.conv5 = normed(4 * f, 2 * f)
    self.conv6 = normed(2 * f, f)
    self.conv7 = normed(f, f)
    self.conv8 = normed(f, f)
    self.conv9 = conv3(f, 1)

  def forward(self, x):
    def act(x):
      return F.leaky_relu(x, 0.2)

    def up(x):
      return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    x0 = act(self.conv0(x))
    x1 = act(self.conv1(x0))
    x2 = act(self.conv2(x1))
    x = act(self.conv3(x2))
    x = act(self.conv4(up(x))) + x2
    x = act(self.conv5(up(x))) + x1
    x = act(self.conv6(up(x))) + x0
    return self.conv9(act(self.conv8(act(self.conv7(x))))).squeeze(1)


class PatchDiscriminator(nn.Module):
  """PatchGAN, numbered as in pix2pix's code: `model` is a Sequential."""

  def __init__(self, features):
    super().__init__()
    layers = [nn.Conv2d(3, features, 4, 2, 1), nn.LeakyReLU(0.2)]
    for width, stride in ((1, 2), (2, 2), (4, 1)):
      inputs, outputs = features * width, 2 * features * width
      layers += [
        nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2),
      ]
    self.model = nn.Sequential(*layers, nn.Conv2d(8 * features, 1, 4, 1, 1))

  def forward(self, x):
    return self.model(x).squeeze(1)


class ESRGAN(nn.Module):
  """RRDBNet of any number of channels and up-convolutions, with the names of two code bases.

  `ups` factors of 2, `unshuffle` of the input first. names 'basicsr', or 'rrdb_trunk' of ESRGAN's
  own second release.
  """

  def __init__(self, features, blocks, growth, channels=3, ups=2, unshuffle=1, names="basicsr"):
    super().__init__()
    self.body_name, rdb, self.trunk_name, self.up_name, self.hr_name = {
      "basicsr": ("body", "rdb", "conv_body", "conv_up", "conv_hr"),
      "rrdb_trunk": ("RRDB_trunk", "RDB", "trunk_conv", "upconv", "HRconv"),
    }[names]
    self.ups, self.unshuffle, self.rdb = ups, unshuffle, rdb

    def block():
      return nn.ModuleDict({f"{rdb}{i}": DenseBlock(features, growth) for i in (1, 2, 3)})

    self.conv_first = conv3(channels * unshuffle**2, features)
    setattr(self, self.body_name, nn.ModuleList([block() for _ in range(blocks)]))
    setattr(self, self.trunk_name, conv3(features, features))
    for i in range(ups):
      setattr(self, f"{self.up_name}{i + 1}", conv3(features, features))
    setattr(self, self.hr_name, conv3(features, features))
    self.conv_last = conv3(features, channels)

  def forward(self, x):
    x = y = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
    for block in getattr(self, self.body_name):
      z = y
      for i in (1, 2, 3):
        z = block[f"{self.rdb}{i}"](z)
      y = y + 0.2 * z
    x = x + getattr(self, self.trunk_name)(y)
    for i in range(self.ups):
      up = getattr(self, f"{self.up_name}{i + 1}")
      x = F.leaky_relu(up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
    return self.conv_last(F.leaky_relu(getattr(self, self.hr_name)(x), 0.2))


class LeftthomasGenerator(nn.Module):
  """SRGAN's generator with the names of the repository leftthomas/SRGAN: five blocks, tanh."""

  class Upsampling(nn.Module):
    def __init__(self, features):
      super().__init__()
      self.conv = conv3(features, 4 * features)
      self.prelu = nn.PReLU()

    def forward(self, x):
      return self.prelu(F.pixel_shuffle(self.conv(x), 2))

  def __init__(self, features, ups):
    super().__init__()
    self.block1 = nn.Sequential(nn.Conv2d(3, features, 9, padding=4), nn.PReLU())
    for i in range(2, 7):
      setattr(self, f"block{i}", BatchNormBlock(features, 1))
    self.block7 = nn.Sequential(conv3(features, features), nn.BatchNorm2d(features))
    upsampling = [self.Upsampling(features) for _ in range(ups)]
    self.block8 = nn.Sequential(*upsampling, nn.Conv2d(features, 3, 9, padding=4))

  def forward(self, x):
    x = y = self.block1(x)
    for i in range(2, 8):
      y = getattr(self, f"block{i}")(y)
    return (torch.tanh(self.block8(x + y)) + 1) / 2


def vgg(widths, convs):
  """torchvision's `features`: convolutions and ReLUs, a pool after each block."""
  layers, channels = [], 3
  for width, count in zip(widths, convs, strict=True):
    for _ in range(count):
      layers += [conv3(channels, width), nn.ReLU()]
      channels = width
    layers.append(nn.MaxPool2d(2, 2))
  return nn.Sequential(*layers)


def load(module, state):
  """Gives a module the arrays of a state dict, every key of it; returns the module."""
  module.load_state_dict({key: torch.tensor(array) for key, array in state.items()})
  return module


def values_and_gradients(module, image, cotangent):
  """Runs a module forth and back, in training mode.

  Args:
    module: of this file.
    image: numpy [N, H, W, C].
    cotangent: numpy, in the shape of the output (of an image, NHWC).

  Returns:
    Numpy: the output, the gradient of sum(output * cotangent) by the image, and by each parameter
    under its name.
  """
  x = torch.tensor(image).permute(0, 3, 1, 2).requires_grad_()
  y = module.train()(x)
  if y.ndim == 4:
    y = y.permute(0, 2, 3, 1)
  (y * torch.tensor(cotangent)).sum().backward()
  gradients = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
  return y.detach().numpy(), x.grad.permute(0, 2, 3, 1).numpy(), gradients
