"""The plan command: arithmetic everywhere, the compiler where it is there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_runs
from ml_collections import ConfigDict
from tolerances import jit, make_model

from cacheaug import config as configs
from cacheaug import sharding
from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.projects.planning import (
  collectives,
  compiling,
  memory,
  planner,
  times,
)
from cacheaug.projects.planning import topology as topologies
from cacheaug.projects.planning.table import table
from cacheaug.weights import published

_ROOT = Path(__file__).resolve().parent.parent


def _gemma(**changes):
  config = published.experiment("gemma2_2b")
  config.mesh.fsdp = 16
  config.optimizer.accumulation = 4
  config.update(changes)
  return config


def _small(tmp_path, **mesh):
  config = small_runs.get_config(str(tmp_path))
  config.mesh.update(mesh)
  return config


# --- topologies -------------------------------------------------------------


def test_topologies_by_name():
  pod = topologies.parse("v5p:4x4x8", slices=2)
  assert (pod.chip.name, pod.devices, pod.name) == ("v5p", 256, "v5p:4x4x8")
  assert topologies.parse("h100:8").devices == 8


@pytest.mark.parametrize(
  "name", ["v5e", "v5e:", "v5e:16", "v5p:4x4", "h100:2x4", "tpu:8", "v5e:0x4"]
)
def test_unknown_topologies_are_out_of_memory(name):
  with pytest.raises(UserError, match="--topology=.*(for )?example"):
    topologies.parse(name)


# --- memory -----------------------------------------------------------------


def test_bytes_of_gemma2_2b_by_kind():
  """By hand: 2.61e9 parameters frozen in bfloat16, 2.03e9 with Adam."""
  config, model = planner.prepare(_gemma())
  kinds = memory.arithmetic(config, model, 256).kinds
  frozen, trained = 2_614_341_888, 2_029_863_168
  near = dict(rel=2e-3)  # norms are on every device
  assert kinds["frozen decoder"] == pytest.approx(2 * frozen / 16, **near)
  assert kinds["trained parameters"] == pytest.approx(4 * trained / 16, **near)
  assert kinds["optimizer state"] == pytest.approx(8 * trained / 16, **near)
  assert kinds["gradients"] == 2 * kinds["trained parameters"]  # a sum, a part
  assert kinds["averaged weights"] == 0
  assert kinds["batch"] == 2 * 4 * 1024 * 2048 / 256
  assert kinds["kv-cache"] == 2 * 26 * 2048 * 4 * 256 * 2  # one sequence
  # With remat=full every layer's input, of the cache's rows none.
  inputs = 26 * 128 * (16 + 31) * 2304 * 2
  kept = kinds["kept for the backward pass"]
  assert inputs < kept < 1.5 * inputs


def test_kept_for_the_backward_pass_follows_remat_and_depth():
  config, model = planner.prepare(_gemma(remat="full"))
  full = memory.kept_per_sequence(config, model)
  config.remat = "none"
  assert memory.kept_per_sequence(config, model) > 5 * full
  config.remat = "full"
  half = configs.model_of(_gemma())
  half = type(half)(**{**vars(half), "layers": 13, "layer_kinds": ()})
  assert 0.45 * full < memory.kept_per_sequence(config, half) < 0.6 * full


def test_bytes_agree_with_a_real_state(tmp_path):
  """What jax puts on each of eight devices is what was said."""
  config = _small(tmp_path, fsdp=2, tensor=2)
  config.optimizer.average = 0.9
  config, model = planner.prepare(config)
  config.precision.update(compute="float32", decoder="float32")
  kinds = memory.arithmetic(config, model, 8).kinds
  run = small_runs.Steps(config, devices=8)

  def on_first(tree):
    shards = [
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
    ]
    return float(sum(shards))

  assert kinds["trained parameters"] == on_first(run.state.params)
  assert kinds["optimizer state"] == on_first(run.state.opt_state)
  assert kinds["averaged weights"] == on_first(run.state.average)
  assert kinds["frozen decoder"] == on_first(run.decoder)


def test_a_mesh_that_does_not_divide_is_out_of_memory():
  with pytest.raises(UserError, match="fsdp=48.*256 devices"):
    planner.plan(
      _gemma(mesh=dict(fsdp=48)),
      topologies.parse("v5e:16x16"),
      use_compiler=False,
    )


def test_a_config_without_shape_is_out_of_memory():
  config = configs.base()
  config.data.sources = ConfigDict({"a": source_defaults()})
  with pytest.raises(UserError, match="decoder.shape is empty.*decoder.path"):
    planner.prepare(config)


def test_the_decoder_is_known_by_its_config_json_alone(tmp_path):
  """No weights are read: there are none."""
  shape = json.loads((_ROOT / "cacheaug/assets/nano/config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(shape))
  config = configs.base()
  config.decoder.path = str(tmp_path)
  config.data.sources = ConfigDict({"a": source_defaults()})
  config.data.sequence = 64
  _, model = planner.prepare(config)
  assert model.width == shape["hidden_size"]


# --- advice -----------------------------------------------------------------


def test_advice_names_keys_and_they_help():
  config, _ = planner.prepare(_gemma(remat="none"))
  config.optimizer.accumulation = 1
  pod = topologies.parse("v5e:16x16")
  found = planner.plan(config, pod, use_compiler=False)
  assert not found["memory"]["fits"]
  by_key = {r["keys"].partition("=")[0]: r for r in found["suggestions"]}
  assert {"remat", "optimizer.accumulation", "data.batch"} <= set(by_key)
  assert by_key["remat"]["same_result"]
  assert not by_key["data.batch"]["same_result"]
  # One that is said to fit does, and the table says so.
  fitting = next(r for r in found["suggestions"] if r["fits"])
  changed = ConfigDict(config.copy_and_resolve_references())
  for change in fitting["keys"].split(" "):
    key, _, value = change.partition("=")
    parent, _, name = key.rpartition(".")
    inner = changed[parent] if parent else changed
    inner[name] = type(inner[name])(value)
  again = planner.plan(changed, pod, use_compiler=False)
  assert again["memory"]["fits"]
  assert again["memory"]["total"] == pytest.approx(fitting["total"])
  text = table(found)
  assert "DOES NOT FIT" in text and f"  {fitting['keys']}: saves" in text
  assert "DOES NOT FIT" not in table(again)


# --- times ------------------------------------------------------------------


def test_times_by_hand():
  config, model = planner.prepare(_gemma())
  pod = topologies.parse("v5e:16x16")
  traffic = [
    collectives.CollectiveBytes("all-gather", "devices", 1, 400e9),
    collectives.CollectiveBytes("all-reduce", "slices", 1, 3.125e9),
  ]
  found = times.of_step(config, model, pod, traffic, mfu=0.5)
  # 77.8 TFLOP a sequence (tests/test_flops.py), 4 on each device.
  assert found.compute == pytest.approx(4 * 77.8 / 197, rel=1e-2)
  assert (found.ici, found.dcn) == (2.0, 1.0)
  assert (found.floor, found.bound) == (2.0, "ici")
  assert found.estimate == pytest.approx(2 * found.compute)
  assert times.days(2.0, 86_400) == 2.0


# --- collectives ------------------------------------------------------------


def test_collectives_of_a_real_program():
  """A scan of five gathers and sums over eight fake devices."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def program(w, x):
    def body(x, _):
      used = jax.lax.with_sharding_constraint(w, whole)
      return jax.lax.with_sharding_constraint(x * used.sum() + w, split), None

    return jax.lax.scan(body, x, None, length=5)[0]

  def summed(x):
    return x.sum(0)

  x = jax.ShapeDtypeStruct((64, 32), "float32", sharding=split)
  text = jax.jit(summed, out_shardings=whole).lower(x).compile().as_text()
  found = collectives.of_program(text)
  # 32 sums of float32: twice 7/8 of 128 bytes.
  assert [(t.kind, t.count, t.bytes) for t in found] == [
    ("all-reduce", 1, 2 * 7 / 8 * 128)
  ]
  text = jax.jit(program, out_shardings=split).lower(x, x).compile().as_text()
  counts = {t.kind: t.count for t in collectives.of_program(text)}
  assert counts and all(n in (1, 5) for n in counts.values())


