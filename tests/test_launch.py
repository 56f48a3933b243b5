"""The launch scripts' arguments, dry runs and commands, against stubs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_stubs import (
  CREATE,
  FLAGS,
  GKE,
  LAUNCH,
  PREPARE,
  RUN,
  SLURM,
  WHERE,
  Stubs,
)

_SCRIPTS = ["gke.sh", "local.sh", "slurm.sh", "tpu_vm.sh"]


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


# Every command that calls something, with what it needs.
_COMMANDS = {
  "create": ["tpu_vm.sh", "create", *CREATE],
  "slices": ["tpu_vm.sh", "create", *CREATE, "--slices=2"],
  "setup": ["tpu_vm.sh", "setup", *WHERE, PREPARE],
  "run": ["tpu_vm.sh", "run", *WHERE, *RUN, *FLAGS],
  "resume": ["tpu_vm.sh", "resume", *CREATE, *RUN, PREPARE, *FLAGS],
  "status": ["tpu_vm.sh", "status", *WHERE],
  "logs": ["tpu_vm.sh", "logs", *WHERE, "--worker=3"],
  "stop": ["tpu_vm.sh", "stop", *WHERE],
  "delete": ["tpu_vm.sh", "delete", *WHERE, "--yes"],
  "gke run": ["gke.sh", "run", *GKE, "--context=a b", *FLAGS],
  "gke status": ["gke.sh", "status", "--name=latents"],
  "gke logs": ["gke.sh", "logs", "--name=latents", "--host=3"],
  "gke delete": ["gke.sh", "delete", "--name=latents", "--yes"],
  "slurm": ["slurm.sh", *SLURM, "--time=1-00:00:00", *FLAGS],
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
    [shellcheck, "-x", name], cwd=LAUNCH, capture_output=True, text=True
  )
  assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["tpu_vm.sh"], "missing: a command"),
    (["tpu_vm.sh", "fly"], "fly is no command"),
    (["tpu_vm.sh", "create", "--name=n"], "missing: --project --zone"),
    (["tpu_vm.sh", "create", *WHERE], "missing: --type"),
    (["tpu_vm.sh", "create", *WHERE, "--type="], "missing: --type"),
    (["tpu_vm.sh", "create", *WHERE, "--type=v9-8"], "--runtime-version"),
    (["tpu_vm.sh", "run", *WHERE], "missing: --config --workdir"),
    (
      ["tpu_vm.sh", "run", *WHERE, RUN[0], "--workdir=runs/a"],
      "--workdir=runs/a must be gs://",
    ),
    (
      ["tpu_vm.sh", "run", *WHERE, RUN[1], "--config=configs/none.py"],
      "--config=configs/none.py is no file",
    ),
    (["tpu_vm.sh", "delete", *WHERE, "--slices=0"], "--slices=0 must be"),
    (["tpu_vm.sh", "logs", *WHERE, "--node=1"], "--node=1 must be"),
    (["tpu_vm.sh", "delete", "--name", "--yes"], "--name needs a value"),
    (["tpu_vm.sh", "delete", "--nam=a"], "unknown option --nam=a"),
    (["tpu_vm.sh", "delete", "latents"], "latents is not an option"),
    (["gke.sh", "run", "--name=a"], "--image --accelerator --topology"),
    (["gke.sh", "run", "--name=A b"], "--name=A b must be lower-case"),
    (["gke.sh", "run", *GKE, "--topology=16"], "--topology=16 must be"),
    (["gke.sh", "run", *GKE, "--image=a\nb"], "control characters"),
    (["gke.sh", "run", *GKE, "--chips-per-host=7"], "not a multiple of"),
    (["slurm.sh", "--name=a"], "missing: --nodes --gpus --config --workdir"),
    (["slurm.sh", *SLURM, "--nodes=two"], "--nodes=two must be"),
    (["local.sh"], "missing: --config --workdir"),
    (["local.sh", *RUN, "--tries=-1"], "--tries=-1 must be"),
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
  ended = stubs.run("tpu_vm.sh", "create", *CREATE)
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
  ended = stubs.run("tpu_vm.sh", "create", *CREATE)
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
  arguments = [*WHERE, f"--type={kind}", "--slices=2"]
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
  ended = stubs.run("tpu_vm.sh", "resume", *CREATE, *RUN)
  assert ended.returncode == 0, ended.stderr
  again = ["look", "look", "delete", "create", *_START, "look", "look"]
  assert steps(stubs) == again
  deleted = next(w for w in stubs.words() if w[4] == "delete")
  assert "--force" in deleted and "--quiet" in deleted


@pytest.mark.parametrize("node", ["PREEMPTED", (1, "ERROR: NOT_FOUND: gone")])
def test_resume_sees_a_lost_node_of_an_active_request(stubs, node):
  stubs.answer(**{"tpu-vm_describe": [node, "READY"]})
  ended = stubs.run("tpu_vm.sh", "resume", *CREATE, *RUN)
  assert ended.returncode == 0, ended.stderr
  assert steps(stubs) == ["delete", "create", *_START, "look"]


def test_resume_starts_from_nothing(stubs):
  stubs.answer(
    **{"queued-resources_describe": [(1, "ERROR: NOT_FOUND: none"), "ACTIVE"]}
  )
  ended = stubs.run("tpu_vm.sh", "resume", *CREATE, *RUN)
  assert ended.returncode == 0, ended.stderr
  assert steps(stubs) == ["create", *_START, "look"]


@pytest.mark.parametrize(
  "end", ["run: 0\nrun: 1", "run: lost", "run: 0\nrun: 143", ""]
)
def test_resume_starts_a_failed_run_again_but_not_for_ever(stubs, end):
  stubs.answer(**{"--command=cd_~/cacheaug_run": [end]})
  ended = stubs.run("tpu_vm.sh", "resume", *CREATE, *RUN, "--tries=2")
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
  ended = stubs.run("tpu_vm.sh", "resume", *CREATE, *RUN)
  assert ended.returncode == 0, ended.stderr
  assert "no network" in ended.stderr and "no quota" in ended.stderr
  # The second look finds the request ACTIVE, its run finished.
  assert steps(stubs) == ["delete", "create", "look"]


def test_a_failing_command_says_which(stubs):
  stubs.answer(**{"queued-resources_create": [(5, "PERMISSION_DENIED")]})
  ended = stubs.run("tpu_vm.sh", "create", *CREATE)
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
  ended = stubs.run("slurm.sh", *SLURM)
  assert ended.returncode == 1
  assert "error: sbatch is not installed" in ended.stderr


@pytest.mark.parametrize(
  "arguments",
  [["tpu_vm.sh", "delete", *WHERE], ["gke.sh", "delete", "--name=latents"]],
)
def test_delete_asks(stubs, arguments):
  for answer in ("", "n\n", "yeah\n"):
    ended = stubs.run(*arguments, input=answer)
    assert ended.returncode == 1
    assert "not confirmed: nothing was done" in ended.stderr
  assert stubs.calls() == []
  assert stubs.run(*arguments, input="y\n").returncode == 0
  assert len(stubs.calls()) == 1
