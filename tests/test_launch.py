"""The launch scripts against stubs of gcloud, kubectl and Slurm's commands.

Nothing else is on PATH, so that no test can reach a real one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

_ROOT = Path(__file__).resolve().parent.parent
_LAUNCH = _ROOT / "launch"
_BASH = shutil.which("bash")
_TOOLS = (
  *("bash", "cat", "dirname", "env", "grep", "hostname", "mkdir", "nohup"),
  *("rm", "sed", "setsid", "sleep", "tail"),
)
_SCRIPTS = ["gke.sh", "local.sh", "slurm.sh", "tpu_vm.sh"]
_ODD = """gs://bucket/it's "odd" $HOME $(x) `y` \\ & ; * é"""

# Writes down how it was called and gives the next scripted answer; the last
# one of a pattern stands for good.
_STUB = """#!{python} -SE
import json, os, pathlib, sys
root = pathlib.Path({root!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
reads = words[0] == "sbatch" or "--filename=-" in words
line = " ".join(words)
log = root / "calls.jsonl"
before = log.read_text().splitlines() if log.exists() else []
before = [" ".join(json.loads(call)["words"]) for call in before]
call = {{"words": words, "stdin": sys.stdin.read() if reads else None}}
with log.open("a") as f:
  f.write(json.dumps(call) + "\\n")
for pattern, answers in json.loads((root / "answers.json").read_text()):
  if pattern in line:
    seen = sum(pattern in other for other in before)
    status, out = answers[min(seen, len(answers) - 1)]
    print(out, file=sys.stderr if status else sys.stdout)
    sys.exit(status)
"""

# The trainer: the next line of `plan` says what it does.
_TRAINER = """#!{python} -SE
import json, pathlib, signal, sys, time
root = pathlib.Path({root!r})
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
log = root / "trained.jsonl"
count = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as f:
  f.write(json.dumps(sys.argv[1:]) + "\\n")
plan = (root / "plan").read_text().split()
step = plan[min(count, len(plan) - 1)]
print("step", step, flush=True)
if step != "wait":
  sys.exit(int(step))
end = time.monotonic() + 30
while not stopped and time.monotonic() < end:
  time.sleep(0.01)
(root / "saved").touch()
"""


class Stubs:
  """Commands that write down how they are called, alone on PATH."""

  def __init__(self, root: Path):
    self.root = root
    self.bin = root / "bin"
    self.bin.mkdir()
    for tool in _TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))
    names = ("gcloud", "kubectl", "sbatch", "scancel", "scontrol")
    for name in names:
      self.write(self.bin / name, _STUB)
    self.write(self.bin / "python", _TRAINER)
    self.answer()
    self.plan("0")
    self.env = {
      "PATH": str(self.bin),
      "HOME": str(root),
      "POLL_SECONDS": "0",
      "LC_ALL": "C.UTF-8",
    }

  def write(self, path: Path, text: str) -> None:
    path.write_text(text.format(python=sys.executable, root=str(self.root)))
    path.chmod(0o755)

  def answer(self, **answers) -> None:
    """Answers by pattern, `_` for a space; a list is given one by one."""
    known = {
      "queued-resources_describe": ["ACTIVE"],
      "tpu-vm_describe": ["READY"],
      "--command=cd_~/cacheaug_run": ["run: 0"],
    }
    pairs = [
      (
        pattern.replace("_", " ").replace("cacheaug run", "cacheaug_run"),
        [a if isinstance(a, tuple) else (0, a) for a in given],
      )
      for pattern, given in (known | answers).items()
    ]
    (self.root / "answers.json").write_text(json.dumps(pairs))

  def plan(self, *steps: str) -> None:
    (self.root / "plan").write_text("\n".join(steps))

  def run(self, script, *arguments, **options) -> subprocess.CompletedProcess:
    return self.bash(str(_LAUNCH / script), *arguments, **options)

  def bash(self, *arguments, **options) -> subprocess.CompletedProcess:
    defaults = {"cwd": _ROOT, "input": "", "timeout": 60, "env": self.env}
    return subprocess.run(
      [_BASH, *arguments],
      capture_output=True,
      text=True,
      check=False,
      **(defaults | options),
    )

  def start(self, *arguments, **options) -> subprocess.Popen:
    """Bash in the background; ends it with the test at the latest."""
    return subprocess.Popen(
      [_BASH, *arguments], cwd=_ROOT, env=self.env, text=True, **options
    )

  def calls(self) -> list[dict]:
    return self._lines("calls.jsonl")

  def words(self) -> list[list[str]]:
    return [call["words"] for call in self.calls()]

  def trained(self) -> list[list[str]]:
    return self._lines("trained.jsonl")

  def forget(self) -> None:
    (self.root / "calls.jsonl").unlink(missing_ok=True)

  def _lines(self, name: str) -> list:
    path = self.root / name
    if not path.exists():
      return []
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)


