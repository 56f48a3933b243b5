"""Stubs of gcloud, kubectl and Slurm's commands, for tests/test_launch*.py.

Nothing else is on PATH, so that no test can reach a real one.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
_BASH = shutil.which("bash")
_TOOLS = (
  *("bash", "cat", "dirname", "env", "grep", "hostname", "mkdir", "nohup"),
  *("rm", "sed", "setsid", "sleep", "tail"),
)
ODD = """gs://bucket/it's "odd" $HOME $(x) `y` \\ & ; * é"""

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
    return self.bash(str(LAUNCH / script), *arguments, **options)

  def bash(self, *arguments, **options) -> subprocess.CompletedProcess:
    defaults = {"cwd": ROOT, "input": "", "timeout": 60, "env": self.env}
    return subprocess.run(
      [_BASH, *arguments],
      capture_output=True,
      text=True,
      check=False,
      **(defaults | options),
    )

  def start(self, *arguments, **options) -> subprocess.Popen:
    """Bash in the background; ends it with the test at the latest."""
    # Tests started in the background ignore ctrl-C, and bash cannot trap what
    # it was started to ignore.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
      return subprocess.Popen(
        [_BASH, *arguments], cwd=ROOT, env=self.env, text=True, **options
      )
    finally:
      signal.signal(signal.SIGINT, before)

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


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)


WHERE = ["--name=my tpu", "--project=my 'p'", "--zone=us-east5-b"]
RUN = ["--config=configs/gemma2b.py", f"--workdir={ODD}"]
FLAGS = ["--", "--config.seed=3", "--config.decoder.path=a b"]
GKE = [
  *("--name=latents", "--image=place/image:1", "--topology=16x16"),
  *("--accelerator=tpu-v6e-slice", *RUN),
]
SLURM = ["--name=a b", "--nodes=2", "--gpus=8", *RUN]
CREATE = [*WHERE, "--type=v6e-256", "--spot", "--network=a net"]
PREPARE = "--prepare=fetch 'a b' ~"
