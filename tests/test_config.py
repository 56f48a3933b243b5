"""Every shipped config, every key, every impossible combination."""

import ast
import runpy
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import pytest
import small_runs
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import optim, sharding, step, validate
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.transformer import Transformer
from cacheaug.weights import pretrained

_ROOT = Path(__file__).resolve().parent.parent
_FILES = sorted((_ROOT / "configs").glob("*.py"))


def _load(path: Path) -> ConfigDict:
  return runpy.run_path(str(path))["get_config"]()


def test_configs_are_found():
  assert {"gemma2b.py", "tiny_decoder.py"} <= {p.name for p in _FILES}


@pytest.mark.parametrize("runlocal", [False, True])
@pytest.mark.parametrize("path", _FILES, ids=lambda p: p.stem)
def test_shipped_config_is_valid_and_has_a_state(path, runlocal):
  """Shapes only: the 2B model takes no memory here."""
  config = _load(path)
  config.runlocal = runlocal
  config = configs.resolve(config)
  if config.decoder.path.startswith(pretrained.SHIPPED):
    directory = pretrained.resolve(config.decoder.path)
    model_config = pretrained.read_config(directory)
  else:
    model_config = configs.model_of(config)
  if config.decoder.how_to_get:
    config.decoder.path = "given-by-the-user"
  devices = config.mesh.fsdp * config.mesh.tensor  # the fewest it runs on
  validate.check_config(config, devices)
  validate.check_model(config, model_config)

  model = Transformer(model_config, remat=config.remat)
  decoder = nn.unbox(
    jax.eval_shape(partial(transformer.init, model), jax.random.key(0))
  )
  optimizer, _ = optim.make_optimizer(config.optimizer, config.optimizer.steps)
  mesh = sharding.make_mesh(
    ConfigDict(
      {
        "data": -1,
        "fsdp": min(config.mesh.fsdp, 8),
        "tensor": 1,
        "slices": 1,
      }
    )
  )
  state = step.abstract_state(config, model, optimizer, decoder, mesh)
  trained = sum(x.size for x in jax.tree.leaves(state.params))
  if path.stem == "gemma2b" and not runlocal:
    whole = sum(x.size for x in jax.tree.leaves(decoder))
    assert whole == 2_614_341_888  # Gemma-2 2B, as its model card counts
    blocks = whole - 256_000 * 2304
    assert trained == blocks + 16 * 2304 + 2304 * 2304
  assert trained > 0


def _reads() -> set[str]:
  """Attribute names and strings of the package, base() left out."""
  found = set()
  for path in (_ROOT / "cacheaug").rglob("*.py"):
    tree = ast.parse(path.read_text())
    if path.name == "config.py" and path.parent.name == "cacheaug":
      tree.body = [n for n in tree.body if getattr(n, "name", "") != "base"]
    for node in ast.walk(tree):
      # Stores are left out: a key that is only set is not read.
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        found.add(node.attr)
  return found


def test_every_key_is_read_by_the_package():
  found = _reads()
  # Of `decoder.shape` model_of hands over all keys at once: its own test is
  # that ModelConfig has a field of that name.
  parts = {
    part
    for key, _ in configs.leaves(configs.base())
    if not key.startswith(("local.", "decoder.shape.", "optimizer.multipliers"))
    for part in key.split(".")
  } | {"shape", "multipliers"}
  assert sorted(parts - found) == []
  # Control: a key that nothing reads would be seen.
  assert "nonsense" not in found


def _config(tmp_path, **changes):
  config = small_runs.get_config(str(tmp_path))
  config.update_from_flattened_dict(changes)
  return config


def _refusal(config, devices=1) -> str:
  with pytest.raises(UserError) as caught:
    validate.check_config(configs.resolve(config), devices)
    validate.check_model(config, configs.model_of(config))
  line = str(caught.value)
  assert "\n" not in line
  return line