_WHERE = ["--name=my tpu", "--project=my 'p'", "--zone=us-east5-b"]
_RUN = ["--config=configs/gemma2b.py", f"--workdir={_ODD}"]
_FLAGS = ["--", "--config.seed=3", "--config.decoder.path=a b"]
_GKE = [
  *("--name=latents", "--image=place/image:1", "--topology=16x16"),
  *("--accelerator=tpu-v6e-slice", *_RUN),
]
_SLURM = ["--name=a b", "--nodes=2", "--gpus=8", *_RUN]
_CREATE = [*_WHERE, "--type=v6e-256", "--spot", "--network=a net"]
_PREPARE = "--prepare=fetch 'a b' ~"

# Every command that calls something, with what it needs.
_COMMANDS = {
  "create": ["tpu_vm.sh", "create", *_CREATE],
  "slices": ["tpu_vm.sh", "create", *_CREATE, "--slices=2"],
  "setup": ["tpu_vm.sh", "setup", *_WHERE, _PREPARE],
  "run": ["tpu_vm.sh", "run", *_WHERE, *_RUN, *_FLAGS],
  "resume": ["tpu_vm.sh", "resume", *_CREATE, *_RUN, _PREPARE, *_FLAGS],
  "status": ["tpu_vm.sh", "status", *_WHERE],
  "logs": ["tpu_vm.sh", "logs", *_WHERE, "--worker=3"],
  "stop": ["tpu_vm.sh", "stop", *_WHERE],
  "delete": ["tpu_vm.sh", "delete", *_WHERE, "--yes"],
  "gke run": ["gke.sh", "run", *_GKE, "--context=a b", *_FLAGS],
  "gke status": ["gke.sh", "status", "--name=latents"],
  "gke logs": ["gke.sh", "logs", "--name=latents", "--host=3"],
  "gke delete": ["gke.sh", "delete", "--name=latents", "--yes"],
  "slurm": ["slurm.sh", *_SLURM, "--time=1-00:00:00", *_FLAGS],
}


def dry(arguments):
  """The arguments with --dry-run, which must come before a lone `--`."""
  at = arguments.index("--") if "--" in arguments else len(arguments)
  return [*arguments[:at], "--dry-run", *arguments[at:]]


@pytest.mark.parametrize("arguments", _COMMANDS.values(), ids=_COMMANDS)
def test_dry_run_prints_what_a_run_calls(stubs, arguments):
  # Pasted into a shell, the text of the dry run makes the real run's calls.
  stubs.answer(**{"queued-resources_describe": ["SUSPENDED", "ACTIVE"]})
  if arguments[1] != "resume":
    stubs.answer()
  printed = stubs.run(*dry(arguments))
  assert printed.returncode == 0, printed.stderr
  assert printed.stderr == ""
  assert stubs.calls() == []
  real = stubs.run(*arguments)
  assert real.returncode == 0, real.stderr
  called = stubs.calls()
  assert called
  stubs.forget()
  pasted = stubs.bash("-s", input=printed.stdout)
  assert pasted.returncode == 0, pasted.stderr
  assert stubs.calls() == called


