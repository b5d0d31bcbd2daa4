"""The arithmetic of ESRGAN's networks, convolution by convolution: the one place that counts it.

A product and its sum are two operations. Only convolutions and linear layers are counted, since in
a network of full width the rest is about one operation in a hundred. What is counted is what the
update needs, whichever program computes it: BasicSR's five forward passes of the discriminator give
the same update as two. So a TFLOP/s of this count is useful work, and rates compare as times do.
"""

from typing import NamedTuple

SCALE = 4
VGG19 = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # convolutions of a block, channels


class Layer(NamedTuple):
  """A convolution padded by (kernel - 1) // 2; a linear layer is one with kernel 1 on one pixel."""

  name: str
  inputs: int
  outputs: int
  height: int  # of the input
  width: int
  kernel: int = 3
  stride: int = 1


def flops(layer: Layer, *, border: bool = True) -> int:
  """Counts the operations of one forward pass on one image.

  The gradient with respect to the weights takes as many, and so does that with respect to the
  input.

  Args:
    layer: the layer.
    border: whether to count the products with the zeros around the image. That is usual (PyTorch's
      FlopCounterMode), but XLA's cost analysis leaves them out.
  """
  rows, columns = (
    _products(side, layer.kernel, layer.stride, border) for side in (layer.height, layer.width)
  )
  return 2 * layer.inputs * layer.outputs * rows * columns


def _products(side: int, kernel: int, stride: int, border: bool) -> int:
  """Counts the pairs of an output's place and a tap along one axis."""
  padding = (kernel - 1) // 2
  starts = range(-padding, side + padding - kernel + 1, stride)
  if border:
    return len(starts) * kernel
  return sum(0 <= start + tap < side for start in starts for tap in range(kernel))


def generator_layers(
  height: int, width: int, *, features: int, blocks: int, growth: int
) -> list[Layer]:
  """Lists the layers of RRDBNet x4 on LR images of height x width."""
  f, lr = features, (height, width)
  layers = [Layer("conv_first", 3, f, *lr)]
  for block in range(blocks):
    for dense in range(1, 4):
      for i in range(1, 6):
        name = f"body.{block}.rdb{dense}.conv{i}"
        layers.append(Layer(name, f + (i - 1) * growth, growth if i < 5 else f, *lr))
  layers.append(Layer("conv_body", f, f, *lr))
  layers.append(Layer("conv_up1", f, f, 2 * height, 2 * width))
  sr = (SCALE * height, SCALE * width)
  return [*layers, *(Layer(name, f, f, *sr) for name in ("conv_up2", "conv_hr")),
          Layer("conv_last", f, 3, *sr)]  # fmt: skip


def discriminator_layers(side: int, features: int) -> list[Layer]:
  """Lists the layers of VGGDiscriminator on images of side x side, below 256."""
  layers, inputs, first = [], 3, side
  for stage, wide in enumerate((1, 2, 4, 8, 8)):
    outputs = features * wide
    layers.append(Layer(f"conv{stage}_0", inputs, outputs, side, side))
    layers.append(Layer(f"conv{stage}_1", outputs, outputs, side, side, kernel=4, stride=2))
    inputs, side = outputs, side // 2
  if first % 32 or first >= 256:
    raise ValueError(f"hr_patch={first} must be a multiple of 32 below 256; try 128")
  layers.append(Layer("linear1", inputs * side**2, 100, 1, 1, kernel=1))
  return [*layers, Layer("linear2", 100, 1, 1, 1, kernel=1)]


def vgg_layers(side: int, width: float = 1.0) -> list[Layer]:
  """Lists the layers of VGG19 to conv5_4 on images of side x side, with channels times `width`."""
  layers, inputs = [], 3
  for block, (count, channels) in enumerate(VGG19, 1):
    outputs = max(1, round(channels * width))
    for i in range(1, count + 1):
      layers.append(Layer(f"conv{block}_{i}", inputs, outputs, side, side))
      inputs = outputs
    side //= 2
  return layers


def train_flops(
  what: str,
  hr_patch: int,
  *,
  generator: dict[str, int],
  discriminator: int,
  vgg: float,
  border: bool = True,
) -> dict[str, int]:
  """Counts the operations of a training step for each image of the batch, by their purpose.

  Args:
    what: 'gan' or 'psnr'.
    hr_patch: side of the HR crops.
    generator: the generator's features, blocks and growth.
    discriminator: the discriminator's features.
    vgg: the factor of VGG19's channels.
    border: whether to count the products with the zeros around an image, see `flops`.

  Raises:
    ValueError: hr_patch is not a multiple of the scale.
  """

  def total(layers: list[Layer]) -> int:
    return sum(flops(layer, border=border) for layer in layers)

  side, rest = divmod(hr_patch, SCALE)
  if rest:
    raise ValueError(f"hr_patch={hr_patch} must be a multiple of {SCALE}; try {SCALE * (side + 1)}")
  g = generator_layers(side, side, **generator)
  # The gradient with respect to the LR image is not needed, nor that of D's own loss to its images.
  parts = {"generator": 2 * total(g) + total(g[1:])}
  if what == "gan":
    d, v = discriminator_layers(hr_patch, discriminator), vgg_layers(hr_patch, vgg)
    parts["perceptual"] = 3 * total(v)  # SR and HR forward, SR back
    parts["discriminator, real and fake"] = 2 * (2 * total(d) + total(d[1:]))
    parts["discriminator, back to the generator"] = total(d)
  return parts


def infer_flops(height: int, width: int, generator: dict[str, int]) -> int:
  """Counts the operations of RRDBNet on one LR image of height x width."""
  return sum(flops(layer) for layer in generator_layers(height, width, **generator))
