"""Round trips to other meshes, damage, kills, full disks, two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cacheaug import sharding
from cacheaug.errors import UserError
from cacheaug.run import checkpoint
from cacheaug.run.checksum import checksums as checksum_of


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh(
    ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor, "slices": 1})
  )


def _state(seed, width=16):
  """A state as a trainer's: parameters, optimizer state, step."""
  key = jax.random.key(seed)
  params = {
    "w": jax.random.normal(key, (8, width)),
    "half": jax.random.normal(key, (8, 3)).astype(jnp.bfloat16),
  }
  opt_state = optax.adam(0.1).init(params)
  return {"params": params, "opt": opt_state, "step": jnp.int32(seed)}


def _shardings(mesh, state):
  def axes(x):
    return ("D", "H")[: x.ndim] if x.shape[1:] == (16,) else None

  return sharding.logical_to_sharding(mesh, jax.tree.map(axes, state), state)


def _put(mesh, state):
  return jax.device_put(state, _shardings(mesh, state))


def _abstract(mesh, state):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    _shardings(mesh, state),
  )


def _same(a, b):
  """Bit for bit; compares bytes, so that NaN equals NaN."""
  a, b = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(a) == len(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(a, b, strict=True)
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with checkpoints 10 and 20 of `_state(10)`, `_state(20)`."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  with checkpoint.Checkpoints(directory, keep=2, save_every=10) as ckpt:
    for step in (10, 20):
      state = _put(_mesh(2, 2, 2), _state(step))
      ckpt.save(step, state, {"data": step})
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _restore(directory, mesh_sizes=(1, 4, 2), like=None):
  like = _state(0) if like is None else like
  with checkpoint.Checkpoints(directory, keep=2, save_every=10) as ckpt:
    return ckpt.restore_latest(_abstract(_mesh(*mesh_sizes), like))


def test_round_trip_to_another_mesh_is_bit_exact(saved):
  state, meta, step = _restore(saved, (1, 8, 1))
  assert (step, meta) == (20, {"data": 20})
  assert _same(state, _state(20))
  assert jax.tree.structure(state) == jax.tree.structure(_state(20))
  assert state["params"]["w"].sharding.shard_shape((8, 16)) == (1, 16)
  # Control: the comparison sees another state.
  assert not _same(state, _state(10))


def test_no_checkpoint_is_none(tmp_path):
  assert _restore(tmp_path / "new") is None


def test_saves_when_due_or_forced_and_keeps_the_newest(tmp_path):
  state = _put(_mesh(8, 1, 1), _state(1))
  with checkpoint.Checkpoints(tmp_path, keep=2, save_every=10) as ckpt:
    assert ckpt.save(10, state, {})
    assert not ckpt.save(15, state, {})
    assert ckpt.save(20, state, {})
    assert ckpt.save(25, state, {}, force=True)
    assert not ckpt.save(25, state, {}, force=True)
    ckpt.wait()
    assert ckpt.steps() == [20, 25]


def _largest(step):
  return max(
    (p for p in (step / "state").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def _missing(step):
  _largest(step).unlink()


def _truncated(step):
  os.truncate(_largest(step), _largest(step).stat().st_size // 2)


def _flipped(step):
  path = _largest(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _meta_flipped(step):
  path = step / "meta" / "metadata"
  path.write_text(path.read_text().replace('{"data": 20}', '{"data": 21}'))


def _empty(step):
  shutil.rmtree(step)
  step.mkdir()


def _half_written(step):
  shutil.rmtree(step / "meta")
  (step / checkpoint._FILES).unlink()


def _not_even_json(step):
  (step / checkpoint._FILES).write_text("{")


@pytest.mark.parametrize(
  "damage, words",
  [
    (_missing, "is missing"),
    (_truncated, "bytes"),
    (_flipped, "CRC of state/"),
    (_meta_flipped, "CRC of meta/"),
    (_empty, "not saved to its end"),
    (_half_written, "not saved to its end"),
    (_not_even_json, "column"),
  ],
)
def test_damaged_checkpoint_is_reported_and_the_one_before_used(
  copy, damage, words, caplog
):
  damage(copy / "20")
  state, meta, step = _restore(copy)
  assert (step, meta) == (10, {"data": 10}) and _same(state, _state(10))
  (record,) = [r for r in caplog.records if "cannot be read" in r.message]
  assert "\n" not in record.message and str(copy / "20") in record.message
  assert words in record.message
  names = {p.name for p in copy.iterdir()}
  assert names == {"10", "20.unreadable-1"}


def test_damage_of_every_checkpoint_gives_none_and_a_run_goes_on(copy):
  for step in ("10", "20"):
    _flipped(copy / step)
  mesh = _mesh(1, 4, 2)
  with checkpoint.Checkpoints(copy, keep=2, save_every=10) as ckpt:
    assert ckpt.restore_latest(_abstract(mesh, _state(0))) is None
    assert ckpt.save(20, _put(mesh, _state(21)), {"data": 21})
  _flipped(copy / "20")
  assert _restore(copy) is None
  assert (copy / "20.unreadable-1").exists()
  assert (copy / "20.unreadable-2").exists()


def test_flip_in_a_large_file_is_found_by_the_arrays_checksum(
  copy, monkeypatch, caplog
):
  # As if every file were too large for a CRC of its own: what is left to
  # notice is the checksum of the arrays that were read.
  monkeypatch.setattr(checkpoint, "_SMALL", -1)
  for step in ("10", "20"):
    files = copy / step / checkpoint._FILES
    listed = json.loads(files.read_text())
    without = {
      item: {name: [size, -1] for name, (size, _) in found.items()}
      for item, found in listed.items()
    }
    files.write_text(json.dumps(without))
  read = checkpoint.ocp.StandardCheckpointHandler.restore
  assert _restore(copy)[2] == 20  # Control: whole, it is accepted.

  def flip(self, directory, **kwargs):
    found = read(self, directory, **kwargs)
    if directory.parent.name == "20":
      w = found["params/w"]
      found["params/w"] = w.at[3, 5].set(jnp.nextafter(w[3, 5], 9.0))
    return found

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", flip)
  assert _restore(copy)[2] == 10
  assert "checksum of params/w differs" in caplog.text


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "int8", "uint16", "bool"]
)
def test_checksum_sees_each_change_and_no_mesh(dtype):
  x = jnp.arange(64).reshape(8, 8) % 2
  x = x.astype(dtype)

  def checksum(y):
    return int(checksum_of([y])[0])

  base = checksum(x)
  y = np.asarray(x).copy()
  y[2, 3] = 0 if y[2, 3] else 1
  assert checksum(jnp.asarray(y)) != base
  assert checksum(jnp.roll(x, 1, axis=1)) != base
  placed = jax.device_put(
    x, sharding.logical_to_sharding(_mesh(2, 2, 2), ("D", "H"), x)
  )
  assert checksum(placed) == base


def test_whole_checkpoint_of_another_tree_is_refused_not_moved(copy):
  with pytest.raises(UserError, match=r"w is \[\[8, 16\].*\[8, 32\]"):
    _restore(copy, (8, 1, 1), like=_state(0, width=32))
  assert sorted(p.name for p in copy.iterdir()) == ["10", "20"]


def test_out_of_memory_is_not_taken_for_damage(copy, monkeypatch):
  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", full)
  with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
    _restore(copy)
  assert (copy / "20").exists()


def test_directory_that_cannot_be_made_is_one_clear_line(tmp_path):
  (tmp_path / "file").write_text("")
  for directory in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
    with pytest.raises(UserError, match="--workdir") as caught:
      checkpoint.Checkpoints(directory, keep=2, save_every=10)
    assert "\n" not in str(caught.value)


def test_full_disk_in_the_background_is_one_clear_line(tmp_path, monkeypatch):
  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "_measure", full)
  ckpt = checkpoint.Checkpoints(tmp_path, keep=2, save_every=10)
  ckpt.save(10, _put(_mesh(8, 1, 1), _state(1)), {})
  with pytest.raises(UserError, match="no space left.*--workdir"):
    ckpt.wait()
  assert ckpt.steps() == []


@pytest.mark.parametrize("keep, every, key", [(0, 1, "keep"), (1, 0, "every")])
def test_numbers_below_one_are_refused(tmp_path, keep, every, key):
  with pytest.raises(UserError, match=f"config.checkpoint.{key}"):
    checkpoint.Checkpoints(tmp_path, keep=keep, save_every=every)


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
  mesh = _mesh(1, 8, 1)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jax.device_put(jnp.zeros((1024, 512)), sharding.batch_sharding(mesh))
  wanted = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  x = step(x)
  with checkpoint.Checkpoints(tmp_path, keep=1, save_every=1) as ckpt:
    ckpt.save(1, x, {})
    for _ in range(10):
      x = step(x)
    state, _, _ = ckpt.restore_latest(wanted)
  assert float(x[0, 0]) == 11.0
  np.testing.assert_array_equal(state, np.ones((1024, 512), np.float32))


# Run as `python test_checkpoint.py killed DIR` and `... process I PORT DIR`.


def _killed_main(directory):
  """Saves 10, then dies by SIGKILL with every byte of 20 but the rename."""
  mesh = _mesh(8, 1, 1)
  # keep=1: the old one may go only once the new one is there.
  ckpt = checkpoint.Checkpoints(directory, keep=1, save_every=10)
  ckpt.save(10, _put(mesh, _state(10)), {"data": 10})
  ckpt.wait()
  measure = checkpoint._measure

  def die(path):
    if path.name == "meta":
      os.kill(os.getpid(), signal.SIGKILL)
    return measure(path)

  checkpoint._measure = die
  ckpt.save(20, _put(mesh, _state(20)), {"data": 20})
  ckpt.wait()


def _process_main(index, port, directory):
  """One of two processes: save twice, damage the newest, restore."""
  jax.distributed.initialize(
    f"127.0.0.1:{port}", num_processes=2, process_id=int(index)
  )
  mesh = _mesh(1, 4, 2)

  def build(step):
    return jax.jit(_state, static_argnums=0, out_shardings=shardings)(step)

  shardings = _shardings(mesh, jax.eval_shape(lambda: _state(0)))
  abstract = _abstract(mesh, jax.eval_shape(lambda: _state(0)))
  with checkpoint.Checkpoints(directory, keep=2, save_every=10) as ckpt:
    for step in (10, 20):
      ckpt.save(step, build(step), {"data": step})
    ckpt.wait()
    # Only one process finds the damage; both must fall back.
    if index == "1":
      read = checkpoint._read_meta

      def fail(path):
        if path.name == "20":
          raise OSError("damaged")
        return read(path)

      checkpoint._read_meta = fail
    state, meta, step = ckpt.restore_latest(abstract)
  assert (step, meta) == (10, {"data": 10})
  equal = jax.jit(
    lambda a, b: jnp.all(
      jnp.asarray(
        [
          jnp.all(x == y)
          for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        ]
      )
    )
  )
  assert bool(equal(state, build(10))) and not bool(equal(state, build(20)))


def _start(*args, devices):
  root = Path(__file__).resolve().parent.parent
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
    + compiling.FLAGS,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(root),
  }
  return subprocess.Popen(
    [sys.executable, __file__, *map(str, args)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_kill_just_before_the_rename_leaves_the_one_before(tmp_path):
  process = _start("killed", tmp_path, devices=8)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == -signal.SIGKILL, output
  assert len(list(tmp_path.glob("20.*"))) == 1  # It was on its way.
  state, _, step = _restore(tmp_path)
  assert step == 10 and _same(state, _state(10))
  with checkpoint.Checkpoints(tmp_path, keep=2, save_every=10) as ckpt:
    ckpt.save(20, _put(_mesh(8, 1, 1), _state(20)), {"data": 20})
  assert _restore(tmp_path)[2] == 20
  assert not list(tmp_path.glob("20.*"))


def test_two_processes_save_and_fall_back_together(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  both = [_start("process", i, port, tmp_path, devices=4) for i in range(2)]
  try:
    outputs = [p.communicate(timeout=120)[0] for p in both]
  finally:
    for p in both:
      p.kill()
  assert [p.returncode for p in both] == [0, 0], "\n".join(outputs)
  # And what two processes saved, one restores.
  state, _, step = _restore(tmp_path)
  assert step == 10 and _same(state, _state(10))


if __name__ == "__main__":
  {"killed": _killed_main, "process": _process_main}[sys.argv[1]](*sys.argv[2:])
