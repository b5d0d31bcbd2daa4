"""Plays gcloud for tests/launch_test.py: queued resources, ssh and scp, from a scenario.

`FAKE_GCLOUD` names a folder:

  scenario.json  what will happen, see `Cloud`
  calls.jsonl    every call's arguments, appended
  state.json     how far the story has come
  bin/           first on the workers' PATH (a stand-in for uv)
  worker-N/      the home of worker N; a command sent over ssh really runs there

The error texts are gcloud's: the code in capitals is the API's.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_GCLOUD"])


class Cloud:
  """The story. Scenario fields, all optional:

  exists: the first life has begun before the first call.
  lives: for each life, the states that `describe` answers one after the other; the last stays.
  create_errors: for the n-th create, '' or the API's code to fail with.
  ssh_errors: {number of the ssh or scp call, from 1: status to fail with}.
  describe_errors: {number of the describe call, from 1: API's code}.
  delete_is_ignored: delete works and nothing goes away.
  hosts: how many workers there are.
  missing_hosts: how many of them never answer.
  """

  def __init__(self) -> None:
    self.scenario = json.loads((ROOT / "scenario.json").read_text())
    path = ROOT / "state.json"
    self.state = (
      json.loads(path.read_text())
      if path.exists()
      else {"alive": self.scenario.get("exists", False), "life": 0, "seen": 0, "count": {}}
    )

  def save(self) -> None:
    (ROOT / "state.json").write_text(json.dumps(self.state))

  def count(self, kind: str) -> int:
    self.state["count"][kind] = self.state["count"].get(kind, 0) + 1
    return self.state["count"][kind]

  def fail(self, code: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {code}: as the scenario says", file=sys.stderr)
    return 1

  def homes(self) -> list[pathlib.Path]:
    hosts = self.scenario.get("hosts", 1)
    return [ROOT / f"worker-{i}" for i in range(hosts)]

  def wipe(self) -> None:
    """The machines are gone, and all that ran on them."""
    for home in self.homes():
      pid = home / "sr_jax_run" / "pid"
      if pid.exists():
        try:
          os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
          pass
      shutil.rmtree(home, ignore_errors=True)

  def describe(self, flags: dict) -> int:
    code = self.scenario.get("describe_errors", {}).get(str(self.count("describe")))
    if code:
      return self.fail(code)
    if not self.state["alive"]:
      return self.fail("NOT_FOUND")
    lives = self.scenario.get("lives", [["ACTIVE"]])
    states = lives[min(self.state["life"], len(lives) - 1)]
    state = states[min(self.state["seen"], len(states) - 1)]
    if flags.get("format") == "yaml":
      print(f"state:\n  failedData: {{error: {{message: 'no more capacity'}}}}\n  state: {state}")
      return 0
    self.state["seen"] += 1
    if state in ("SUSPENDED", "FAILED"):
      self.wipe()
    print(state)
    return 0

  def create(self) -> int:
    errors = self.scenario.get("create_errors", [])
    number = self.count("create")
    code = errors[number - 1] if number <= len(errors) else ""
    if code:
      if code == "ALREADY_EXISTS":
        self.state["alive"] = True
      return self.fail(code)
    if self.state["alive"]:
      return self.fail("ALREADY_EXISTS")
    self.state.update(alive=True, seen=0)
    return 0

  def delete(self) -> int:
    if not self.state["alive"]:
      return self.fail("NOT_FOUND")
    if not self.scenario.get("delete_is_ignored"):
      self.wipe()
      self.state.update(alive=False, life=self.state["life"] + 1)
    return 0

  def reachable(self, flags: dict) -> list[pathlib.Path]:
    homes = self.homes()
    homes = homes[: len(homes) - self.scenario.get("missing_hosts", 0)]
    worker = flags.get("worker", "0")
    return homes if worker == "all" else [homes[int(worker)]]

  def ssh_error(self) -> int:
    return self.scenario.get("ssh_errors", {}).get(str(self.count("ssh")), 0)

  def scp(self, words: list[str], flags: dict) -> int:
    status = self.ssh_error()
    if status:
      print("Connection refused", file=sys.stderr)
      return status
    *sources, target = words
    assert target.endswith(":"), target
    for home in self.reachable(flags):
      home.mkdir(exist_ok=True)
      for source in sources:
        shutil.copy(source, home)
    return 0

  def ssh(self, flags: dict) -> int:
    status = self.ssh_error()
    if status:
      print("Connection refused", file=sys.stderr)
      return status
    # As gcloud does it: cut at spaces, and ssh puts it together again for the remote shell.
    command = " ".join(flags["command"].split(" "))
    worst = 0
    for home in self.reachable(flags):
      home.mkdir(exist_ok=True)
      environment = {
        "HOME": str(home),
        "PATH": f"{ROOT / 'bin'}:/usr/bin:/bin",
        "FAKE_GCLOUD": str(ROOT),
      }
      status = subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode
      worst = worst or status
    return worst


def main(argv: list[str]) -> int:
  with open(ROOT / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(argv) + "\n")
  words, flags = [], {}
  for word in argv:
    if word.startswith("--"):
      key, _, value = word[2:].partition("=")
      flags[key] = value
    else:
      words.append(word)
  assert words[:2] == ["compute", "tpus"], argv
  cloud = Cloud()
  verb = tuple(words[2:4])
  if verb == ("queued-resources", "describe"):
    status = cloud.describe(flags)
  elif verb == ("queued-resources", "create"):
    status = cloud.create()
  elif verb == ("queued-resources", "delete"):
    status = cloud.delete()
  elif verb == ("tpu-vm", "ssh"):
    status = cloud.ssh(flags)
  elif verb == ("tpu-vm", "scp"):
    status = cloud.scp(words[4:], flags)
  else:
    raise AssertionError(f"gcloud was called with {argv}")
  cloud.save()
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
