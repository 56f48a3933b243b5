"""Greedy decoding against `transformers` on the same CPU.

  python benchmarks/decode.py --decoder=path/to/llama --batch=1,16
  python benchmarks/decode.py --batch=1,16   # a random Llama of 110M parameters

Each prompt is read (prefill) and continued by as many tokens as asked, every
token of a batch chosen and fed back. What is compared, in one process, in
blocks (turns.py), medians over repeats:

  plain      this package, the frozen decoder
  augmented  the same with N latents at the prompt's end, coprocessor random;
             its cache has N more slots, which a step attends to
  dynamic    transformers' model in a bare loop, DynamicCache (its default)
  static     the same with its StaticCache

The bare loop calls the model and takes the argmax: it leaves out what
`generate` adds for each token. Then what inserting the latents costs, beside
two passes of N rows by the same decoder over the same cache. Needs the extra
`parity`.
"""

import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
import turns
from absl import flags

from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import engine
from cacheaug.inference.engine import Context, DecodeState
from cacheaug.model import decode_rows, transformer
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import command
from cacheaug.weights import pretrained

# D768 L12 H12 K12 E64 F2048 V32000, head tied: 110M parameters.
_RANDOM = dict(
  vocab_size=32_000,
  hidden_size=768,
  intermediate_size=2048,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_key_value_heads=12,
  max_position_embeddings=2048,
  tie_word_embeddings=True,
)

flags.DEFINE_string("decoder", "", "a Hugging Face directory; '': random")
flags.DEFINE_list("batch", ["1", "16"], "sequences, a row of the table each")
flags.DEFINE_integer("prompt_tokens", 64, "S")
flags.DEFINE_integer("new_tokens", 128, "decoding steps that are timed")
flags.DEFINE_integer("latents", 16, "N")
flags.DEFINE_integer("repeats", 5, "timed, after one that is not")
flags.DEFINE_bool("peers", True, "transformers, too")
flags.DEFINE_integer("threads", 2, "torch's; give XLA as many by taskset")
flags.DEFINE_string("json", "", "file to write the figures to")


class Ours:
  """The package's side, each part timed apart."""

  def __init__(self, model: Transformer, decoder: Params, n: int):
    split = jax.jit(decode_rows.unstack_layers)
    self._model, self._decoder = model, split(decoder)
    self._spec = Layout(n, 1, "overlay", "harmless")
    key = jax.random.key(0)
    coproc = coprocessor.init(model, self._spec, key, decoder)
    coproc["transformer"] = split(coproc["transformer"])
    self._coproc = coproc
    self._read = jax.jit(contexts.read, static_argnames="model")
    self._rows = jax.jit(self._rows_of)

  def _rows_of(
    self, decoder: Params, state: DecodeState
  ) -> tuple[jax.Array, Any]:
    """One pass of N rows at the prompt's end, into a cache of its own."""
    spec, s = self._spec, state.prompt
    x = transformer.embed(
      self._model, decoder, state.tokens[:, s - spec.latents : s]
    )
    positions = (
      state.position[:, None] - 1 - jax.numpy.arange(spec.latents)[None]
    )
    return transformer.extend(
      self._model, decoder, state.cache.stacked(), x, positions
    )

  def start(
    self, tokens: np.ndarray, new: int, *, room: bool
  ) -> tuple[float, DecodeState]:
    """Seconds of the prefill, and the state after it, with room for latents."""
    begun = time.perf_counter()
    context: Context = self._read(
      self._model, self._decoder, tokens, np.zeros_like(tokens)
    )
    jax.block_until_ready(context)
    seconds = time.perf_counter() - begun
    keys = jax.random.split(jax.random.key(0), len(tokens))
    state = engine.start(
      self._model,
      context,
      keys,
      max_new_tokens=new,
      latents=self._spec.latents if room else 0,
    )
    return seconds, jax.block_until_ready(state)

  def insert(self, state: DecodeState) -> tuple[float, DecodeState]:
    """Seconds of inserting N latents, and the state after it."""
    on = np.ones(len(state.tokens), bool)
    begun = time.perf_counter()
    state = engine.insert_latents(
      self._model, self._decoder, self._coproc, state, 0, on, self._spec
    )
    jax.block_until_ready(state)
    return time.perf_counter() - begun, state

  def rows(self, state: DecodeState) -> float:
    """Seconds of one pass of N rows."""
    begun = time.perf_counter()
    jax.block_until_ready(self._rows(self._decoder, state))
    return time.perf_counter() - begun

  def decode(self, state: DecodeState, new: int) -> tuple[float, np.ndarray]:
    """Seconds of `new` tokens, and the tokens."""
    begun = time.perf_counter()
    state = engine.decode(self._model, self._decoder, state, new)
    said = np.asarray(state.generated)
    return time.perf_counter() - begun, said