@pytest.mark.parametrize("script", _SCRIPTS)
def test_help_shows_an_example(stubs, script):
  shown = stubs.run(script, "--help")
  assert shown.returncode == 0
  assert shown.stdout.count(f"launch/{script} ") == 2
  assert "--dry-run" in shown.stdout
  assert "set -euo" not in shown.stdout


@pytest.mark.parametrize("name", [*_SCRIPTS, "common.sh"])
def test_shellcheck_finds_nothing(name):
  beside = Path(sys.executable).parent
  shellcheck = shutil.which(
    "shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}"
  )
  if shellcheck is None:
    pytest.skip("needs shellcheck: pip install -e '.[test]'")
  found = subprocess.run(
    [shellcheck, "-x", name], cwd=_LAUNCH, capture_output=True, text=True
  )
  assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["tpu_vm.sh"], "missing: a command"),
    (["tpu_vm.sh", "fly"], "fly is no command"),
    (["tpu_vm.sh", "create", "--name=n"], "missing: --project --zone"),
    (["tpu_vm.sh", "create", *_WHERE], "missing: --type"),
    (["tpu_vm.sh", "create", *_WHERE, "--type="], "missing: --type"),
    (["tpu_vm.sh", "create", *_WHERE, "--type=v9-8"], "--runtime-version"),
    (["tpu_vm.sh", "run", *_WHERE], "missing: --config --workdir"),
    (
      ["tpu_vm.sh", "run", *_WHERE, _RUN[0], "--workdir=runs/a"],
      "--workdir=runs/a must be gs://",
    ),
    (
      ["tpu_vm.sh", "run", *_WHERE, _RUN[1], "--config=configs/none.py"],
      "--config=configs/none.py is no file",
    ),
    (["tpu_vm.sh", "delete", *_WHERE, "--slices=0"], "--slices=0 must be"),
    (["tpu_vm.sh", "logs", *_WHERE, "--node=1"], "--node=1 must be"),
    (["tpu_vm.sh", "delete", "--name", "--yes"], "--name needs a value"),
    (["tpu_vm.sh", "delete", "--nam=a"], "unknown option --nam=a"),
    (["tpu_vm.sh", "delete", "latents"], "latents is not an option"),
    (["gke.sh", "run", "--name=a"], "--image --accelerator --topology"),
    (["gke.sh", "run", "--name=A b"], "--name=A b must be lower-case"),
    (["gke.sh", "run", *_GKE, "--topology=16"], "--topology=16 must be"),
    (["gke.sh", "run", *_GKE, "--image=a\nb"], "control characters"),
    (["gke.sh", "run", *_GKE, "--chips-per-host=7"], "not a multiple of"),
    (["slurm.sh", "--name=a"], "missing: --nodes --gpus --config --workdir"),
    (["slurm.sh", *_SLURM, "--nodes=two"], "--nodes=two must be"),
    (["local.sh"], "missing: --config --workdir"),
    (["local.sh", *_RUN, "--tries=-1"], "--tries=-1 must be"),
  ],
)
def test_bad_arguments_end_in_one_line(stubs, arguments, said):
  ended = stubs.run(*arguments)
  assert ended.returncode == 2
  assert ended.stderr.startswith("error: ") and said in ended.stderr
  assert ended.stderr.count("\n") == 1 and ended.stdout == ""
  assert stubs.calls() == []


