"""Every family against `transformers`: logits, layers, decoding, losses.

Live where torch and transformers are installed (the `parity` extra), and
everywhere against small files that tests/make_golden.py wrote from them.
"""

import json

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
import tokenizers
from cases import slow_but
from tolerances import write_token

from cacheaug.augment import objective
from cacheaug.errors import UserError
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout
from cacheaug.model.static_cache import StaticCache
from cacheaug.model.transformer import Transformer
from cacheaug.weights import huggingface, pretrained

# Float32 rounding of a few layers, whose logits are of order one: the largest
# seen is 8e-6; a wrong mask, norm or frequency gives 1e-2 and more.
TOLERANCE = 1e-4

WHY_TORCH = "needs torch and transformers: pip install 'cacheaug[parity]'"


@pytest.fixture(scope="module")
def torch():
  pytest.importorskip("transformers", reason=WHY_TORCH)
  return pytest.importorskip("torch", reason=WHY_TORCH)


def run(model, params, tokens, mask):
  """(logits [B, T, V], hidden [L, B, T, D]) as make_golden.reference."""

  @jax.jit
  def forward(params, tokens, mask):
    positions = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    x = transformer.embed(model, params, tokens)
    rows = QueryLayout.plain(positions, mask)
    out = transformer.run(model, params, x[:, None], rows, None)
    hidden = jnp.concatenate([out.layers, out.hidden[None]])
    return transformer.logits(model, params, out.hidden[:, 0]), hidden[:, :, 0]

  return jax.tree.map(np.asarray, forward(params, tokens, mask))


def load(directory):
  config = pretrained.read_config(directory)
  params = pretrained.load(directory, config, dtype=jnp.float32)
  return Transformer(config, keep_hidden=True), params


def assert_close(ours, theirs, mask):
  """Logits and hidden states of the rows that are no padding."""
  real = mask > 0
  logits, hidden = ours
  np.testing.assert_allclose(
    logits[real], theirs[0][real], atol=TOLERANCE, rtol=0
  )
  np.testing.assert_allclose(
    hidden[:, real], theirs[1][:, real], atol=TOLERANCE, rtol=0
  )


@pytest.mark.parametrize("case", make_golden.GOLDEN_CASES)
def test_golden(case):
  model, params = load(make_golden.GOLDEN / case)
  with np.load(make_golden.GOLDEN / case / "expected.npz") as expected:
    theirs = expected["logits"], expected["hidden"]
    tokens, mask = expected["tokens"], expected["mask"]
  assert_close(run(model, params, tokens, mask), theirs, mask)


# The golden files hold the others to the same in the quick tests.
_LIVE = tuple(make_golden.CASES)
_QUICK = [_LIVE.index(case) for case in ("gemma2", "gemma3", "llama", "qwen3")]


@pytest.mark.parametrize("case", slow_but(_LIVE, quick=_QUICK))
def test_live(case, torch, tmp_path):
  """Past the window, with left padding, from a sharded directory."""
  reference = make_golden.build(case)
  reference.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  tokens, mask = make_golden.batch(reference.config.vocab_size)
  theirs = make_golden.reference(reference, tokens, mask)
  model, params = load(tmp_path)
  assert_close(run(model, params, tokens, mask), theirs, mask)


