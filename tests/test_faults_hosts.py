"""Faults of runs on buckets and on many hosts, and of numbers that cannot be.

Each test fails without what it is about.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from cacheaug.errors import UserError
from cacheaug.run import checkpoint
from cacheaug.run import workdir as workdirs


def _line(caught):
  text = str(caught.value)
  assert "\n" not in text
  return text


# --- object storage ---------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
  """gs:// in memory, for what etils reads and writes; Orbax has its own."""
  import fsspec
  from test_endurance import _Bucket

  fsspec.register_implementation("gcs", _Bucket, clobber=True)
  _Bucket.store.clear()
  return "gs://bucket/some"


def _tiny_run(workdir, text):
  """A directory as a run of one step leaves it: config and checkpoint."""
  import flax.linen as nn

  from cacheaug import config as configs
  from cacheaug.augment import coprocessor
  from cacheaug.model.transformer import Transformer

  config = small_runs.get_config(str(text))
  make = functools.partial(
    coprocessor.init_boxed,
    Transformer(configs.model_of(config)),
    configs.layout_of(config),
  )
  shapes = nn.unbox(jax.eval_shape(make, jax.random.key(0)))
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
  workdirs.claim(config, str(workdir))
  with checkpoint.Checkpoints(f"{workdir}/checkpoints", 1, 1) as kept:
    kept.save(1, {"params": params}, {"decoder": "abc"})


def test_an_export_to_a_bucket_and_back(bucket, tmp_path, monkeypatch):
  from etils import epath

  from cacheaug import export
  from cacheaug.weights import coprocessor_files, trained

  monkeypatch.chdir(tmp_path)
  _tiny_run(tmp_path / "run", tmp_path / "text")
  export.export_run(tmp_path / "run", tmp_path / "local")
  export.export_run(tmp_path / "run", f"{bucket}/export")
  local = small_runs.contents(tmp_path / "local")
  sent = {k: epath.Path(f"{bucket}/export/{k}").read_bytes() for k in local}
  assert sent == local and len(sent) > 2
  assert not (tmp_path / "gs:").exists()
  # Read again: by itself, and as a command or lm.with_coprocessor does.
  near = coprocessor_files.load_coprocessor(tmp_path / "local")
  far = coprocessor_files.load_coprocessor(f"{bucket}/export")
  assert near[:2] == far[:2]
  jax.tree.map(np.testing.assert_array_equal, near[2], far[2])
  found = trained.open_coprocessor(f"{bucket}/export", near[0], None)
  assert found.spec == near[1]
  with pytest.raises(UserError, match="exists and holds something else"):
    export.export_run(tmp_path / "run", f"{bucket}/export", decoder=True)
  with pytest.raises(UserError, match="no such directory"):
    trained.open_coprocessor(f"{bucket}/nothing", near[0], None)
  with pytest.raises(UserError, match="missing; give the --workdir"):
    trained.read_run(f"{bucket}/nothing")


def test_the_config_of_a_run_in_a_bucket_is_read(bucket, tmp_path):
  config = small_runs.get_config(str(tmp_path))
  workdirs.claim(config, f"{bucket}/run")
  assert workdirs.read_config(f"{bucket}/run").seed == config.seed


@pytest.mark.parametrize(
  "key", ["decoder.path", "data.cache_dir", "data.sources.text.path"]
)
def test_what_cannot_be_in_a_bucket_is_refused_before_the_run(tmp_path, key):
  from cacheaug import validate

  config = small_runs.get_config(str(tmp_path))
  config.update_from_flattened_dict({key: "gs://bucket/x"})
  with pytest.raises(UserError) as caught:
    validate.check_config(config, 1)
  assert f"{key}=gs://bucket/x: object storage" in _line(caught)


def test_an_export_without_the_package_is_refused_before_the_run(
  tmp_path, monkeypatch
):
  from cacheaug import validate

  config = small_runs.get_config(str(tmp_path))
  config.export = "gs://bucket/x"

  def missing(_):
    raise ImportError("Install gcsfs")

  monkeypatch.setattr(validate.files, "expanded", missing)
  with pytest.raises(UserError, match=r"export=gs://bucket/x: .*\[gcs\]"):
    validate.check_config(config, 1)


# --- what hosts must share --------------------------------------------------


