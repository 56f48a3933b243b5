"""A run whose directory is a bucket, against a stand-in for the service."""

import json
import urllib.error
import urllib.request

import fake_gcs
import pytest
import small_runs

_WHY = "gs:// needs gcsfs: pip install 'cacheaug[gcs]'"


@pytest.fixture
def server():
  pytest.importorskip("gcsfs", reason=_WHY)
  server = fake_gcs.FakeGcs()
  yield server
  server.shutdown()
  server.server_close()


def _run(server, tmp_path):
  process = small_runs.start(
    tmp_path,
    "--workdir=gs://bucket/runs/one",
    "--config.log_every=1",
    JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
    **server.environment(),
  )
  status, out, err = small_runs.finish(process)
  assert status == 0, err
  assert "gs://bucket/runs/one/report/report.md" in out
  return err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_damaged_run_in_a_bucket_goes_on_to_the_same_metrics(
  server, tmp_path
):
  _run(server, tmp_path)
  objects, prefix = server.objects, "runs/one/"
  names = {n.removeprefix(prefix).split("/")[0] for n in objects}
  assert names == {
    "checkpoints",
    "config.json",
    "heartbeat.json",
    "metrics.jsonl",
    "report",
    "speed.jsonl",
  }
  whole = objects[prefix + "metrics.jsonl"][0]
  assert len(whole.splitlines()) == 6
  beat = json.loads(objects[prefix + "heartbeat.json"][0])
  assert (beat["state"], beat["saved"]) == ("finished", 6)

  state = [
    n for n in objects if n.startswith(prefix + "checkpoints/6/state/d/")
  ]
  data, generation = objects[state[0]]
  objects[state[0]] = data[: len(data) // 2], generation + 1_000_000
  # One whose writing never ended.
  for name in [n for n in objects if "/checkpoints/3/state/" in n]:
    objects[name.replace("/3/", "/9/", 1)] = objects[name]
  err = _run(server, tmp_path)
  assert "checkpoints/9 cannot be read (files.json is missing" in err
  assert "checkpoints/6 cannot be read" in err
  assert "resumed from step 3" in err
  assert objects[prefix + "metrics.jsonl"][0] == whole
  # Nothing went to the disk in its place.
  assert not (small_runs._ROOT / "gs:").exists()


def test_the_stand_in_refuses_what_the_service_refuses():
  server = fake_gcs.FakeGcs()

  def ask(method, path, data=None):
    request = urllib.request.Request(
      server.url + path, data=data, method=method
    )
    try:
      with urllib.request.urlopen(request) as answer:
        return answer.status, answer.read()
    except urllib.error.HTTPError as error:
      error.close()
      return error.code, b""

  upload = "/upload/storage/v1/b/bucket/o?uploadType=media&name=a%2Fb"
  assert ask("POST", f"{upload}&ifGenerationMatch=7", b"x")[0] == 412
  assert ask("POST", f"{upload}&ifGenerationMatch=0", b"x")[0] == 200
  assert ask("POST", f"{upload}&ifGenerationMatch=0", b"y")[0] == 412
  assert ask("GET", "/storage/v1/b/bucket/o/a%2Fb?alt=media") == (200, b"x")
  assert ask("GET", "/storage/v1/b/bucket/o/a%2Fc?alt=media")[0] == 404
  server.shutdown()
  server.server_close()