def test_negative_controls(torch, tmp_path):
  """Swapped gate and up, or a window one longer, show."""
  reference = make_golden.build("gemma2")
  reference.save_pretrained(tmp_path)
  tokens, mask = make_golden.batch(reference.config.vocab_size)
  theirs = make_golden.reference(reference, tokens, mask)
  model, params = load(tmp_path)
  mlp = params["blocks"]["mlp"]
  swapped = mlp | {"gate": mlp["up"], "up": mlp["gate"]}
  wrong = params | {"blocks": params["blocks"] | {"mlp": swapped}}
  ours = run(model, wrong, tokens, mask)
  assert np.abs(ours[0] - theirs[0]).max() > 100 * TOLERANCE

  text = json.loads((tmp_path / "config.json").read_text())
  text["sliding_window"] += 1
  (tmp_path / "config.json").write_text(json.dumps(text))
  ours = run(*load(tmp_path), tokens, mask)
  assert np.abs(ours[0] - theirs[0]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("case", make_golden.GOLDEN_CASES)
def test_transformers_reads_what_we_write(case, torch, tmp_path):
  import transformers

  reference = make_golden.build(case)
  reference.save_pretrained(tmp_path / "theirs")
  model, params = load(tmp_path / "theirs")
  huggingface.save(tmp_path / "ours", model.config, params)
  back = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  tokens, mask = make_golden.batch(reference.config.vocab_size)
  ours = make_golden.reference(back, tokens, mask)
  theirs = make_golden.reference(reference, tokens, mask)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_text_half_of_an_image_model(torch, tmp_path):
  """gemma3 with a text_config: other tensors are left aside."""
  import transformers

  text = make_golden.build("gemma3", final_logit_softcapping=None).config
  vision = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=8,
    patch_size=4,
  )
  config = transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=4
  )
  reference = transformers.Gemma3ForConditionalGeneration(config).eval()
  make_golden.randomise(reference)
  reference.save_pretrained(tmp_path)
  tokens, mask = make_golden.batch(text.vocab_size)
  with torch.no_grad():
    theirs = reference(torch.tensor(tokens).long()).logits.numpy()
  ours, _ = run(*load(tmp_path), tokens, np.ones_like(mask))
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ("llama_dynamic", "llama_yarn_by_hand"))
def test_scaled_rope_past_the_positions_of_training(case, torch, tmp_path):
  """Decoding grows beyond max_position_embeddings, as far as RoPE is scaled."""
  reference = make_golden.build(case, max_position_embeddings=16)
  reference.save_pretrained(tmp_path)
  model, params = load(tmp_path)
  lm = LM(model, params, None, "")
  prompt = make_golden.batch(reference.config.vocab_size)[0][:1, :10]
  ours = lm.decode(lm.prefill(prompt), 20, stop_ids=())
  with torch.no_grad():
    theirs = reference.generate(
      torch.tensor(prompt).long(),
      do_sample=False,
      min_new_tokens=20,
      max_new_tokens=20,
      eos_token_id=[],
      pad_token_id=0,
    )
  assert ours[0].tolist() == theirs[0, 10:].tolist()
  limit = 32 if case == "llama_dynamic" else 64
  with pytest.raises(UserError, match=f"exceed the decoder's {limit} positi"):
    lm.decode(lm.prefill(prompt), limit)


# --- a trained model --------------------------------------------------------

PROMPTS = (
  "Once upon a time, there was a little girl named Lily.",
  "Tom and his dog went to the park. They",
  "The big red ball",
  "One day, a bird found a shiny stone near the river. She wanted to",
  '"I am sorry," said the cat. "I did not mean to',
)
STEPS = 100


@pytest.fixture(scope="module")
def stories(shared_data):
  directory = shared_data("tinystories656K")
  tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  return directory, tokenizer


def greedy(model, params, prompts):
  """STEPS most likely tokens after each prompt, [B, STEPS]."""
  width = max(map(len, prompts))
  left = np.array([width - len(p) for p in prompts])
  tokens = np.array([[0] * (width - len(p)) + p for p in prompts], np.int32)

  @jax.jit
  def decode(params, tokens, left):
    mask = (jnp.arange(width)[None] >= left[:, None]).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    hidden, cache = transformer.prefill(model, params, tokens, positions, mask)

    def step(carry, i):
      cache, hidden = carry
      token = transformer.logits(model, params, hidden).argmax(-1)
      hidden, cache = write_token(
        model, params, cache, token, width - left + i, width + i
      )
      return (cache, hidden), token

    cache = StaticCache.of(cache, width + STEPS, model.dtype)
    start = cache, hidden[:, -1]
    return jax.lax.scan(step, start, jnp.arange(STEPS))[1].T

  return np.asarray(decode(params, tokens, jnp.asarray(left)))


def test_greedy_continuation_of_a_trained_model(stories, torch):
  import transformers

  directory, tokenizer = stories
  config = pretrained.read_config(directory)
  params = pretrained.load(directory, config, dtype=jnp.float32)
  prompts = [tokenizer.encode(text).ids for text in PROMPTS]
  ours = greedy(Transformer(config), params, prompts)
  reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
  for prompt, row in zip(prompts, ours, strict=True):
    with torch.no_grad():
      theirs = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        min_new_tokens=STEPS,
        max_new_tokens=STEPS,
        suppress_tokens=None,
        eos_token_id=[],
        pad_token_id=0,
      )
    assert row.tolist() == theirs[0, len(prompt) :].tolist()


def test_loss_of_a_trained_model(stories, shared_data, torch):
  import transformers

  directory, tokenizer = stories
  text = shared_data("tinystories", "tiny_stories.txt").read_text("utf-8")
  ids = np.array(tokenizer.encode(text[:6000]).ids[: 4 * 256], np.int32)
  ids = ids.reshape(4, 256)
  config = pretrained.read_config(directory)
  params = pretrained.load(directory, config, dtype=jnp.float32)
  batch = {"tokens": jnp.asarray(ids), "documents": jnp.zeros_like(ids)}
  nll, count = objective.language_model_loss(
    Transformer(config), params, batch, True
  )
  reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
  tokens = torch.tensor(ids).long()
  with torch.no_grad():
    theirs = float(reference(tokens, labels=tokens).loss)
  ours = float(nll.sum() / count.sum())
  assert 1.0 < theirs < 4.0  # trained: a uniform guess would give 7.6
  assert abs(ours - theirs) < TOLERANCE