# As libtpu 0.0.52 writes them, shortened.
_TPU = """\
HloModule jit_step, is_scheduled=true

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.4), direction=LT
}

%async_collective_fusion.1 (a: bf16[2,8]) -> bf16[32,8] {
  %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, \
replica_groups=[16,16]<=[256], dimensions={0}, use_global_device_ids=true
}

%async_collective_fusion.2 (a: bf16[2,8]) -> bf16[32,8] {
  %all-gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, \
replica_groups=[16,16]<=[256], dimensions={0}, use_global_device_ids=true
}

%all-reduce-scatter.3 (a: bf16[16,8]) -> bf16[1,8] {
  %all-reduce.5 = bf16[16,8]{1,0} all-reduce(%a), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = bf16[32,8]{1,0} fusion(%x), kind=kCustom, \
calls=%async_collective_fusion.1
  %f.2 = bf16[32,8]{1,0} fusion(%x), kind=kCustom, \
calls=%async_collective_fusion.2
  %f.3 = bf16[1,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%t), \
condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while"}
  %ar = f32[100]{0} all-reduce(%y), channel_id=3, \
replica_groups=mesh['a'=2,'b'=128] {'a'}, to_apply=%add
  %send.1 = (f32[256]{0}, u32[], token[]) send(%y, %after-all), channel_id=8, \
is_host_transfer=true, frontend_attributes=\
{_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %permuted = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[], u32[]) \
collective-permute-start(%y), channel_id=1, source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_as_the_tpu_compiler_writes_them():
  """Loops by their bound, one gather over two fusions, sends by host."""
  found = {
    (t.kind, t.between): (t.count, t.bytes)
    for t in collectives.of_program(_TPU, slices=2)
  }
  assert found == {
    ("all-gather", "devices"): (4, 4 * 512 * 15 / 16),
    ("reduce-scatter", "devices"): (4, 4 * 256 * 3 / 4),
    ("all-reduce", "devices"): (1, 2 * 400 / 2),
    ("collective-permute", "devices"): (1, 128),
    ("all-reduce", "slices"): (1, 1024),
  }


def test_groups_as_libtpu_writes_them_since_0_0_42():
  """With the devices' order, and an axis in part."""
  line = (
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    "  %g = bf16[16,8]{1,0} all-gather(%x), channel_id=1, replica_groups="
    "mesh['axis_0'=1,'axis_1'=16,'axis_2'=16], device_ids=([16,16]T(1,0)) "
    "{AXES}, dimensions={0}, use_global_device_ids=true\n}\n"
  )
  for axes, group in (
    ("'axis_1'", 16),
    ("'axis_1','axis_2'", 256),
    ("'axis_1':(4)2", 2),
  ):
    (found,) = collectives.of_program(line.replace("AXES", axes))
    assert found.bytes == 256 * (group - 1) / group, axes