def test_the_small_config_is_valid(tmp_path):
  config = configs.resolve(_config(tmp_path))
  validate.check_config(config, 8)
  validate.check_model(config, configs.model_of(config))


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"coprocessor.latents": 0}, ("coprocessor.latents=0", "at least 1")),
    ({"traces.count": 0}, ("traces.count=0",)),
    ({"traces.ahead": 0}, ("traces.ahead=0",)),
    ({"traces.min_ahead": 5}, ("traces.min_ahead=5", "traces.ahead=4")),
    ({"traces.count": 31}, ("traces.count=31", "30 possible", "sequence=32")),
    ({"traces.ahead": 31}, ("traces.ahead=31", "latents=2", "sequence=32")),
    ({"coprocessor.latents": 32}, ("traces.count=4", "latents=32", "the 0")),
    ({"traces.law": "stratified", "traces.count": 5}, ("=5", "=32")),
    ({"traces.law": "uniformly"}, ("traces.law='uniformly'", "stratified")),
    ({"coprocessor.positions": "x"}, ("coprocessor.positions='x'", "insert")),
    ({"coprocessor.start": "x"}, ("coprocessor.start='x'", "harmless")),
    ({"coprocessor.init": "x"}, ("coprocessor.init='x'", "scratch")),
    ({"objective": "x"}, ("objective='x'", "language_model")),
    ({"precision.compute": "int8"}, ("precision.compute='int8'", "bfloat16")),
    ({"remat": "x"}, ("remat='x'", "full")),
    ({"eval.ahead": 31}, ("eval.ahead=31", "33", "data.sequence=32")),
    ({"eval.context": 1}, ("eval.context=1", "the 2 tokens", "latents=2")),
    ({"eval.context": 29}, ("eval.context=29", "33", "data.sequence=32")),
    ({"eval.context": -1}, ("eval.context=-1", "0 or more")),
    ({"data.sequence": 65}, ("data.sequence=65", "64 positions")),
    (
      {"data.sequence": 63, "coprocessor.positions": "insert"},
      ("data.sequence=63", "coprocessor.latents=2", "64 positions"),
    ),
    ({"data.batch": 0}, ("data.batch=0",)),
    ({"optimizer.accumulation": 3}, ("data.batch=8", "accumulation=3")),
    ({"optimizer.average": 1.0}, ("optimizer.average=1.0",)),
    ({"optimizer.warmup": 7}, ("optimizer.warmup", "7", "6 steps")),
    ({"optimizer.steps": 0}, ("optimizer.steps=0",)),
    ({"log_every": 0}, ("log_every=0",)),
    ({"checkpoint.keep": 0}, ("checkpoint.keep=0",)),
    ({"decoder.how_to_get": "ask"}, ("decoder.path is empty", "ask")),
    ({"decoder.shape.heads": 3}, ("heads=3", "kv_heads=2")),
    (
      {"objective": "language_model", "language_model.lora_rank": 2},
      ("language_model.lora_rank=2", "decoder.path"),
    ),
    (
      {"coprocessor.lora_rank": 2, "coprocessor.init": "scratch"},
      ("coprocessor.lora_rank=2", "scratch"),
    ),
    ({"coprocessor.lora_rank": -1}, ("coprocessor.lora_rank=-1", "0 ")),
    ({"coprocessor.lora_rank": 17}, ("lora_rank=17", "16 of", "'q'")),
    (
      {"coprocessor.lora_rank": 2, "lora.kernels": ("q", "x")},
      ("lora.kernels=('q', 'x')", "gate"),
    ),
    (
      {"coprocessor.lora_rank": 2, "lora.alpha": 0.0},
      ("lora.alpha=0.0",),
    ),
    ({"language_model.loss": "x"}, ("language_model.loss='x'", "traces")),
  ],
)
def test_impossible_combination_is_refused(tmp_path, changes, parts):
  line = _refusal(_config(tmp_path, **changes))
  assert [p for p in parts if p not in line] == []


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"mesh.fsdp": 3}, ("fsdp=3", "8 devices")),
    ({"mesh.tensor": 16}, ("tensor=16", "8 found")),
    ({"mesh.tensor": 0}, ("tensor=0",)),
    ({"data.batch": 12}, ("data.batch=12", "mesh.data=8", "mesh.fsdp=1")),
    (
      {"mesh.fsdp": 2, "optimizer.accumulation": 2},
      ("data.batch=8", "accumulation=2", "mesh.data=4", "mesh.fsdp=2"),
    ),
  ],
)
def test_mesh_that_does_not_divide_is_refused(tmp_path, changes, parts):
  line = _refusal(_config(tmp_path, **changes), devices=8)
  assert [p for p in parts if p not in line] == []


def test_other_weights_than_the_shape_says_are_refused(tmp_path):
  config = _config(tmp_path)
  other = configs.model_of(_config(tmp_path, **{"decoder.shape.width": 32}))
  with pytest.raises(UserError, match="width is 32.*decoder.shape.width=16"):
    validate.check_model(config, other)


@pytest.mark.parametrize(
  "key, near",
  [
    ("optimizer.step", "optimizer.steps"),
    ("latents", "coprocessor.latents"),
    ("data.sources.text.pth", "data.sources.text.path"),
  ],
)
def test_unknown_key_of_a_file_is_refused_with_the_nearest(tmp_path, key, near):
  config = _config(tmp_path)
  *parents, last = key.split(".")
  at = config
  for part in parents:
    at = at[part]
  at[last] = 1
  line = _refusal(config)
  assert f"unknown config key {key}" in line and near in line


def test_missing_key_is_refused(tmp_path):
  config = _config(tmp_path)
  del config.data.sources.text.field
  assert "data.sources.text.field is missing" in _refusal(config)


def test_local_leaves_what_the_command_line_gave():
  config = _load(_ROOT / "configs" / "gemma2b.py")
  config.runlocal, config.optimizer.steps = True, 3
  found = configs.resolve(config, given=["optimizer.steps"])
  assert found.optimizer.steps == 3
  assert found.data.batch == config.local.data.batch != config.data.batch
  assert list(found.data.sources) == ["code"]
  assert list(config.data.sources) == ["c4"]  # the original is untouched
  config.runlocal = False
  assert configs.resolve(config).data.batch == 1024


def test_reach_has_a_round_less_than_lookups():
  made = runpy.run_path(str(_ROOT / "configs" / "reach.py"))["get_config"]
  for which, rounds, steps in (("2", 1, 1), ("4", 3, 4 - 1), ("5,3", 3, 4)):
    c = made(which)
    assert c.traces.rounds == rounds
    assert c.data.sources.hops.steps_max == int(which[0])
    assert c.optimizer.steps == 1000 * steps
  for which in ("1", "x", "3,0", ""):
    with pytest.raises(UserError, match=r"reach\.py:.*give K lookups"):
      made(which)
