"""Times Real-ESRGAN's degradations beside the same in PyTorch, or asks TPU's compiler about them.

  taskset -c 0 python -m benchmarks.degradations            seconds an example, on one core
  python -m benchmarks.degradations --topology v5e:2x2      cycles, by the compiler's own estimate
  python -m benchmarks.degradations --topology v5e:2x2 --step       the GAN step's, without them
  python -m benchmarks.degradations --jpeg                  how far its JPEG is from libjpeg's

Both sides degrade crops of 400x400 one by one, with the same draws. What PyTorch does is what the
released trainer does with its batch: the same operations on images of the sizes that they have.
The estimate needs the package libtpu (`benchmarks/pod.py` says where it may lie).
"""

import argparse
import io
import json
import os
import time

import jax
import numpy as np
from PIL import Image
import skimage.data

from benchmarks import estimate
from benchmarks import pod
from configs import realesrgan
from sr_jax.data.degrade import chain, draws, jpeg

SETTINGS = draws.Settings(4, draws.FIRST, draws.SECOND, draws.End(), sharpen=True)
CROP = 400


def crops(n: int) -> np.ndarray:
  image = skimage.data.astronaut()
  corners = np.random.default_rng(0).integers(0, 512 - CROP, (n, 2))
  return np.stack([image[y : y + CROP, x : x + CROP] for y, x in corners])


def degrade_all(keys, hr):
  return jax.lax.map(lambda each: chain.degrade(*each, SETTINGS), (keys, hr))


def time_sr_jax(n: int, rounds: int) -> list[float]:
  """Seconds an example, of each round but the first, which compiles."""
  keys, hr, degrade = jax.random.split(jax.random.key(0), n), crops(n), jax.jit(degrade_all)
  jax.block_until_ready(degrade(keys, hr))
  times = []
  for _ in range(rounds):
    begin = time.process_time()
    jax.block_until_ready(degrade(keys, hr))
    times.append((time.process_time() - begin) / n)
  return times


def time_torch(n: int, rounds: int) -> list[float]:
  """The same in PyTorch, with its own noise."""
  import torch

  from benchmarks import torch_degradation

  torch.set_num_threads(1)
  keys = jax.random.split(jax.random.key(0), n)
  drawn = jax.device_get(jax.vmap(lambda key: draws.draw(key, SETTINGS))(keys))
  images = [torch.tensor(np.moveaxis(image / np.float32(255), -1, 0)[None]) for image in crops(n)]

  def normal(number, height, width):
    return torch.randn(1, 3, height, width)

  def degrade(i):
    parts = ({name: value[i] for name, value in part._asdict().items()} for part in drawn)
    lr = torch_degradation.degrade(
      images[i], *parts, 4, normal, lambda mean, _: torch.poisson(mean)
    )
    return (lr * 255).round().to(torch.uint8)

  times = []
  with torch.no_grad():
    degrade(0)
    for _ in range(rounds):
      begin = time.process_time()
      for i in range(n):
        degrade(i)
      times.append((time.process_time() - begin) / n)
  return times


def estimate_examples(topology: str, n: int) -> dict:
  """What TPU's compiler says of `n` examples on one chip, one after the other."""
  place = jax.sharding.SingleDeviceSharding(pod.find_devices(topology)[0])
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
  arguments = (
    jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=place),
    jax.ShapeDtypeStruct((n, CROP, CROP, 3), np.uint8, sharding=place),
  )
  text = jax.jit(degrade_all).lower(*arguments).compile().as_text()
  return estimate.sum_up(text, topology.partition(":")[0])


def estimate_step(topology: str, n: int) -> dict:
  """What it says of the step of configs/realesrgan.py, of `n` patches a chip, not degraded."""
  config = realesrgan.get_config()
  config.dtype = "bfloat16"
  compiled, _, _ = pod.compile_step(config, topology, n)
  return estimate.sum_up(compiled.as_text(), topology.partition(":")[0])


def beside_libjpeg(qualities=(30, 40, 50, 60, 70, 80, 90, 95)) -> dict[int, tuple[float, float]]:
  """{quality: (mean difference to libjpeg's image, what libjpeg's own loss is)}, levels of 255."""
  images = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")]
  images = [image[:288, :288] for image in images]
  compress, found = jax.jit(jpeg.compress), {}
  for quality in qualities:
    differences, losses = [], []
    for image in images:
      file = io.BytesIO()
      Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
      theirs = np.moveaxis(np.asarray(Image.open(file)).astype(float), -1, 0)
      planar = np.moveaxis(image, -1, 0)
      ours = compress(planar / np.float32(255), np.float32(quality), np.int32(288)) * 255
      differences.append(np.abs(ours - theirs).mean())
      losses.append(np.abs(planar - theirs).mean())
    found[quality] = round(float(np.mean(differences)), 2), round(float(np.mean(losses)), 2)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--examples", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--topology", default="", help="as libtpu names it: v5e:2x2")
  parser.add_argument("--step", action="store_true", help="of the training step instead")
  parser.add_argument("--jpeg", action="store_true", help="compare with libjpeg, and end")
  args = parser.parse_args()
  if args.jpeg:
    print(json.dumps(beside_libjpeg()))
    return
  if args.topology:
    found = (estimate_step if args.step else estimate_examples)(args.topology, args.examples)
    found["estimated_ms_an_example"] = found["estimated_ms"]["sum"] / args.examples
    print(json.dumps(found))
    return
  cores = len(os.sched_getaffinity(0))
  for name, measure in (("sr_jax", time_sr_jax), ("torch", time_torch)):
    times = measure(args.examples, args.rounds)
    told = {
      "program": name,
      "cores": cores,
      "examples": args.examples,
      "cpu_ms_an_example": [round(1e3 * t, 1) for t in times],
      "examples_a_second_a_core": round(1 / float(np.median(times)), 2),
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
  main()