def test_create_waits_until_the_tpu_is_there(stubs):
  stubs.answer(
    **{"queued-resources_describe": ["WAITING", "PROVISIONING", "ACTIVE"]}
  )
  ended = stubs.run("tpu_vm.sh", "create", *_CREATE)
  assert ended.returncode == 0, ended.stderr
  first, *rest = stubs.words()
  assert first[:6] == [*"gcloud compute tpus".split()] + [
    *("queued-resources", "create", "my tpu")
  ]
  assert set(first[6:]) == {
    *("--project=my 'p'", "--zone=us-east5-b", "--node-id=my tpu", "--spot"),
    *("--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"),
    "--network=a net",
  }
  assert [words[4] for words in rest] == ["describe"] * 4
  assert "my tpu is PROVISIONING, waiting" in ended.stderr


def test_create_ends_where_the_request_failed(stubs):
  stubs.answer(**{"queued-resources_describe": ["WAITING", "FAILED"]})
  ended = stubs.run("tpu_vm.sh", "create", *_CREATE)
  assert ended.returncode == 1
  assert ended.stderr.splitlines()[-1] == (
    "error: my tpu is FAILED: delete it and create it again"
  )


@pytest.mark.parametrize(
  ("kind", "version"),
  [
    ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p-256", "v2-alpha-tpuv5"),
    ("v6e-256", "v2-alpha-tpuv6e"),
  ],
)
def test_image_by_type_and_several_slices(stubs, kind, version):
  arguments = [*_WHERE, f"--type={kind}", "--slices=2"]
  assert stubs.run("tpu_vm.sh", "create", *arguments).returncode == 0
  create, *rest = stubs.words()
  assert f"--runtime-version={version}" in create
  assert "--node-count=2" in create and "--node-prefix=my tpu" in create
  assert not any(word.startswith("--node-id") for word in create)
  assert [w[5] for w in rest if w[3] == "tpu-vm"] == ["my tpu-0", "my tpu-1"]


def steps(stubs) -> list[str]:
  """The recorded calls in a word each, without the looks at the state."""
  names = []
  for words in stubs.words():
    name = words[4]
    if name == "ssh":
      command = next(w for w in words if w.startswith("--command="))
      kinds = {"nohup": "run", "uv": "install", "-s": "look", "-rf": "clear"}
      name = next(k for word, k in kinds.items() if f" {word} " in command)
    if name != "describe":
      names.append(name)
  return names


_START = ["clear", "scp", "install", "run"]


def test_resume_makes_a_preempted_tpu_again(stubs):
  stubs.answer(
    **{
      "queued-resources_describe": [
        *("ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"),
        *("PROVISIONING", "ACTIVE"),
      ],
      "--command=cd_~/cacheaug_run": ["run: running"] * 3 + ["run: 0\nrun: 0"],
    }
  )
  ended = stubs.run("tpu_vm.sh", "resume", *_CREATE, *_RUN)
  assert ended.returncode == 0, ended.stderr
  again = ["look", "look", "delete", "create", *_START, "look", "look"]
  assert steps(stubs) == again
  deleted = next(w for w in stubs.words() if w[4] == "delete")
  assert "--force" in deleted and "--quiet" in deleted


@pytest.mark.parametrize("node", ["PREEMPTED", (1, "ERROR: NOT_FOUND: gone")])
def test_resume_sees_a_lost_node_of_an_active_request(stubs, node):
  stubs.answer(**{"tpu-vm_describe": [node, "READY"]})
  ended = stubs.run("tpu_vm.sh", "resume", *_CREATE, *_RUN)
  assert ended.returncode == 0, ended.stderr
  assert steps(stubs) == ["delete", "create", *_START, "look"]


def test_resume_starts_from_nothing(stubs):
  stubs.answer(
    **{"queued-resources_describe": [(1, "ERROR: NOT_FOUND: none"), "ACTIVE"]}
  )
  ended = stubs.run("tpu_vm.sh", "resume", *_CREATE, *_RUN)
  assert ended.returncode == 0, ended.stderr
  assert steps(stubs) == ["create", *_START, "look"]


