"""launch/ without a cloud: stand-ins for gcloud and srun, and the formats' own checkers.

What no test here can say is whether a cloud agrees; launch/README.md says so too.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

from PIL import Image
import pytest

from sr_jax.machine import cluster

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FAKES = ROOT / "tests" / "launch_fakes"

pytestmark = pytest.mark.skipif(
  shutil.which("bash") is None or shutil.which("setsid") is None, reason="needs bash and setsid"
)


def tool(name: str) -> str:
  """Returns the path of a program beside this Python or on PATH; skips without it."""
  path = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  return path or pytest.skip(f"{name} is not installed")


def executable(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def python_stub(script: pathlib.Path) -> str:
  """A program that runs a Python file; -S because it is called often and needs no packages."""
  return f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -S -E {script} "$@"\n'


class FakeCloud:
  """A repository with launch/ in it, a fake gcloud first on PATH, and a scenario."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / "cloud"
    self.repository = folder / "repository"
    executable(folder / "bin" / "gcloud", python_stub(FAKES / "gcloud.py"))
    # On the workers: makes an "environment" whose python is this one.
    executable(
      self.root / "bin" / "uv",
      "#!/usr/bin/env bash\n"
      'printf "%s\\n" "$*" >> "$HOME/uv.log"\n'
      'if [[ "$1 $2" == "pip freeze" ]]; then\n'
      '  cat "$FAKE_GCLOUD/packages-${HOME##*/}" 2>/dev/null || echo jax==1; exit\n'
      "fi\n"
      'if [[ "$1" == venv ]]; then\n'
      '  mkdir -p "${@: -1}/bin"\n'
      f'  ln -sf {shlex.quote(sys.executable)} "${{@: -1}}/bin/python"\n'
      "fi\n",
    )
    self.environment = {
      "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
      "HOME": str(folder),
      "FAKE_GCLOUD": str(self.root),
      "TMPDIR": str(folder),
      "GIT_CONFIG_GLOBAL": os.devnull,
    }
    shutil.copytree(LAUNCH, self.repository / "launch")
    (self.repository / "requirements.txt").write_text("jax\n")
    self.git("init", "--quiet")
    self.git("add", ".")
    self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "first")
    self.commit = self.git("rev-parse", "HEAD").strip()
    self.play()

  def git(self, *words: str) -> str:
    return subprocess.run(
      ["git", "-C", str(self.repository), *words],
      check=True, capture_output=True, text=True, env=self.environment,
    ).stdout  # fmt: skip

  def play(self, *, program: tuple[str, ...] = ("ok",), second=None, **scenario) -> None:
    """Sets the scenario (gcloud.py) and the program's story (program.py), worker 1's by itself."""
    (self.root / "scenario.json").write_text(json.dumps(scenario))
    (self.root / "program-worker-0.json").write_text(json.dumps(program))
    (self.root / "program-worker-1.json").write_text(json.dumps(second or program))

  def command(self, *words: str) -> list[str]:
    flags = ["--zone", "test-a", "--poll-seconds", "0", "--grace-seconds", "5"]
    script = str(self.repository / "launch" / "tpu_vm.sh")
    return ["bash", script, *words[:2], *flags, *words[2:]]

  def __call__(self, *words: str, status: int = 0) -> subprocess.CompletedProcess:
    """Runs tpu_vm.sh and checks its exit status."""
    done = subprocess.run(
      self.command(*words), env=self.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done

  def calls(self, verb: str = "") -> list[list[str]]:
    path = self.root / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [json.loads(line) for line in lines]
    return [call for call in calls if not verb or call[3] == verb]

  def starts(self, worker: int = 0) -> list[dict]:
    path = self.root / f"starts-worker-{worker}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def training(self, *arguments: str) -> list[str]:
    return ["--", "python", str(FAKES / "program.py"), *arguments]

  def wait_for(self, name: str) -> None:
    end = time.monotonic() + 20
    while not (self.root / name).exists():
      assert time.monotonic() < end, f"{name} did not appear"
      time.sleep(0.02)

  def kill_all(self) -> None:
    for pid in self.root.glob("worker-*/sr_jax_run/pid"):
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except (ProcessLookupError, ValueError):
        pass


@pytest.fixture
def cloud(tmp_path):
  tool("git")
  fake = FakeCloud(tmp_path)
  yield fake
  fake.kill_all()


# --- tpu_vm.sh, scenario by scenario -------------------------------------------------------------


def test_create_waits_until_active_and_says_what_costs(cloud):
  cloud.play(lives=[["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  done = cloud("create", "sr-1", "--type", "v6e-16", "--spot", "--project", "p 1")
  (create,) = cloud.calls("create")
  assert create[4] == "sr-1"
  assert set(create[5:]) >= {
    "--node-id=sr-1",
    "--zone=test-a",
    "--project=p 1",
    "--accelerator-type=v6e-16",
    "--runtime-version=v2-alpha-tpuv6e",
    "--spot",
  }
  assert len(cloud.calls("describe")) == 1 + 4
  delete = r"delete sr-1 --zone=test-a --project=p\ 1 --yes-delete sr-1"
  assert done.stderr.count("costs money until it is deleted") == 2
  assert delete in done.stderr


def test_create_keeps_what_exists(cloud):
  cloud.play(exists=True)
  assert "exists already" in cloud("create", "sr-1", "--type", "v6e-8").stderr
  assert not cloud.calls("create")


def test_create_takes_already_exists_for_an_answer(cloud):
  """Another terminal was faster, between the question and the request."""
  cloud.play(create_errors=["ALREADY_EXISTS"])
  assert "it is kept" in cloud("create", "sr-1", "--type", "v6e-8").stderr


def test_create_says_what_to_do_about_quota(cloud):
  cloud.play(create_errors=["RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' exceeded"])
  done = cloud("create", "sr-1", "--type", "v6e-8", status=3)
  assert "no quota for v6e-8 in test-a" in done.stderr
  assert "costs money" not in done.stderr


def test_create_reports_a_request_that_failed(cloud):
  cloud.play(lives=[["CREATING", "FAILED"]])
  done = cloud("create", "sr-1", "--type", "v6e-8", status=4)
  assert "no more capacity" in done.stderr
  assert "--yes-delete sr-1" in done.stderr
  assert not cloud.calls("delete")


def test_create_does_nothing_where_it_does_not_know(cloud):
  cloud.play(describe_errors={"1": "UNAUTHENTICATED"})
  cloud("create", "sr-1", "--type", "v6e-8", status=4)
  assert not cloud.calls("create")


def test_words_reach_every_worker_as_they_were(cloud):
  words = ["a b", "", "it's", 'say "hi"', "$HOME", "`id`", "back\\slash", "*", "a;b&c|d", "  x  "]
  words += ["--config.psnr.x=('a:1',)", "gs://b/r", "ü", "line\nbreak", "~", "#no"]
  cloud.play(exists=True, hosts=2)
  cloud("setup", "sr-1")
  cloud("run", "sr-1", *cloud.training(*words))
  for worker in (0, 1):
    _wait_for_state(cloud, worker, "finished")
    (start,) = cloud.starts(worker)
    assert start["argv"] == words
    assert start["commit"] == cloud.commit
    # In the unpacked commit, which is no more than the commit.
    assert start["cwd"].endswith(f"sr_jax-{cloud.commit}")
    assert start["files"] == ["launch", "requirements.txt"]


def _wait_for_state(cloud, worker: int, state: str) -> str:
  home = cloud.root / f"worker-{worker}"
  environment = {**cloud.environment, "HOME": str(home)}
  end = time.monotonic() + 20
  while True:
    line = subprocess.run(
      ["bash", str(home / "tpu_vm_worker.sh"), "state"],
      env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if f"state={state} " in line:
      return line
    assert time.monotonic() < end, line
    time.sleep(0.05)


def test_ssh_that_fails_is_tried_again(cloud):
  cloud.play(exists=True, ssh_errors={"1": 255, "2": 1, "4": 255})
  done = cloud("setup", "sr-1")
  assert "try 2 of 5 failed" in done.stderr
  assert cloud.commit in done.stdout
  assert len(cloud.calls("scp")) == 3
  assert len(cloud.calls("ssh")) == 2


def test_ssh_that_always_fails_ends(cloud):
  cloud.play(exists=True, ssh_errors={str(i): 255 for i in range(1, 9)})
  cloud("setup", "sr-1", "--ssh-tries", "3", status=255)
  assert len(cloud.calls()) == 3


def test_setup_refuses_uncommitted_changes(cloud):
  (cloud.repository / "requirements.txt").write_text("changed\n")
  assert "uncommitted" in cloud("setup", "sr-1", status=2).stderr
  assert not cloud.calls()
  cloud.play(exists=True)
  cloud("setup", "sr-1", "--commit", "HEAD")
  installed = cloud.root / "worker-0" / "sr_jax" / "requirements.txt"
  assert installed.read_text() == "jax\n"


def test_setup_twice_installs_once(cloud):
  cloud.play(exists=True)
  cloud("setup", "sr-1")
  first = (cloud.root / "worker-0" / "uv.log").read_text()
  assert "jax[tpu]" in first
  cloud("setup", "sr-1")
  assert (cloud.root / "worker-0" / "uv.log").read_text() == first


def test_setup_notices_a_host_that_does_not_answer(cloud):
  cloud.play(exists=True, hosts=4, missing_hosts=1)
  done = cloud("setup", "sr-1", "--type", "v6e-16", status=4)
  assert "3 of 4 hosts" in done.stderr


def test_setup_notices_hosts_with_different_packages(cloud):
  cloud.play(exists=True, hosts=2)
  (cloud.root / "packages-worker-1").write_text("jax==2\n")
  assert "the hosts differ" in cloud("setup", "sr-1", status=4).stderr


def test_run_again_is_the_same_run_and_another_command_is_refused(cloud):
  cloud.play(exists=True, hosts=2, program=["hang"])
  cloud("setup", "sr-1")
  cloud("run", "sr-1", *cloud.training("a"))
  assert "running already" in cloud("run", "sr-1", *cloud.training("a")).stderr
  cloud("run", "sr-1", *cloud.training("b"), status=13)
  for worker in (0, 1):
    cloud.wait_for(f"ready-worker-{worker}")
    assert [start["argv"] for start in cloud.starts(worker)] == [["a"]]
  assert cloud("status", "sr-1").stdout.count("state=running") == 2


def test_run_that_starts_on_some_hosts_is_stopped_on_all(cloud):
  cloud.play(exists=True, hosts=2, program=["hang"])
  cloud("setup", "sr-1")
  (cloud.root / "worker-1" / "sr_jax_commit").unlink()
  done = cloud("run", "sr-1", *cloud.training(), status=14)
  assert "not all hosts started" in done.stderr
  _wait_for_state(cloud, 0, "stopped")


@pytest.mark.parametrize("program", ["hang", "deaf"])
def test_stop_ends_the_training_and_run_resumes(cloud, program):
  cloud.play(exists=True, program=[program, "ok"])
  cloud("setup", "sr-1")
  cloud("run", "sr-1", *cloud.training())
  cloud.wait_for("ready-worker-0")
  done = cloud("stop", "sr-1", "--grace-seconds", "1")
  assert "state=stopped" in done.stdout
  assert "costs money" in done.stderr
  log = cloud("logs", "sr-1").stdout
  assert ("saved a checkpoint" in log) == (program == "hang")
  assert ("sr_jax: exit status 0" in log) == (program == "hang")
  assert ("killed" in done.stderr) == (program == "deaf")
  cloud("run", "sr-1", *cloud.training())
  _wait_for_state(cloud, 0, "finished")
  assert len(cloud.starts()) == 2
  assert not cloud.calls("delete")


def test_logs_are_one_workers_last_lines(cloud):
  cloud.play(exists=True, hosts=2)
  cloud("setup", "sr-1")
  cloud("run", "sr-1", *cloud.training())
  for worker in (0, 1):
    _wait_for_state(cloud, worker, "finished")
  assert cloud("logs", "sr-1").stdout.count("start 1: ok") == 1
  assert cloud("logs", "sr-1", "--worker", "all").stdout.count("start 1: ok") == 2
  assert len(cloud("logs", "sr-1", "--lines", "1").stdout.splitlines()) == 1


def test_status_says_what_is_not_there(cloud):
  assert "NONE" in cloud("status", "sr-1", status=5).stdout


@pytest.mark.parametrize("given", [[], ["--yes-delete", "sr-2"], ["--yes-delete", "sr"]])
@pytest.mark.parametrize("verb", ["delete", "babysit"])
def test_nothing_is_deleted_without_its_exact_name(cloud, verb, given):
  cloud.play(exists=True)
  extra = [] if verb == "delete" else ["--type", "v6e-8"]
  command = [] if verb == "delete" else cloud.training()
  done = cloud(verb, "sr-1", *extra, *given, *command, status=2)
  assert "repeat the exact name, --yes-delete sr-1" in done.stderr
  assert not cloud.calls()


def test_delete(cloud):
  cloud.play(exists=True)
  assert "sr-1 is gone" in cloud("delete", "sr-1", "--yes-delete", "sr-1").stderr
  (delete,) = cloud.calls("delete")
  assert delete[4] == "sr-1" and "--force" in delete
  # Again, or in the wrong zone: no comfort that would be wrong.
  done = cloud("delete", "sr-1", "--yes-delete", "sr-1", status=5)
  assert "there is no sr-1 in test-a" in done.stderr
  assert len(cloud.calls("delete")) == 1


def test_delete_that_did_not_work_is_said(cloud):
  cloud.play(exists=True, delete_is_ignored=True)
  done = cloud("delete", "sr-1", "--yes-delete", "sr-1", status=4)
  assert "still there (ACTIVE) and may cost money" in done.stderr


BABYSIT = ("babysit", "sr-1", "--type", "v6e-8", "--spot", "--yes-delete", "sr-1")


def test_babysit_replaces_what_was_preempted_and_runs_the_same_command(cloud):
  life = ["CREATING", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED"]
  cloud.play(lives=[life, ["PROVISIONING", "ACTIVE"]], program=["hang", "ok"])
  done = cloud(*BABYSIT, *cloud.training("the same", "$words"))
  assert "was preempted (SUSPENDED)" in done.stderr
  assert [start["argv"] for start in cloud.starts()] == [["the same", "$words"]] * 2
  first, second = cloud.calls("create")
  assert first == second and "--spot" in first
  assert len(cloud.calls("delete")) == 1
  assert "finished" in done.stderr and "costs money until it is deleted" in done.stderr


def test_babysit_preempted_before_the_start(cloud):
  cloud.play(lives=[["ACTIVE", "SUSPENDED"], ["ACTIVE"]], ssh_errors={"1": 1})
  cloud(*BABYSIT, "--ssh-tries", "1", "--max-failures", "1", *cloud.training())
  assert len(cloud.starts()) == 1
  assert len(cloud.calls("create")) == 2


def test_babysit_restarts_all_hosts_when_one_fails(cloud):
  cloud.play(hosts=2, program=["hang", "ok"], second=["fail", "ok"])
  command = cloud.training()
  done = cloud("babysit", "sr-1", "--type", "v4-16", "--yes-delete", "sr-1", *command)
  assert "failure 1 of 3 (failed)" in done.stderr
  assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]
  assert len(cloud.calls("create")) == 1


def test_babysit_gives_up(cloud):
  cloud.play(program=["fail"])
  done = cloud(*BABYSIT, "--max-failures", "3", *cloud.training(), status=7)
  assert len(cloud.starts()) == 3
  assert "gave up after 3 failures" in done.stderr
  assert "start 3: fail" in done.stdout
  # The last words are about money.
  assert "costs money until it is deleted" in done.stderr.partition("failure 3 of 3")[2]
  assert not cloud.calls("delete")


def test_babysit_gives_up_on_requests_that_fail(cloud):
  cloud.play(lives=[["CREATING", "FAILED"]])
  cloud(*BABYSIT, "--max-failures", "2", *cloud.training(), status=7)
  assert len(cloud.calls("create")) == 2


def test_babysit_does_not_repeat_what_quota_refused(cloud):
  cloud.play(create_errors=["RESOURCE_EXHAUSTED"])
  cloud(*BABYSIT, *cloud.training(), status=3)
  assert len(cloud.calls("create")) == 1


def test_babysit_replaces_what_does_not_answer(cloud):
  # scp, install and start work, then two looks at the program fail.
  cloud.play(ssh_errors={"4": 255, "5": 255}, program=["hang", "ok"])
  done = cloud(*BABYSIT, "--ssh-tries", "2", *cloud.training())
  assert "does not answer" in done.stderr
  assert len(cloud.calls("create")) == 2 and len(cloud.starts()) == 2


def test_babysit_survives_a_connection_and_a_login_that_flicker(cloud):
  cloud.play(ssh_errors={"4": 255}, describe_errors={"4": "UNAVAILABLE"}, program=["ok"])
  cloud(*BABYSIT, *cloud.training())
  assert len(cloud.calls("create")) == 1 and len(cloud.starts()) == 1
  assert not cloud.calls("delete")


def test_babysit_deletes_in_the_end_if_asked(cloud):
  done = cloud(*BABYSIT, "--delete-after", *cloud.training())
  assert "sr-1 is gone" in done.stderr
  assert len(cloud.calls("delete")) == 1


@pytest.mark.parametrize("verb", ["stop", "delete"])
def test_babysit_respects_what_is_done_by_hand(cloud, verb):
  # One host has finished, the other has not: no host alone says what happened.
  cloud.play(hosts=2, program=["hang"], second=["ok"])
  babysit = ("babysit", "sr-1", "--type", "v4-16", "--yes-delete", "sr-1")
  words = cloud.command(*babysit, *cloud.training())
  process = subprocess.Popen(
    words, env=cloud.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  )
  try:
    cloud.wait_for("ready-worker-0")
    # Slow enough for the two stories not to write into each other.
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    cloud(verb, "sr-1", *(["--yes-delete", "sr-1"] if verb == "delete" else []))
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 6, errors[-2000:]
  assert len(cloud.calls("create")) == 1


# One command line a verb; also what the linter reads.
DRY_RUNS = [
  ["create", "sr-1", "--type", "v6e-8", "--spot"],
  ["setup", "sr-1", "--internal-ip"],
  ["run", "sr-1", "--", "python", "-m", "sr_jax.main", "--config", "configs/esrgan.py"],
  ["logs", "sr-1", "--follow"],
  ["status", "sr-1", "--project", "p"],
  ["stop", "sr-1"],
  ["delete", "sr-1", "--yes-delete", "sr-1"],
  ["babysit", "sr-1", "--type", "v4-16", "--yes-delete", "sr-1", "--delete-after", "--", "a b"],
]


@pytest.mark.parametrize("words", DRY_RUNS, ids=lambda words: words[0])
def test_dry_run_prints_and_calls_nothing(cloud, words):
  done = cloud(*words[:2], "--dry-run", *words[2:])
  assert not cloud.calls()
  assert not list(cloud.root.glob("worker-*"))
  commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("gcloud ")]
  assert commands
  verbs = {command[4] for command in commands}
  assert verbs >= {
    "create": {"describe", "create"},
    "setup": {"scp", "ssh"},
    "delete": {"delete"},
    "babysit": {"describe", "create", "scp", "ssh", "delete"},
  }.get(words[0], {"ssh"})


@pytest.mark.parametrize(
  "words, message",
  [
    (["create", "sr-1"], "create needs --type"),
    (["create", "sr-1", "--type", "v6e-9"], "is not in launch/tpu_types.tsv"),
    (["create", "SR_1", "--type", "v6e-8"], "must be lower-case"),
    (["create", "-x", "--type", "v6e-8"], "must be lower-case"),
    (["run", "sr-1"], "run needs a command"),
    (["stop", "sr-1", "--", "x"], "stop takes no command"),
    (["stop", "sr-1", "--zoen", "x"], "unknown argument '--zoen'"),
    (["stop", "sr-1", "--grace-seconds", "a"], "must be a whole number"),
    (["stop", "sr-1", "--project", "--dry-run"], "--project needs a value"),
    (["destroy", "sr-1"], "must be one of create setup run"),
  ],
)
def test_usage(cloud, words, message):
  assert message in cloud(*words, status=2).stderr
  assert not cloud.calls()


# --- the table of types --------------------------------------------------------------------------


def _render():
  spec = importlib.util.spec_from_file_location("launch_gke_render", LAUNCH / "gke" / "render.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_types_agree_with_themselves():
  types = _render().read_types()
  assert {"v4-8", "v5litepod-8", "v5p-8", "v6e-8", "v6e-16"} <= types.keys()
  for name, row in types.items():
    generation, _, number = name.partition("-")
    cores = generation in ("v2", "v3", "v4", "v5p")
    chips, hosts = int(row["chips"]), int(row["hosts"])
    assert chips == int(number) // (2 if cores else 1), name
    assert chips % hosts == 0 and chips // hosts in (1, 4, 8), name
    # Several hosts have four chips each, on every generation.
    assert hosts == 1 or chips // hosts == 4, name
    assert re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", row["example_zone"]), name
    if row["gke_topology"] != "-":
      sides = [int(side) for side in row["gke_topology"].split("x")]
      product = 1
      for side in sides:
        product *= side
      assert product == chips, name
      assert len(sides) == (3 if generation in ("v4", "v5p") else 2), name
      assert row["gke_machine"].endswith(f"-{chips // hosts}t"), name


# --- GKE -----------------------------------------------------------------------------------------

TRAINING = ["python", "-m", "sr_jax.main", "--config", "configs/esrgan.py", "--workdir=gs://b/r"]


def _jobset(**flags) -> dict:
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  flags = {"command": TRAINING, "image": "r/sr_jax:abc", **flags}
  return yaml.safe_load(_render().render("sr-1", flags.pop("tpu_type", "v6e-16"), **flags))


def test_jobset_asks_for_the_whole_slice_and_restarts_as_one():
  jobset = _jobset(slices=2, spot=True, queue="team", max_restarts=7)
  assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
  (group,) = jobset["spec"]["replicatedJobs"]
  assert group["replicas"] == 2
  job = group["template"]["spec"]
  assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
  # A lost node becomes the reason that the JobSet's rule does not count.
  assert job["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["securityContext"] == {"runAsNonRoot": True}
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["command"] == TRAINING
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_keeps_every_word_of_the_command():
  words = ["a b", "it's", 'say "hi"', "$name", "${x}", "# no", "a: b", "{}", "ü", "line\nbreak", ""]
  command = [*TRAINING, *words, "$(HOME)"]
  pod = _jobset(command=command)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  # Kubernetes turns $$( back into $(.
  assert pod["spec"]["containers"][0]["command"] == [*TRAINING, *words, "$$(HOME)"]


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"tpu_type": "v6e16"}, "did you mean v6e-16"),
    ({"tpu_type": "v3-8"}, "must be one of"),
    ({"image": "r/sr_jax"}, "needs a tag"),
    ({"image": "r:5000/sr_jax"}, "needs a tag"),
    ({"image": "r/sr_jax:latest"}, "needs a tag"),
    ({"command": []}, "no command"),
    ({"command": ["python", "--workdir", "runs/x"]}, "must outlive the pod"),
    ({"slices": 0}, "1 or more"),
  ],
)
def test_render_refuses(flags, message):
  flags = {"tpu_type": "v6e-16", "image": "r/sr_jax:abc", "command": TRAINING, **flags}
  with pytest.raises(ValueError, match=message):
    _render().render("sr-1", **flags)


def test_render_as_a_program():
  script = [sys.executable, str(LAUNCH / "gke" / "render.py"), "--name", "sr-1"]
  script += ["--image", "r/sr_jax@sha256:0", "--type"]
  done = subprocess.run([*script, "v6e-8", "--", *TRAINING], capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.startswith("apiVersion: jobset.x-k8s.io/v1alpha2\n")
  assert "kubectl delete jobset sr-1" in done.stderr
  done = subprocess.run([*script, "v9", "--", *TRAINING], capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == "" and "must be one of" in done.stderr


def _undeclared(given, parsed, path: str = "") -> list[str]:
  """Returns the paths of `given` that a typed parser dropped from `parsed`."""
  if isinstance(given, dict):
    found = []
    for key, value in given.items():
      if not isinstance(parsed, dict) or key not in parsed:
        found.append(f"{path}.{key}")
      else:
        found += _undeclared(value, parsed[key], f"{path}.{key}")
    return found
  if isinstance(given, list):
    pairs = enumerate(zip(given, parsed, strict=True))
    return [name for i, (a, b) in pairs for name in _undeclared(a, b, f"{path}[{i}]")]
  return []


@pytest.mark.developer("kubeflow_trainer_api")
@pytest.mark.parametrize("tpu_type", ["v6e-8", "v5p-32"])
def test_jobset_against_the_published_types(tpu_type):
  """Kubeflow publishes the types of JobSet's CRD for Python, generated from it."""
  from kubeflow_trainer_api import models

  jobset = _jobset(tpu_type=tpu_type, spot=True, queue="q")
  parsed = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
  assert _undeclared(jobset, parsed) == []
  # The check sees what it is for: a wrong name, a wrong kind of value.
  wrong = json.loads(json.dumps(jobset))
  wrong["spec"]["replicatedJob"] = wrong["spec"]["failurePolicy"]["maxRestart"] = 1
  wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["container"] = []
  found = _undeclared(wrong, models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict())
  assert len(found) == 3
  wrong["spec"]["failurePolicy"]["maxRestarts"] = "many"
  with pytest.raises(ValueError):
    models.JobsetV1alpha2JobSet.from_dict(wrong)


@pytest.mark.developer("kubernetes_validate")
def test_jobs_of_the_jobset_against_kubernetes():
  """JobSet's CRD leaves the meaning of values to Kubernetes: each job is a batch/v1 Job."""
  import kubernetes_validate

  job = _jobset(spot=True)["spec"]["replicatedJobs"][0]["template"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
  kubernetes_validate.validate(job, "1.31", strict=True)
  job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
  with pytest.raises(Exception, match="resource"):
    kubernetes_validate.validate(job, "1.31", strict=True)


def test_jobset_has_the_values_that_its_types_do_not_name():
  """What JobSet's CRD and its webhook refuse; github.com/kubernetes-sigs/jobset, 01078527."""
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  name, slices = "a" * 40, 1000
  text = _render().render(name, "v6e-64", image="r:a", command=TRAINING, slices=slices)
  spec = yaml.safe_load(text)["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
  assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
  assert set(rule["onJobFailureReasons"]) <= {
    "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
  }  # fmt: skip
  (group,) = spec["replicatedJobs"]
  hosts = group["template"]["spec"]["completions"]
  longest = f"{name}-{group['name']}-{slices - 1}-{hosts - 1}-abcde"
  assert len(longest) <= 63 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", longest)


def _close(schema) -> None:
  """Forbids undeclared fields, which an API server would drop in silence."""
  if isinstance(schema, dict):
    if "properties" in schema:
      schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
      schema["type"] = ["integer", "string"]
    for value in list(schema.values()):
      _close(value)
  elif isinstance(schema, list):
    for value in schema:
      _close(value)


@pytest.mark.developer("jsonschema")
def test_jobset_against_its_crd():
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  import jsonschema

  path = os.environ.get("SR_JAX_JOBSET_CRD", "")
  if not path:
    pytest.skip(
      "SR_JAX_JOBSET_CRD=FILE does not name JobSet's CRD, for which no package was found; it is in"
      " a cluster that has JobSet: kubectl get crd jobsets.jobset.x-k8s.io -o yaml > FILE; and in"
      " github.com/kubernetes-sigs/jobset, config/components/crd/bases"
    )
  versions = yaml.safe_load(pathlib.Path(path).read_text())["spec"]["versions"]
  (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1alpha2"]
  _close(schema)
  schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which no CRD repeats
  jobset = _jobset(spot=True, queue="q")
  jsonschema.validate(jobset, schema)
  wrong = json.loads(json.dumps(jobset))
  wrong["spec"]["replicatedJob"] = []
  with pytest.raises(jsonschema.ValidationError, match="replicatedJob"):
    jsonschema.validate(wrong, schema)
  jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
  with pytest.raises(jsonschema.ValidationError, match="'Restart' is not one of"):
    jsonschema.validate(jobset, schema)


def test_readme_xpk_commands_with_xpk(tmp_path):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  xpk = os.environ.get("SR_JAX_XPK", "")
  if not xpk:
    pytest.skip(
      "SR_JAX_XPK=XPK/bin/xpk does not name an xpk; it is 240 MB and needs an environment of its"
      " own: python3.12 -m venv XPK && XPK/bin/pip install xpk"
    )

  def dry_run(command: str, **changed: str) -> subprocess.CompletedProcess:
    for name, value in {"CLUSTER": "c", "PROJECT": "p", "ZONE": "us-east5-b", **changed}.items():
      command = command.replace(name, value)
    manifest = ["--output-manifest-file=out.yaml"] if " create " in command else []
    return subprocess.run(
      [xpk, *shlex.split(command)[1:], "--dry-run", *manifest], cwd=tmp_path,
      env={**os.environ, "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)},
      stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
    )  # fmt: skip

  create, delete = _documented_commands("xpk")
  for command in (create, delete):
    done = dry_run(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  theirs = yaml.safe_load((tmp_path / "out.yaml").read_text())["spec"]
  ours = _jobset(max_restarts=3)["spec"]
  assert theirs["failurePolicy"]["maxRestarts"] == ours["failurePolicy"]["maxRestarts"]
  theirs, ours = (spec["replicatedJobs"][0]["template"]["spec"] for spec in (theirs, ours))
  assert (theirs["parallelism"], theirs["completions"]) == (
    ours["parallelism"],
    ours["completions"],
  )
  # xpk starts nothing again for statuses that are not listed; Python ends with 1.
  assert 1 in theirs["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
  theirs, ours = (job["template"]["spec"] for job in (theirs, ours))
  for key in ("nodeSelector", "terminationGracePeriodSeconds"):
    assert theirs[key] == ours[key]
  assert f"({shlex.join(TRAINING[:-1])} --workdir" in theirs["containers"][0]["command"][-1]
  limits = [pod["containers"][0]["resources"]["limits"] for pod in (theirs, ours)]
  assert limits[0] == limits[1]
  assert dry_run(create.replace("v6e-16", "v6e-17")).returncode != 0


# --- SLURM ---------------------------------------------------------------------------------------


def _directives() -> dict[str, str]:
  text = (LAUNCH / "slurm" / "train.sbatch").read_text()
  # SLURM stops reading at the first line that is neither a comment nor empty.
  head = text[: text.index("set -euo")]
  return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.MULTILINE))


def test_sbatch_has_a_process_a_gpu_and_leaves_all_gpus_visible():
  directives = _directives()
  assert directives["ntasks-per-node"] == directives["gpus-per-node"]
  assert "gpus-per-task" not in directives and "gpu-bind" not in directives
  assert directives["signal"] == "B:TERM@120"
  assert "requeue" in directives and directives["open-mode"] == "append"


class FakeSlurm:
  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    executable(folder / "bin" / "srun", python_stub(FAKES / "srun.py"))
    executable(
      folder / "bin" / "scontrol",
      f"#!/usr/bin/env bash\ncd {shlex.quote(str(folder))}\n"
      'if [[ "$1" == show ]]; then echo "JobId=$3 JobState=$(cat state) Reason=None"\n'
      'else printf "%s\\n" "$*" >> scontrol.log; fi\n',
    )
    (folder / "state").write_text("RUNNING")
    # jax derives the coordinator's port from the job's number, and sr_jax another one from that:
    # take a number whose ports are free.
    for job in range(os.getpid(), os.getpid() + 4096):
      port = job % 4096 + 61440
      with socket.socket() as one, socket.socket() as two:
        try:
          one.bind(("", port))
          two.bind(("", cluster.roll_call_port(port)))
          break
        except OSError:
          continue
    self.started: list[subprocess.Popen] = []
    self.environment = {
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
      "HOME": str(folder),
      "SLURM_JOB_ID": str(job),
      "SLURM_NTASKS": "2",
      "SLURM_NTASKS_PER_NODE": "2",
      "SLURM_GPUS_ON_NODE": "2",
      "SLURM_CPUS_PER_TASK": "1",
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
      "FAKE_GCLOUD": str(folder),
    }

  def training(self, run: pathlib.Path, steps: int) -> list[str]:
    """Words of the real program, made so small that a step takes a fraction of a second."""
    photographs = self.folder / "photographs"
    photographs.mkdir(exist_ok=True)
    for i in range(4):
      gradient = Image.linear_gradient("L").rotate(90 * i).resize((44, 36))
      gradient.convert("RGB").save(photographs / f"{i}.png")
    return [
      sys.executable, "-m", "sr_jax.main", "--config=configs/esrgan_psnr.py:demo",
      f"--workdir={run}", f"--config.data.source={photographs}", "--config.eval.source=",
      "--config.data.hr_patch=32", "--config.data.batch_size=4", "--config.log.every_steps=1",
      "--config.log.tensorboard=False", "--config.generator.kwargs.features=4",
      "--config.generator.kwargs.blocks=1", "--config.generator.kwargs.growth=2",
      f"--config.total_steps={steps}",
    ]  # fmt: skip

  def play(self, what: str) -> None:
    for rank in (0, 1):
      (self.folder / f"program-{rank}.json").write_text(json.dumps([what]))

  def start(self, *command: str, **environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
      ["bash", str(LAUNCH / "slurm" / "train.sbatch"), *command],
      env={**self.environment, **environment}, cwd=ROOT, start_new_session=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    self.started.append(process)
    return process

  def run(self, *command: str, **environment: str) -> tuple[int, str]:
    process = self.start(*command, **environment)
    output = self.output(process)
    return process.returncode, output

  def output(self, process: subprocess.Popen, seconds: float = 300) -> str:
    """Waits for the job's end; says what it had printed where it does not end."""
    try:
      return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      raise AssertionError(f"no end after {seconds} s: {process.communicate()[0]}") from None

  def wait_for_both(self) -> None:
    end = time.monotonic() + 20
    while len(list(self.folder.glob("ready-*"))) < 2:
      assert time.monotonic() < end, "the two programs did not start"
      time.sleep(0.02)

  def requeued(self) -> list[str]:
    path = self.folder / "scontrol.log"
    return path.read_text().splitlines() if path.exists() else []

  def kill_all(self) -> None:
    for process in self.started:
      try:
        os.killpg(process.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass


@pytest.fixture
def slurm(tmp_path):
  fake = FakeSlurm(tmp_path)
  yield fake
  fake.kill_all()


def _steps(run: pathlib.Path) -> list[int]:
  """Returns the steps in a run's metrics.jsonl, as written."""
  path = run / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line)["step"] for line in lines]


def _checkpoints(run: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_sbatch_trains_three_steps_in_two_processes(slurm):
  run = slurm.folder / "run"
  status, output = slurm.run(*slurm.training(run, 3))
  assert status == 0 and "srun: exit statuses 0 0" in output, output
  # Each process has one CPU device. Two runs beside each other would say "on 1", twice.
  assert re.findall(r"\d+ steps on .*?,", output) == ["3 steps on 2 cpu,"], output
  assert _steps(run) == [1, 2, 3]
  assert _checkpoints(run) == [3]
  assert slurm.requeued() == []


@pytest.mark.slow
def test_sbatch_at_the_time_limit_saves_and_the_same_line_goes_on_to_the_end(slurm):
  run, steps = slurm.folder / "run", 150
  process = slurm.start(*slurm.training(run, steps))
  end = time.monotonic() + 250
  while not _steps(run) and process.poll() is None and time.monotonic() < end:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)  # B: to the batch shell alone
  output = slurm.output(process)
  assert process.returncode == 0, output
  assert "stopped by SIGTERM; the same command goes on from here" in output, output
  # Queued again only when both have ended, or the next start meets them.
  assert "srun: exit statuses 0 0" in output.partition("queued again")[0], output
  (saved,) = _checkpoints(run)
  assert 1 <= saved < steps and _steps(run) == list(range(1, saved + 1))
  requeued = [f"requeue {slurm.environment['SLURM_JOB_ID']}"]
  assert slurm.requeued() == requeued
  status, output = slurm.run(*slurm.training(run, steps), SLURM_RESTART_COUNT="1")
  assert status == 0 and "srun: exit statuses 0 0" in output, output
  assert f"resuming at step {saved}\n" in output, output
  assert re.findall(r"\d+ steps on .*?,", output) == [f"{steps - saved} steps on 2 cpu,"], output
  assert _steps(run) == list(range(1, steps + 1))
  assert _checkpoints(run)[-1] == steps
  assert slurm.requeued() == requeued


def test_sbatch_waits_for_all_tasks_at_the_time_limit_and_keeps_every_word(slurm):
  slurm.play("hang")
  process = slurm.start(sys.executable, str(FAKES / "program.py"), "a b", "$c")
  slurm.wait_for_both()
  process.send_signal(signal.SIGTERM)  # B: to the batch shell alone
  output = slurm.output(process, 30)
  assert process.returncode == 0, output
  # Only when both have saved.
  assert output.partition("queued again")[0].count("saved a checkpoint") == 2
  assert slurm.requeued() == [f"requeue {slurm.environment['SLURM_JOB_ID']}"]
  starts = [json.loads(path.read_text()) for path in slurm.folder.glob("starts-*.jsonl")]
  assert [start["argv"] for start in starts] == [["a b", "$c"]] * 2


def test_sbatch_that_is_cancelled_saves_and_is_not_queued_again(slurm):
  """scancel sends TERM too, and the job is COMPLETING by then: as is one that SLURM requeues."""
  (slurm.folder / "state").write_text("COMPLETING")
  slurm.play("hang")
  process = slurm.start(sys.executable, str(FAKES / "program.py"))
  slurm.wait_for_both()
  process.send_signal(signal.SIGTERM)
  output = slurm.output(process, 30)
  assert process.returncode == 0 and output.count("saved a checkpoint") == 2, output
  assert slurm.requeued() == []


def test_sbatch_that_fails_is_not_queued_again(slurm):
  slurm.play("fail")
  status, output = slurm.run(sys.executable, str(FAKES / "program.py"))
  assert status != 0 and "ended with status" in output
  assert slurm.requeued() == []


@pytest.mark.parametrize(
  "environment, message",
  [
    ({"SLURM_GPUS_PER_TASK": "1"}, "hides the other GPUs"),
    ({"SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=8"),
  ],
)
def test_sbatch_refuses(slurm, environment, message):
  status, output = slurm.run("true", **environment)
  assert status == 2 and message in output


# --- SkyPilot, Docker, the linters ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_sky_files_with_skypilots_own_parser(name, tmp_path):
  python = os.environ.get("SR_JAX_SKY_PYTHON", "")
  if not python:
    pytest.skip(
      "SR_JAX_SKY_PYTHON=SKY/bin/python does not name a Python with skypilot; it is 400 MB and"
      " needs an environment of its own: python3 -m venv SKY && SKY/bin/pip install skypilot"
    )
  program = (
    "import sys, sky\n"
    "task = sky.Task.from_yaml_config(\n"
    "  __import__('yaml').safe_load(open(sys.argv[1])), env_overrides=[('WORKDIR', 'gs://b/r')])\n"
    "assert task.envs['WORKDIR'] == 'gs://b/r' and task.run and task.setup, task\n"
    "assert all(r.use_spot for r in task.resources), task.resources\n"
    "print(sorted(a for r in task.resources for a in r.accelerators))\n"
  )
  environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
  path = LAUNCH / "sky" / f"{name}.yaml"
  done = subprocess.run(
    [python, "-c", program, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  expected = "['A100', 'A10G', 'L4']" if name == "gpu" else "['tpu-v6e-8']"
  assert done.stdout.splitlines()[-1] == expected
  # The parser is one that notices.
  wrong = tmp_path / "wrong.yaml"
  wrong.write_text(path.read_text().replace("resources:", "resource:"))
  done = subprocess.run(
    [python, "-c", program, str(wrong)], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode != 0 and "resources" in done.stderr


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_sky_files_quote_their_variables(name):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  task = yaml.safe_load((LAUNCH / "sky" / f"{name}.yaml").read_text())
  assert task["envs"]["WORKDIR"] is None  # sky refuses to launch until it is given
  for script in (task["setup"], task["run"]):
    assert script.startswith("set -e\n")
    assert not re.search(r'(?<!")\$\w', script), script


def test_image_is_not_root_and_has_no_secrets():
  text = (LAUNCH / "docker" / "Dockerfile").read_text()
  steps = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
  users = [value for step, value in steps if step == "USER"]
  assert users == ["1000"]
  assert [step for step, _ in steps][-2:] == ["USER", "CMD"]
  assert not re.search(r"(?i)(token|secret|password|credential)\w*=", text)
  base = next(value for step, value in steps if step == "FROM")
  assert ":" in base and not base.endswith(":latest")
  # What is copied exists, and is not kept out by the ignore file.
  ignored = (LAUNCH / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
  for step, value in steps:
    if step == "COPY":
      for source in value.split()[:-1]:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


@pytest.mark.developer
def test_dockerfile_with_hadolint():
  done = subprocess.run(
    [tool("hadolint"), str(LAUNCH / "docker" / "Dockerfile")], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


SCRIPTS = ["tpu_vm.sh", "tpu_vm_worker.sh", "slurm/train.sbatch"]


@pytest.mark.developer
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_with_shellcheck(name):
  done = subprocess.run(
    [tool("shellcheck"), "--enable=quote-safe-variables,check-unassigned-uppercase",
     str(LAUNCH / name)], capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout


def test_scripts_are_strict_and_quote_in_one_place():
  for name in SCRIPTS:
    assert "\nset -euo pipefail\n" in (LAUNCH / name).read_text(), name
  listed = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*.sh")}
  assert listed <= set(SCRIPTS)
  files = [path for path in LAUNCH.rglob("*") if path.is_file()]
  texts = [path.read_text() for path in files if path.suffix != ".pyc"]  # of render.py
  assert sum(len(re.findall(r"%q|@Q\}", text)) for text in texts) == 1
  assert not any("StrictHostKeyChecking" in text for text in texts)
  assert os.access(LAUNCH / "tpu_vm.sh", os.X_OK)


def _documented_commands(first_word: str) -> list[str]:
  """Returns the commands of launch/README.md's code blocks and code spans."""
  text = (LAUNCH / "README.md").read_text()
  blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```$", "", text, flags=re.M | re.S))
  return [line.strip() for line in lines if line.strip().startswith(first_word + " ")]


def test_readme_commands_are_accepted(cloud):
  """Each tpu_vm.sh line of the README, as a dry run."""
  # In the prose a verb alone is a name, not a command.
  commands = [c for c in _documented_commands("launch/tpu_vm.sh") if " sr-1 " in f"{c} "]
  assert {shlex.split(c, comments=True)[1] for c in commands} == {
    "create", "setup", "run", "logs", "status", "stop", "delete", "babysit"
  }  # fmt: skip
  for command in commands:
    verb, name, *words = shlex.split(command, comments=True)[1:]
    cloud(verb, name, "--dry-run", *words)
  for command in _documented_commands("python launch/gke/render.py"):
    words = shlex.split(command.replace("$(git rev-parse --short HEAD)", "abc").split(" > ")[0])
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_gcloud_lines_with_gclouds_linter(cloud, tmp_path):
  """Flags and names of every gcloud line that the scripts can print and the README has."""
  gcloud = shutil.which("gcloud") or pytest.skip("gcloud is not installed")
  commands = set(_documented_commands("gcloud"))
  assert len(commands) >= 4
  for words in DRY_RUNS:
    printed = cloud(*words[:2], "--dry-run", *words[2:]).stdout.splitlines()
    commands |= {line for line in printed if line.startswith("gcloud ")}

  # One of a kind is enough: the linter knows no zones, and takes most of a second.
  def kind(command: str) -> tuple[str, ...]:
    return tuple(w if i < 5 else w.partition("=")[0] for i, w in enumerate(shlex.split(command)))

  commands = sorted({kind(command): command for command in sorted(commands)}.values())
  environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud")}

  def lint(command: str) -> list[dict]:
    done = subprocess.run(
      [gcloud, "meta", "lint-gcloud-commands", f"--command-string={command}"],
      env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "lint-gcloud-commands" in done.stderr and "Invalid choice" in done.stderr:
      pytest.skip("this gcloud has no linter")
    return json.loads(done.stdout)

  for command in commands:
    (answer,) = lint(command)
    assert answer["success"], (command, answer["error_message"])
  (answer,) = lint("gcloud compute tpus queued-resources create x --node-ids=x --zone=z")
  assert not answer["success"]