def peer(
  model: Any, tokens: np.ndarray, new: int, cache: Any
) -> tuple[float, float, np.ndarray]:
  """Seconds of prefill and decoding by transformers, and the tokens."""
  ids = torch.tensor(tokens).long()
  with torch.inference_mode():
    begun = time.perf_counter()
    out = model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    read, said = time.perf_counter(), []
    for _ in range(new):
      said.append(token)
      out = model(token, cache=cache, use_cache=True, logits_to_keep=1)
      token = out.logits[:, -1].argmax(-1, keepdim=True)
    end = time.perf_counter()
  return read - begun, end - read, torch.cat(said, 1).numpy()


def measure(
  ours: Ours, theirs: Any, tokens: np.ndarray, new: int, repeats: int
) -> dict[str, Any]:
  """Medians of seconds by name, and whether all say the same tokens."""
  room = tokens.shape[1] + new
  caches: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: transformers.DynamicCache(config=theirs.config),
    "static": lambda: transformers.StaticCache(
      config=theirs.config, max_cache_len=room
    ),
  }
  said = {}

  def plain():
    prefill, state = ours.start(tokens, new, room=False)
    rows = ours.rows(state)
    took, said["plain"] = ours.decode(state, new)
    return {"plain": took, "plain prefill": prefill, "rows": rows}

  def augmented():
    insert, state = ours.insert(ours.start(tokens, new, room=True)[1])
    return {"augmented": ours.decode(state, new)[0], "insert": insert}

  def other(name):
    prefill, took, said[name] = peer(theirs, tokens, new, caches[name]())
    return {name: took, f"{name} prefill": prefill}

  ways = {"plain": plain, "augmented": augmented}
  if theirs is not None:
    ways |= {name: functools.partial(other, name) for name in caches}
  blocks = turns.take(ways, repeats)
  seconds = {
    key: [block[key] for block in found]
    for found in blocks.values()
    for key in found[0]
  }
  found = {k: statistics.median(v) for k, v in seconds.items()}
  over = turns.ratio(seconds["augmented"], seconds["plain"])
  found["augmented over plain"] = over
  same = [said["plain"] == said[name] for name in ways if name in caches]
  found["same tokens"] = float(np.mean(same)) if same else None
  return found


def show(batch: int, new: int, found: dict[str, Any]) -> list[str]:
  """The table's rows of one batch size."""
  lines = []
  for name in ("plain", "augmented", "dynamic", "static"):
    if name not in found:
      continue
    took = found[name]
    prefill = found.get(f"{name} prefill")
    prefill = "" if prefill is None else f"{prefill * 1e3:.2f}"
    lines.append(
      f"{batch:5}  {name:9}  {prefill:>10}  {took / new * 1e3:8.3f}"
      f"  {batch * new / took:8.0f}  {took / found['plain']:10.2f}"
    )
  lines.append(
    f"       insertion {found['insert'] * 1e3:.2f} ms, two passes of N rows "
    f"{2e3 * found['rows']:.2f} ms: "
    f"{found['insert'] / found['rows'] / 2:.2f}; augmented over plain, in "
    f"pairs: {turns.shown(found['augmented over plain'])}"
  )
  if found["same tokens"] is not None:
    lines.append(
      f"       same tokens as transformers: {found['same tokens']:.1%}"
    )
  return lines


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  if jax.default_backend() != "cpu":
    raise UserError("this compares CPUs: set JAX_PLATFORMS=cpu")
  torch.set_num_threads(values.threads)
  with tempfile.TemporaryDirectory() as scratch:
    directory = values.decoder
    if not directory:
      directory = scratch
      torch.manual_seed(0)
      config = transformers.LlamaConfig(**_RANDOM)
      transformers.LlamaForCausalLM(config).save_pretrained(directory)
    path = pretrained.resolve(directory)
    config = pretrained.read_config(path)
    decoder = pretrained.load(path, config, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    ).eval()
  theirs = theirs if values.peers else None
  ours = Ours(Transformer(config), decoder, values.latents)
  size = sum(x.size for x in jax.tree.leaves(decoder))
  print(
    f"{size / 1e6:.2f}M parameters, {values.prompt_tokens} prompt tokens, "
    f"{values.new_tokens} new, N={values.latents}, {values.threads} threads"
  )
  print("batch  what       prefill ms  ms/token  tokens/s  over plain")
  results = {}
  for batch in map(int, values.batch):
    tokens = np.random.default_rng(0).integers(
      3, config.vocab_size, (batch, values.prompt_tokens), dtype=np.int32
    )
    found = measure(ours, theirs, tokens, values.new_tokens, values.repeats)
    results[batch] = found
    print("\n".join(show(batch, values.new_tokens, found)), flush=True)
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  command.run(main, __doc__)