@pytest.mark.parametrize(
  "end", ["run: 0\nrun: 1", "run: lost", "run: 0\nrun: 143", ""]
)
def test_resume_starts_a_failed_run_again_but_not_for_ever(stubs, end):
  stubs.answer(**{"--command=cd_~/cacheaug_run": [end]})
  ended = stubs.run("tpu_vm.sh", "resume", *_CREATE, *_RUN, "--tries=2")
  assert ended.returncode == 1
  assert steps(stubs) == ["look", *_START, "look", *_START, "look"]
  assert "error: gave up on my tpu after 2 tries" in ended.stderr


def test_resume_outlives_a_failing_gcloud(stubs):
  stubs.answer(
    **{
      "queued-resources_describe": [(1, "no network"), "SUSPENDED", "ACTIVE"],
      "queued-resources_create": [(1, "no quota"), ""],
    }
  )
  ended = stubs.run("tpu_vm.sh", "resume", *_CREATE, *_RUN)
  assert ended.returncode == 0, ended.stderr
  assert "no network" in ended.stderr and "no quota" in ended.stderr
  # The second look finds the request ACTIVE, its run finished.
  assert steps(stubs) == ["delete", "create", "look"]


def test_a_failing_command_says_which(stubs):
  stubs.answer(**{"queued-resources_create": [(5, "PERMISSION_DENIED")]})
  ended = stubs.run("tpu_vm.sh", "create", *_CREATE)
  assert ended.returncode == 1
  *_, own, last = ended.stderr.splitlines()
  assert own == "PERMISSION_DENIED"
  assert last == (
    "error: failed with status 5: gcloud compute tpus queued-resources create"
    " ... (its own message is above)"
  )
  assert len(stubs.calls()) == 1


def test_a_missing_command_says_which(stubs):
  (stubs.bin / "sbatch").unlink()
  ended = stubs.run("slurm.sh", *_SLURM)
  assert ended.returncode == 1
  assert "error: sbatch is not installed" in ended.stderr


@pytest.mark.parametrize(
  "arguments",
  [["tpu_vm.sh", "delete", *_WHERE], ["gke.sh", "delete", "--name=latents"]],
)
def test_delete_asks(stubs, arguments):
  for answer in ("", "n\n", "yeah\n"):
    ended = stubs.run(*arguments, input=answer)
    assert ended.returncode == 1
    assert "not confirmed: nothing was done" in ended.stderr
  assert stubs.calls() == []
  assert stubs.run(*arguments, input="y\n").returncode == 0
  assert len(stubs.calls()) == 1


# --- what the workers are told to do ------------------------------------------


def remote(stubs, command, *arguments, **options):
  """What `tpu_vm.sh command` sends to the workers, run as a worker would."""
  stubs.forget()
  sent = stubs.run("tpu_vm.sh", command, *_WHERE, *arguments)
  assert sent.returncode == 0, sent.stderr
  (text,) = (
    word.removeprefix("--command=")
    for word in stubs.words()[-1]
    if word.startswith("--command=")
  )
  return stubs.bash("-c", text, cwd=stubs.root, **options)


@pytest.fixture
def worker(stubs):
  """A worker's home, as `setup` leaves it."""
  for name in ("configs", "launch"):
    shutil.copytree(_ROOT / name, stubs.root / "cacheaug" / name)
  binaries = stubs.root / "cacheaug_venv" / "bin"
  binaries.mkdir(parents=True)
  (stubs.bin / "python").rename(binaries / "python")
  return stubs


def expected(workdir=_ODD):
  return [
    *("-m", "cacheaug.main", "--config=configs/gemma2b.py"),
    *(f"--workdir={workdir}", "--multihost"),
    *("--config.seed=3", "--config.decoder.path=a b"),
  ]