@pytest.mark.parametrize(
  "groups", ["", "replica_groups={}, ", "replica_groups=v3"]
)
def test_what_cannot_be_read_is_not_counted_as_nothing(groups):
  text = (
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    f"  %g = f32[16]{{0}} all-gather(%x), channel_id=1, {groups}\n}}\n"
  )
  with pytest.raises(collectives.Unreadable):
    collectives.of_program(text)


def test_weights_travel_and_not_rows():
  """Without `placing` XLA gathers rows over the devices of fsdp."""
  model = make_model(layers=1, width=64, mlp_width=128)
  mesh = sharding.make_mesh(
    ConfigDict({"data": 1, "fsdp": 8, "tensor": 1, "slices": 1})
  )
  boxed = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
  shardings = sharding.tree_shardings(mesh, boxed)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    shardings,
  )
  tokens = jax.ShapeDtypeStruct(
    (8, 64), "int32", sharding=sharding.batch_sharding(mesh)
  )

  def traffic(context):
    def loss(params, tokens):
      with context:
        hidden, _ = transformer.prefill(model, params, tokens)
        return (hidden**2).mean()

    step = jit(jax.grad(loss), out_shardings=shardings)
    program = step.lower(params, tokens).compile().as_text()
    return sum(t.bytes for t in collectives.of_program(program))

  split, left_alone = traffic(sharding.placing(mesh)), traffic(nullcontext())
  weights = sum(x.size * 4 for x in jax.tree.leaves(params))
  print(f"{split} bytes, left alone {left_alone}, weights {weights}")
  # Weights out and gradients back, by all-reduce here: three times, twice for
  # what forward and backward pass gather apart.
  assert 0 < split < 4 * weights
  assert left_alone > 1.5 * split


