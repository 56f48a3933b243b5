"""Published decoders: their sizes, and what a user without them is told."""

import math
from pathlib import Path

import pytest

from cacheaug import config as configs
from cacheaug import validate
from cacheaug.errors import UserError
from cacheaug.weights import leaves, published

# As the files on huggingface.co count them, tied heads once.
PARAMETERS = {
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma3_270m": 268_098_176,
  "gemma3_1b": 999_885_952,
  "llama32_1b": 1_235_814_400,
  "qwen3_06b": 596_049_920,
  "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_published_shape(name):
  config = published.experiment(name)
  wanted = leaves.leaves_of(configs.model_of(config))
  assert sum(math.prod(leaf.shape) for leaf in wanted) == PARAMETERS[name]
  root = Path(__file__).resolve().parent.parent
  text = (root / "configs" / f"{name}.py").read_text()
  repository = published.PUBLISHED[name][0]
  assert f"download {repository} --local-dir" in text
  assert repository in config.decoder.how_to_get
  with pytest.raises(UserError, match="decoder.path is empty: .*download"):
    validate.check_config(configs.resolve(config), 1)


def test_licences_to_accept_are_named():
  assert "accept Meta's licence" in published.how_to_get("llama32_1b")
  assert "licence" not in published.how_to_get("qwen3_06b")


def test_unknown_name():
  with pytest.raises(UserError, match="'gpt' is not one of gemma2_2b, "):
    published.experiment("gpt")