def test_worker_runs_the_trainer_with_the_very_arguments(worker):
  began = remote(worker, "run", *_RUN, *_FLAGS)
  assert began.returncode == 0, began.stderr
  state = worker.root / "cacheaug_run"
  wait_for((state / "status").exists)
  wait_for(lambda: remote(worker, "status").stdout.endswith("run: 0\n"))
  assert worker.trained() == [expected()]
  assert "step 0" in (state / "log").read_text()


def test_worker_runs_once_and_stops_with_a_checkpoint(worker):
  worker.plan("wait")
  assert remote(worker, "run", *_RUN).returncode == 0
  log = worker.root / "cacheaug_run" / "log"
  wait_for(lambda: "step wait" in log.read_text())
  assert remote(worker, "status").stdout.endswith("run: running\n")
  second = remote(worker, "run", *_RUN)
  assert second.returncode == 1 and "is running already" in second.stderr
  assert len(worker.trained()) == 1
  assert remote(worker, "stop").returncode == 0
  wait_for((worker.root / "cacheaug_run" / "status").exists)
  wait_for(lambda: remote(worker, "status").stdout.endswith("run: 143\n"))
  assert (worker.root / "saved").exists()


def test_worker_without_a_run_is_lost(worker):
  assert remote(worker, "status").stdout.endswith("run: lost\n")


# --- GKE ----------------------------------------------------------------------


def manifest(stubs, *arguments):
  shown = stubs.run("gke.sh", "render", *_GKE, *arguments)
  assert shown.returncode == 0, shown.stderr
  return yaml.safe_load(shown.stdout)


