"""Baselines of equal cost, and the configs that use them."""

import runpy
from functools import partial
from pathlib import Path

import jax
import pytest

from cacheaug import config as configs
from cacheaug import flops, validate
from cacheaug.errors import UserError
from cacheaug.model import lora, transformer
from cacheaug.model.transformer import Transformer
from cacheaug.projects.sweep import equal_cost
from cacheaug.weights import pretrained, published

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = ("tiny_coprocessor", "tinystories656k", "gemma2b", "quickstart")


def _load(name, *argument):
  path = _CONFIGS / f"{name}.py"
  return runpy.run_path(str(path))["get_config"](*argument)


def _numbers(model_config):
  make = partial(transformer.init, Transformer(model_config))
  shapes = jax.eval_shape(make, jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", NAMES)
def test_equal_flop_is_equal_to_half_a_step(name):
  config = _load(name)
  model = equal_cost.decoder_config(config)
  other = _load("matched", f"continued_flops,{name}")
  each = flops.of_step(other, model).total
  whole = flops.of_step(config, model).total * config.optimizer.steps
  assert abs(other.optimizer.steps * each - whole) <= each / 2
  assert other.optimizer.steps != config.optimizer.steps
  same = _load("matched", f"continued,{name}")
  assert same.optimizer.steps == config.optimizer.steps
  assert same.objective == "language_model"
  assert same.data.to_dict() == config.data.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_larger_model_has_the_layers_nearest_in_parameters(name):
  config = _load(name)
  model = equal_cost.decoder_config(config)
  other = _load("matched", f"larger,{name}")
  deep = configs.model_of(other)
  found = flops.parameters(config, model)
  assert found.decoder == _numbers(model)

  def apart(layers):
    return abs(_numbers(equal_cost._deep(model, layers)) - found.total)

  assert apart(deep.layers) == min(apart(deep.layers + i) for i in (-1, 0, 1))
  assert deep.width == model.width and deep.layers > model.layers
  assert not other.decoder.path and other.data.tokenizer != "decoder"


def test_lora_costs_no_gradient_of_what_it_adapts():
  config = published.experiment("gemma2_2b")
  config.data.batch, config.traces.count = 1, 128
  model = configs.model_of(config)
  whole = flops.of_step(config, model).body
  rows = 128 * config.coprocessor.latents
  config.coprocessor.lora_rank = 64
  own = 6 * rows * lora.parameters(model, 64, lora.KERNELS)
  saved = rows * flops.body_per_row(model)
  assert flops.of_step(config, model).body == pytest.approx(
    whole - saved + own, rel=1e-12
  )
  assert own < saved / 4
  # Rows of the LoRA: by hand for one kernel, 2 (D r + r F) a row and layer.
  up = lora.parameters(model, 64, ("up",))
  assert 2 * up == 26 * 2 * (2304 * 64 + 64 * 9216)


@pytest.mark.parametrize(
  "argument",
  ["nonsense", "larger,nonsense", "continued,tiny_decoder"],
)
def test_unknown_baselines_are_refused(argument):
  with pytest.raises(UserError):
    _load("matched", argument)


@pytest.mark.parametrize("runlocal", [False, True])
@pytest.mark.parametrize(
  "name, argument",
  [
    ("matched", "lora"),
    ("matched", "larger"),
    ("matched", "continued,tinystories656k"),
    ("downstream", "decoder"),
    ("downstream_gemma2b", "decoder"),
  ],
)
def test_configs_are_valid(name, argument, runlocal):
  config = _load(name, argument)
  if config.decoder.how_to_get:
    config.decoder.path = "given-by-the-user"
  config.runlocal = runlocal
  config = configs.resolve(config)
  validate.check_config(config, 1)
  model = configs.model_of(config)
  if config.decoder.path.startswith(pretrained.SHIPPED):
    model = equal_cost.decoder_config(config)
  validate.check_model(config, model)
