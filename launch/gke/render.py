"""Prints the JobSet of a run on GKE TPUs.

  python launch/gke/render.py --name sr-1 --type v6e-16 --image REGISTRY/sr_jax:COMMIT \\
    -- python -m sr_jax.main --config configs/esrgan.py --workdir gs://BUCKET/sr-1 \\
    | kubectl apply -f -

The same command resumes: delete the finished JobSet (its pods cannot be changed), apply it again,
and the training goes on from the run's last checkpoint. Needs nothing but Python.
"""

import argparse
import csv
import difflib
import json
import pathlib
import re
import string
import sys
from collections.abc import Sequence

_LAUNCH = pathlib.Path(__file__).resolve().parent.parent


def read_types(path: pathlib.Path = _LAUNCH / "tpu_types.tsv") -> dict[str, dict[str, str]]:
  """Returns {type: {column: text}}."""
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  return {row["type"]: row for row in csv.DictReader(lines, delimiter="\t")}


def workdir_of(command: Sequence[str]) -> str:
  """Returns the command's --workdir, '' if it has none."""
  for i, word in enumerate(command):
    name, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-") and name == "workdir":
      return value if equals else "".join(command[i + 1 : i + 2])
  return ""


def render(
  name: str,
  tpu_type: str,
  image: str,
  command: Sequence[str],
  *,
  slices: int = 1,
  spot: bool = False,
  queue: str = "",
  service_account: str = "default",
  max_restarts: int = 3,
  grace_seconds: int = 120,
  run_as_root: bool = False,
) -> str:
  """Returns the JobSet as YAML.

  Half of its lines say what the arguments are, and the rest check them one by one.

  Args:
    name: of the JobSet; pods get it as a prefix.
    tpu_type: of tpu_types.tsv, as v6e-16.
    image: with a tag or digest that never moves: all hosts must run the same commit.
    command: the training command, word by word; its --workdir is a bucket.
    slices: how many slices of that type.
    spot: ask for Spot nodes.
    queue: Kueue LocalQueue, '' for none.
    service_account: Kubernetes service account that may write the bucket.
    max_restarts: restarts after failures of the program; lost nodes do not count.
    grace_seconds: between TERM and KILL.
    run_as_root: where the node's TPU devices are root's.

  Raises:
    ValueError: with the value, the rule and the fix.
  """
  # The longest pod name is NAME-slice-N-N-xxxxx, a DNS label of 63.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
    raise ValueError(
      f"name={name!r} must be at most 40 of a-z, 0-9 and '-', a letter first; try --name sr-1"
    )
  types = {key: row for key, row in read_types().items() if row["gke_topology"] != "-"}
  if tpu_type not in types:
    near = difflib.get_close_matches(tpu_type, types, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"type={tpu_type!r} must be one of {', '.join(types)}{hint}")
  if slices < 1:
    raise ValueError(f"slices={slices} must be 1 or more")
  if not command:
    raise ValueError("no command; it comes after --, as -- python -m sr_jax.main --config ...")
  workdir = workdir_of(command)
  if not workdir.startswith(("gs://", "/mnt/")):
    raise ValueError(
      f"--workdir={workdir!r} must outlive the pod, or a restart begins anew;"
      " try --workdir gs://BUCKET/RUN (or a volume under /mnt/, which you add to the template)"
    )
  tag = image.rpartition("/")[2]
  if "@sha256:" not in image and (":" not in tag or tag.endswith(":latest")):
    raise ValueError(
      f"image={image!r} needs a tag that does not move, or hosts may run different code;"
      " try IMAGE:$(git rev-parse --short HEAD)"
    )

  row = types[tpu_type]
  selector = {
    "cloud.google.com/gke-tpu-accelerator": row["gke_accelerator"],
    "cloud.google.com/gke-tpu-topology": row["gke_topology"],
  }
  tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
  if spot:
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations.append(
      {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}
    )
  labels = {"app.kubernetes.io/name": "sr-jax"}
  if queue:
    labels["kueue.x-k8s.io/queue-name"] = queue
  hosts = int(row["hosts"])
  values = {
    "name": name,
    "labels": labels,
    "max_restarts": max_restarts,
    "slices": slices,
    "hosts": hosts,
    "grace_seconds": grace_seconds,
    "service_account": service_account,
    "node_selector": selector,
    "tolerations": tolerations,
    "security_context": {"runAsUser": 0} if run_as_root else {"runAsNonRoot": True},
    "image": image,
    # Kubernetes replaces $(NAME) in a command by a variable; $$ is its way to say $.
    "command": [word.replace("$(", "$$(") for word in command],
    "chips": int(row["chips"]) // hosts,
  }
  template = string.Template((_LAUNCH / "gke" / "jobset.yaml.tmpl").read_text())
  # JSON is YAML: whatever is in a value, it is one value. The first lines are about the template.
  rendered = template.substitute(
    {"value": "$value", **{key: json.dumps(value) for key, value in values.items()}}
  )
  return "".join(line for line in rendered.splitlines(keepends=True) if not line.startswith("#"))


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--name", required=True)
  parser.add_argument("--type", required=True, dest="tpu_type")
  parser.add_argument("--image", required=True)
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--queue", default="", help="Kueue LocalQueue")
  parser.add_argument("--service-account", default="default")
  parser.add_argument("--max-restarts", type=int, default=3)
  parser.add_argument("--grace-seconds", type=int, default=120)
  parser.add_argument("--run-as-root", action="store_true")
  own, command = list(argv), []
  if "--" in own:
    at = own.index("--")
    own, command = own[:at], own[at + 1 :]
  flags = vars(parser.parse_args(own))
  try:
    text = render(command=command, **flags)
  except ValueError as error:
    print(f"render.py: {error}", file=sys.stderr)
    return 2
  sys.stdout.write(text)
  name = flags["name"]
  print(f"render.py: it costs until it is deleted: kubectl delete jobset {name}", file=sys.stderr)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
