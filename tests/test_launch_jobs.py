"""What the launch scripts have run: on workers, in pods, in jobs, here."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from launch_stubs import (
  FLAGS,
  GKE,
  LAUNCH,
  ODD,
  ROOT,
  RUN,
  SLURM,
  WHERE,
  Stubs,
  wait_for,
)


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


# --- what the workers are told to do ------------------------------------------


def remote(stubs, command, *arguments, **options):
  """What `tpu_vm.sh command` sends to the workers, run as a worker would."""
  stubs.forget()
  sent = stubs.run("tpu_vm.sh", command, *WHERE, *arguments)
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
    shutil.copytree(ROOT / name, stubs.root / "cacheaug" / name)
  binaries = stubs.root / "cacheaug_venv" / "bin"
  binaries.mkdir(parents=True)
  (stubs.bin / "python").rename(binaries / "python")
  return stubs


def expected(workdir=ODD):
  return [
    *("-m", "cacheaug.main", "--config=configs/gemma2b.py"),
    *(f"--workdir={workdir}", "--multihost"),
    *("--config.seed=3", "--config.decoder.path=a b"),
  ]


def test_worker_runs_the_trainer_with_the_very_arguments(worker):
  began = remote(worker, "run", *RUN, *FLAGS)
  assert began.returncode == 0, began.stderr
  state = worker.root / "cacheaug_run"
  wait_for((state / "status").exists)
  wait_for(lambda: remote(worker, "status").stdout.endswith("run: 0\n"))
  assert worker.trained() == [expected()]
  assert "step 0" in (state / "log").read_text()


def test_worker_runs_once_and_stops_with_a_checkpoint(worker):
  worker.plan("wait")
  assert remote(worker, "run", *RUN).returncode == 0
  log = worker.root / "cacheaug_run" / "log"
  wait_for(lambda: "step wait" in log.read_text())
  assert remote(worker, "status").stdout.endswith("run: running\n")
  second = remote(worker, "run", *RUN)
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
  shown = stubs.run("gke.sh", "render", *GKE, *arguments)
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
  (slices,) = manifest(stubs, *FLAGS)["spec"]["replicatedJobs"]
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
  assert stubs.run("slurm.sh", *SLURM, *FLAGS).returncode == 0
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
  assert stubs.run("slurm.sh", *SLURM, *options).returncode == 0
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
  ended = stubs.run("local.sh", *RUN, "--", "--config.seed=3")
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
  ended = stubs.run("local.sh", *RUN, "--tries=3")
  assert ended.returncode == 7
  assert len(stubs.trained()) == 3


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_the_signal_on(stubs, sent):
  stubs.plan("wait")
  script = str(LAUNCH / "local.sh")
  with stubs.start(script, *RUN, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == "step wait\n"
    process.send_signal(sent)
    assert process.wait(timeout=30) == 143
  assert (stubs.root / "saved").exists()
  assert len(stubs.trained()) == 1


def test_local_stops_while_it_waits_to_try_again(stubs):
  stubs.plan("1")
  stubs.env["POLL_SECONDS"] = "25"
  script = str(LAUNCH / "local.sh")
  with stubs.start(script, *RUN, stderr=subprocess.PIPE) as process:
    assert any("try 1 of 5" in line for line in process.stderr)
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert time.monotonic() - began < 15
  assert len(stubs.trained()) == 1


def test_dockerfile_copies_what_exists():
  lines = (LAUNCH / "Dockerfile").read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
  assert copied and all((ROOT / name).exists() for name in copied)