def _processes(monkeypatch, count=2):
  """Threads that stand for processes: `exchange` waits for all of them."""
  import threading

  from cacheaug.run import agreement

  barrier, here = threading.Barrier(count, timeout=30), threading.local()
  board = [""] * count

  def exchange(text):
    board[here.index] = text
    barrier.wait()
    found = list(board)
    barrier.wait()
    return found

  monkeypatch.setattr(agreement, "exchange", exchange)
  monkeypatch.setattr(agreement.jax, "process_count", lambda: count)
  monkeypatch.setattr(agreement.jax, "process_index", lambda: here.index)

  def run(action):
    results = [None] * count

    def one(index):
      here.index = index
      try:
        results[index] = action(index)
      except UserError as e:
        results[index] = str(e)

    threads = [
      threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
      assert not thread.is_alive()
    return results

  return run


def _rows(directory, documents):
  from cacheaug.data import opening, tokenizers

  config = small_runs.get_config(str(directory))
  text = directory / "text.txt"
  text.write_text("\n---\n".join(documents))
  return opening.open_batches(
    config.data, tokenizers.load("byte"), split="train", seed=0
  ).describe()


def test_hosts_with_other_text_are_told_on_every_process(tmp_path, monkeypatch):
  from cacheaug.run import agreement

  texts = [f"document {i} of many words" for i in range(60)]
  same = [_rows(tmp_path / f"same{i}", texts) for i in (0, 1)]
  assert same[0] == same[1]  # of two packings into two caches
  fewer = _rows(tmp_path / "fewer", texts[:30])
  other = _rows(tmp_path / "other", ["D" + t[1:] for t in texts])
  run = _processes(monkeypatch)
  assert run(lambda i: agreement.check(lambda: same[i])) == [None, None]
  for second in (fewer, other):
    facts = [same[0], second]
    lines = run(lambda i, facts=facts: agreement.check(lambda: facts[i]))
    assert lines[0] == lines[1]
    assert lines[0].startswith("data.sources.text differs between processes")
  assert (
    "60 documents"
    in run(lambda i: agreement.check(lambda: [same[0], fewer][i]))[0]
  )


def test_hosts_with_another_config_or_decoder_are_told(tmp_path, monkeypatch):
  from cacheaug.run import agreement

  configs = [small_runs.get_config(str(tmp_path / str(i))) for i in (0, 1)]
  facts = [agreement.of_config(c) for c in configs]
  assert facts[0] == facts[1]  # although each has its text elsewhere
  configs[1].optimizer.learning_rate = 0.5
  facts[1] = agreement.of_config(configs[1])
  run = _processes(monkeypatch)
  lines = run(lambda i: agreement.check(lambda: facts[i]))
  assert lines[0] == lines[1]
  assert "config key optimizer.learning_rate differs" in lines[0]
  digests = []
  for data in (b"a" * 9, b"a" * 9, b"a" * 8 + b"b"):
    (tmp_path / "model.safetensors").write_bytes(data)
    digests.append(agreement.of_directory(tmp_path))
  assert digests[0] == digests[1] != digests[2]


def test_a_workdir_that_hosts_do_not_share_is_told(tmp_path, monkeypatch):
  config = small_runs.get_config(str(tmp_path / "d"))
  run = _processes(monkeypatch)
  monkeypatch.setattr(workdirs, "_PROBE", 0.5)
  places = [str(tmp_path / "shared")] * 2
  assert run(lambda i: workdirs.claim(config, places[i])) == [None, None]
  assert {p.name for p in (tmp_path / "shared").iterdir()} == {"config.json"}
  for second in ("absent", "there"):
    (tmp_path / "there").mkdir(exist_ok=True)
    places[1] = str(tmp_path / second)
    lines = run(lambda i: workdirs.claim(config, places[i]))
    for line in lines:
      assert "process 1 does not see what process 0 writes there" in line
  assert {p.name for p in (tmp_path / "shared").iterdir()} == {"config.json"}


def test_what_process_zero_finds_wrong_ends_all(tmp_path, monkeypatch):
  config = small_runs.get_config(str(tmp_path / "d"))
  (tmp_path / "file").write_text("")
  run = _processes(monkeypatch)
  lines = run(lambda i: workdirs.claim(config, str(tmp_path / "file" / "run")))
  assert lines[0] == lines[1] and "cannot be written to" in lines[0]


# --- the order of data ------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_batch_has_one_checksum_on_any_devices(tmp_path, devices):
  from cacheaug import sharding
  from cacheaug.data import opening, tokenizers
  from cacheaug.run.checksum import batch_checksum

  config = small_runs.get_config(str(tmp_path))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  byte = tokenizers.load("byte")

  def batches(**processes):
    return opening.open_batches(
      config.data, byte, split="train", seed=0, **processes
    )

  def placed(batch):
    return sharding.put_global(batch, sharding.batch_sharding(mesh))

  found = [batch_checksum(placed(batches().at(i))) for i in range(3)]
  whole = [batch_checksum(jax.device_put(batches().at(i))) for i in range(3)]
  assert found == whole and len(set(found)) == 3
  # The parts that two processes read are that batch, in that order.
  parts = [
    batches(process_index=p, process_count=2).at(0)["tokens"] for p in (0, 1)
  ]
  batch = batches().at(0)
  np.testing.assert_array_equal(np.concatenate(parts), batch["tokens"])
  # Control: the same rows in another order are another batch.
  other = {k: v[::-1].copy() for k, v in batch.items()}
  assert batch_checksum(placed(other)) != found[0]


# --- numbers that cannot be -------------------------------------------------


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", 2**64),
    ("optimizer.steps", 2**40),
    ("optimizer.learning_rate", float("inf")),
    ("optimizer.b2", 1.0),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.clip", float("nan")),
    ("optimizer.multipliers", {"": float("inf")}),
    ("data.sources.text.weight", float("nan")),
    ("lora.alpha", -1.0),
    ("data.workers", -1),
  ],
)
def test_numbers_that_cannot_be_are_refused_by_name(tmp_path, key, value):
  from cacheaug import validate

  config = small_runs.get_config(str(tmp_path))
  validate.check_config(config, 1)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as caught:
    validate.check_config(config, 1)
  assert _line(caught).startswith(key)


@pytest.mark.parametrize("seed", [-1, 2**40, 0])
def test_any_seed_of_64_bits_will_do(tmp_path, seed):
  from cacheaug import validate

  config = small_runs.get_config(str(tmp_path))
  config.seed = seed
  validate.check_config(config, 1)
  jax.random.key(config.seed)