# --- the command ------------------------------------------------------------


def _command(*arguments, config=_ROOT / "configs/gemma2b.py"):
  return subprocess.run(
    [sys.executable, "-m", "cacheaug.plan", f"--config={config}", *arguments],
    cwd=_ROOT,
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    capture_output=True,
    text=True,
    timeout=250,
  )


def test_table_without_a_compiler():
  done = _command(
    "--topology=a100:8",
    "--config.mesh.fsdp=8",
    "--config.optimizer.accumulation=128",
  )
  assert done.returncode == 0, done.stderr
  for words in (
    "a100:8: 8 devices, mesh data 1, fsdp 8, tensor 1",
    "nothing was compiled (GPU programs are compiled for h100 and h200 alone)",
    "optimizer state",
    "an assumption, not a measurement",
    "device-hours",
  ):
    assert words in done.stdout


@pytest.mark.parametrize(
  "arguments, words",
  [
    ((), "--topology is missing"),
    (("--topology=v9:4",), "--topology='v9:4' is not CHIP:SHAPE"),
    (("--topology=h100:8", "--mfu=2"), "--mfu=2.0"),
    (("--topology=h100:8", "--config.mesh.fsdp=3"), "config.mesh"),
  ],
)
def test_bad_input_is_one_line(arguments, words):
  done = _command(*arguments)
  assert done.returncode == 1 and words in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- with libtpu ------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'cacheaug[tpu]'",
)


def test_says_how_to_get_the_compiler(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(topologies.NoCompiler, match=r"cacheaug\[tpu\]"):
    topologies.compiler_devices(topologies.parse("v5e:2x2"))


def test_a_program_that_jaxlib_cannot_read(tmp_path, monkeypatch):
  """Memory is the compiler's, traffic is arithmetic, and it is said."""
  config = _small(tmp_path, fsdp=2)
  topology = topologies.parse("v5e:2x2")
  said = compiling.Compiled(
    arguments=2e6, temporaries=3e6, others=0.0, seconds=1.0, text=None
  )
  monkeypatch.setattr(topologies, "compiler_devices", lambda t: None)
  monkeypatch.setattr(compiling, "compile_step", lambda *args: said)
  found = planner.plan(config, topology, mfu=0.4, use_compiler=True)
  assert found["collectives"] == found["collectives_expected"]
  words = "cannot be read, jaxlib does not know all of its instructions"
  assert words in table(found)
  assert found["compiled"]["by"] == compiling.versions("tpu")
  assert f"compiled by {compiling.versions('tpu')} in 1 s" in table(found)

  def unreadable():
    raise jax.errors.JaxRuntimeError("async-update")

  program = types.SimpleNamespace(as_text=unreadable)
  assert compiling._text(program) is None


@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_here(tmp_path):
  config = f"{_ROOT / 'tests/small_runs.py'}:{tmp_path}"
  done = _command(
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=2",
    "--config.decoder.shape.layers=1",
    "--json",
    config=config,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["compiled"]["fits"] and found["memory"]["fits"]
  assert found["memory"]["limit"] == pytest.approx(15.75 * 2**30)
  # Arrays are padded to tiles, so a compiler has more of them than shapes say.
  assert found["compiled"]["arguments"] >= found["memory"]["arguments"]
  kinds = {t["kind"] for t in found["collectives"]}
  assert {"all-gather", "all-reduce"} <= kinds


@needs_libtpu
def test_what_does_not_fit_is_said_with_keys(tmp_path):
  config = f"{_ROOT / 'tests/small_runs.py'}:{tmp_path}"
  done = _command(
    "--topology=v5e:2x2",
    "--config.decoder.shape.layers=1",
    "--config.data.batch=2097152",
    config=config,
  )
  assert done.returncode == 0, done.stderr
  assert "DOES NOT FIT" in done.stdout and "the compiler (libtpu" in done.stdout
  assert re.search(r"optimizer.accumulation=\d+: saves .*: fits", done.stdout)