def test_jobset_says_the_right_numbers(stubs):
  options = ["--slices=3", "--max-restarts=7", "--grace=90", "--spot"]
  whole = manifest(stubs, *options, "--service-account=a")
  assert whole["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert whole["metadata"]["name"] == "latents"
  assert whole["spec"]["failurePolicy"]["maxRestarts"] == 7
  (slices,) = whole["spec"]["replicatedJobs"]
  assert slices["replicas"] == 3
  job = slices["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 64  # 256 chips, 4 a host
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 90
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
  assert pod["serviceAccountName"] == "a"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "16x16",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["image"] == "place/image:1"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
  ("options", "hosts", "chips"),
  [
    (["--topology=4x4x8"], 32, 4),
    (["--topology=2x2x1"], 1, 4),
    (["--topology=1x1"], 1, 1),
    (["--topology=2x4", "--chips-per-host=8"], 1, 8),
  ],
)
def test_hosts_from_the_topology(stubs, options, hosts, chips):
  (slices,) = manifest(stubs, *options)["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
  assert job["completions"] == hosts and limits == {"google.com/tpu": chips}
  assert "cloud.google.com/gke-spot" not in str(job)


def test_jobset_restarts_what_was_preempted_for_free(stubs):
  spec = manifest(stubs)["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  by_node, by_status = job["podFailurePolicy"]["rules"]
  assert by_node["onPodConditions"][0]["type"] == "DisruptionTarget"
  assert by_status["onExitCodes"] == {"operator": "In", "values": [143]}


def test_container_runs_the_trainer_with_the_very_arguments(stubs):
  (slices,) = manifest(stubs, *_FLAGS)["spec"]["replicatedJobs"]
  pod = slices["template"]["spec"]["template"]["spec"]
  command = pod["containers"][0]["command"]
  # Kubernetes would take a single dollar sign for a variable.
  assert all("$" not in word.replace("$$", "") for word in command)
  bash, *words = [word.replace("$$", "$") for word in command]
  assert bash == "bash"
  assert stubs.bash(*words).returncode == 0
  assert stubs.trained() == [expected()]


# --- Slurm --------------------------------------------------------------------

_SRUN = """#!{python} -SE
import os, pathlib, sys
assert sys.argv[1] == "--kill-on-bad-exit=0", sys.argv
pathlib.Path({root!r}, "step").write_text(str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""

_SCANCEL = """#!{python} -SE
import os, pathlib, signal, sys
assert sys.argv[1:] == ["--signal=TERM", "42"], sys.argv
os.kill(int(pathlib.Path({root!r}, "step").read_text()), signal.SIGTERM)
"""


@pytest.fixture
def job(stubs):
  """The submitted job's script; srun and scancel act on a step of one task."""
  assert stubs.run("slurm.sh", *_SLURM, *_FLAGS).returncode == 0
  (call,) = stubs.calls()
  stubs.forget()
  path = stubs.root / "job.sh"
  path.write_text(call["stdin"])
  stubs.write(stubs.bin / "srun", _SRUN)
  stubs.write(stubs.bin / "scancel", _SCANCEL)
  stubs.env["SLURM_JOB_ID"] = "42"
  return stubs, path


def test_sbatch_is_asked_for_nodes_and_a_signal(stubs):
  options = ["--partition=a b", "--time=1:00:00", "--grace=60"]
  assert stubs.run("slurm.sh", *_SLURM, *options).returncode == 0
  (call,) = stubs.calls()
  assert call["words"] == [
    *("sbatch", "--job-name=a b", "--nodes=2", "--ntasks-per-node=1"),
    *("--gpus-per-node=8", "--signal=B:TERM@60", "--requeue"),
    *("--open-mode=append", "--output=slurm-a b-%j.log"),
    *("--partition=a b", "--time=1:00:00"),
  ]
  assert call["stdin"].startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("status", [0, 1])
def test_job_ends_as_the_trainer_does(job, status):
  stubs, path = job
  stubs.plan(str(status))
  assert stubs.bash(str(path)).returncode == status
  assert stubs.trained() == [expected()]
  assert stubs.calls() == []


@pytest.mark.parametrize("whom", ["job", "step"])
def test_job_told_to_stop_saves_and_queues_again(job, whom):
  # The time limit signals the batch shell, a preemption the step's tasks.
  stubs, path = job
  stubs.plan("wait")
  with stubs.start(str(path), stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == "step wait\n"
    step = int((stubs.root / "step").read_text())
    os.kill(process.pid if whom == "job" else step, signal.SIGTERM)
    assert process.wait(timeout=30) == 143
  assert (stubs.root / "saved").exists()
  assert stubs.words() == [["scontrol", "requeue", "42"]]


# --- one host -----------------------------------------------------------------


def test_local_restarts_until_the_run_is_finished(stubs):
  stubs.plan("1", "137", "0")
  ended = stubs.run("local.sh", *_RUN, "--", "--config.seed=3")
  assert ended.returncode == 0, ended.stderr
  assert (
    stubs.trained()
    == [
      [*expected()[:4], "--config.seed=3"],
    ]
    * 3
  )
  assert "try 2 of 5 ended with status 137" in ended.stderr


def test_local_gives_up_with_the_last_status(stubs):
  stubs.plan("1", "1", "7")
  ended = stubs.run("local.sh", *_RUN, "--tries=3")
  assert ended.returncode == 7
  assert len(stubs.trained()) == 3


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_the_signal_on(stubs, sent):
  stubs.plan("wait")
  script = str(_LAUNCH / "local.sh")
  with stubs.start(script, *_RUN, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == "step wait\n"
    process.send_signal(sent)
    assert process.wait(timeout=30) == 143
  assert (stubs.root / "saved").exists()
  assert len(stubs.trained()) == 1


def test_local_stops_while_it_waits_to_try_again(stubs):
  stubs.plan("1")
  stubs.env["POLL_SECONDS"] = "25"
  script = str(_LAUNCH / "local.sh")
  with stubs.start(script, *_RUN, stderr=subprocess.PIPE) as process:
    assert any("try 1 of 5" in line for line in process.stderr)
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert time.monotonic() - began < 15
  assert len(stubs.trained()) == 1


def test_dockerfile_copies_what_exists():
  lines = (_LAUNCH / "Dockerfile").read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
  assert copied and all((_ROOT / name).exists() for name in copied)
