r"""What stands in for a context thrown away: share of the gap that is closed.

  python benchmarks/window.py --config=configs/sweeps/window.py \
      --runs=runs/sweeps/window \
      --config.decoder.path=DIR --config.data.sources.stories.path=stories.txt

At a point p the decoder loses its context but for the last W tokens (keys and
values stay as they were computed) and predicts the next A tokens. 0 % is that
window alone, 100 % the whole context; by nll, and by the divergence (KL) from
the decoder with the whole context, which no adaptation to the text lowers.
Beside the runs found under --runs, without training:

  window of W+N   N entries more of the same kind
  read anew       the last W tokens, which never saw what was before
  heaviest        the last W, and of each layer's and key head's other entries
                  the N that got most attention: from all rows up to p, or from
                  the last W
  pooled          the last W, and N means of the other entries, parts of equal
                  length in order: keys as before RoPE, put at their part's
                  middle, with the logarithm of the part's length as bias

`swapped` is a run whose latents come from another document. Points: every
--every-th token with eval.context before it. Intervals resample documents; rows
of several seeds also have their mean.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cacheaug import build
from cacheaug import config as configs
from cacheaug.augment import coprocessor, kv_latents, objective, traces
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, perplexity, report, run_report
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout, visible
from cacheaug.model.cache import KVCache
from cacheaug.model.layers import Block
from cacheaug.model.rope import rope_of_layers, rope_table, rotate
from cacheaug.model.transformer import Params, PastKV, Transformer
from cacheaug.run import command

FULL, WINDOW = "whole context", "window"
_KL = "KL of "

flags.DEFINE_string("runs", "", "directory of the sweep's runs; '' for none")
flags.DEFINE_integer("every", 4, "tokens from one point to the next")


@flax.struct.dataclass
class Text:
  """One batch and what the decoder has made of it."""

  tokens: jax.Array  # [B, S]
  documents: jax.Array  # [B, S]
  hidden: jax.Array  # [B, S, D], with the whole context
  cache: KVCache


# A row: the hidden states [B, m, A, D] that predict after points [B, m].
States = Callable[[Text, jax.Array], jax.Array]


# --- rows without training --------------------------------------------------


def whole(text: Text, points: jax.Array, *, ahead: int) -> jax.Array:
  """Those of the context pass itself."""
  at = jnp.maximum(points, 0)[..., None] + jnp.arange(ahead)[None, None]
  at = jnp.minimum(at, text.tokens.shape[1] - 1)
  return jax.vmap(lambda row, i: row[i])(text.hidden, at)


def alone(model: Transformer, decoder: Params, layout: Layout) -> States:
  """The window's entries only: a prefix that adds nothing to N of them."""
  layout = dataclasses.replace(
    layout, kind="prefix", positions="replace", start="harmless", kv_bias=False
  )
  nothing = jax.eval_shape(
    lambda key: coprocessor.init_boxed(model, layout, key), jax.random.key(0)
  )
  nothing = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(nothing)
  )
  return trained(model, decoder, nothing, layout)


def anew(model: Transformer, decoder: Params, layout: Layout) -> States:
  """The window's tokens read without what was before them."""
  w, s = layout.window, layout.ahead

  def states(text, points):
    at = jnp.maximum(points, 0)[..., None] + jnp.arange(1 - w, s)[None, None]
    inside = jnp.clip(at, 0, text.tokens.shape[1] - 1)
    tokens = jax.vmap(lambda row, i: row[i])(text.tokens, inside)
    rows = QueryLayout(at, jnp.ones_like(at), jnp.zeros_like(at))
    x = transformer.embed(model, decoder, tokens)
    return transformer.run_blocks(
      model, decoder, x, rows, None, first_output_row=w - 1
    )

  return states


def entries_beside(
  model: Transformer,
  decoder: Params,
  layout: Layout,
  entries: Callable[[Text, jax.Array, jax.Array], PastKV],
) -> States:
  """The window and N given entries, of (text, first, last slot [B, m])."""
  layout = dataclasses.replace(layout, kind="prefix", positions="overlay")

  def states(text, points):
    placed = traces.layout_traces(text.tokens, text.documents, points, layout)
    p = jnp.maximum(points, 0)
    first = placed.rows.context_start[..., 0]
    kv = entries(text, first, p - layout.window)
    return kv_latents.predict(model, decoder, text.cache, kv, placed)

  return states


def heaviest(
  model: Transformer, decoder: Params, layout: Layout, *, recent: bool
) -> States:
  """The N entries before the window that got most attention; see the top."""

  def entries(text, first, last):
    got = context_attention(model, decoder, text).cumsum(2)  # [L, B, S, S, K]

    def up_to(row):  # [B, m] -> [L, B, m, S, K]
      return jax.vmap(lambda x, i: x[:, i], (1, 0), 1)(got, row)

    weight = up_to(last + layout.window)
    if recent:
      weight -= up_to(jnp.maximum(last, 0))
    slots = jnp.arange(text.tokens.shape[1])[None, None]
    gone = (slots >= first[..., None]) & (slots <= last[..., None])
    weight = jnp.where(gone[None, ..., None], weight, -1.0)
    _, kept = jax.lax.top_k(weight.swapaxes(3, 4), layout.latents)
    kept = kept.swapaxes(3, 4)[..., None]  # [L, B, m, N, K, 1]
    return tuple(
      jnp.take_along_axis(x[:, :, None], kept, 3)
      for x in (text.cache.keys, text.cache.values)
    )

  return entries_beside(model, decoder, layout, entries)


def context_attention(
  model: Transformer, decoder: Params, text: Text
) -> jax.Array:  # [L, B, S, S, K]
  """Attention of each context row to each slot, summed over a key head's group.

  By the plain formula, for decoders whose layers are all global.
  """
  c, cache = model.config, text.cache
  block = Block(c, model.dtype, model.param_dtype, model.attention)
  rows = QueryLayout.plain(cache.positions, cache.segments)
  ropes = rope_table(c, rows.positions)
  name = "q_norm" if c.qk_norm else "q"
  seen = visible(*(cache.positions, cache.segments) * 2)
  x = transformer.embed(model, decoder, text.tokens)[:, None]
  found = []
  for i in range(c.layers):
    weights = jax.tree.map(lambda a, i=i: a[i], decoder["blocks"])
    (x, _), kept = block.apply(
      {"params": weights},
      *(x, (jnp.array(False), None), rows, None, ropes),
      capture_intermediates=lambda module, _: module.name == name,
      mutable=["intermediates"],
    )
    query = kept["intermediates"]["attention"][name]["__call__"][0]
    query = query.reshape(*query.shape[:3], c.heads, c.head_dim)
    query = rotate(query, ropes[0])[:, 0] * c.attention_scale
    query = query.reshape(*query.shape[:2], c.kv_heads, -1, c.head_dim)
    scores = jnp.einsum("bqkge,bske->bqskg", query, cache.keys[i])
    scores = jnp.where(seen[..., None, None], scores, -jnp.inf)
    # Rows of padding see nothing.
    found.append(jnp.nan_to_num(jax.nn.softmax(scores, 2)).sum(-1))
  return jnp.stack(found)


def pooled(model: Transformer, decoder: Params, layout: Layout) -> States:
  """N means of the entries before the window; see the top."""
  c, n = model.config, layout.latents

  def entries(text, first, last):
    cache = text.cache
    back = rope_of_layers(c, -cache.positions, scaled=False)
    parts = jnp.arange(n + 1)[None, None] * (last + 1 - first)[..., None] // n
    bounds = jnp.maximum(first[..., None] + parts, 0)  # [B, m, N + 1]
    sizes = jnp.maximum(bounds[..., 1:] - bounds[..., :-1], 1)

    def means(x):  # [L, B, S, K, E] -> [L, B, m, N, K, E]
      sums = jnp.pad(x.cumsum(2), ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
      sums = jax.vmap(lambda x, i: x[:, i], (1, 0), 1)(sums, bounds)
      return (sums[:, :, :, 1:] - sums[:, :, :, :-1]) / sizes[
        None, ..., None, None
      ]

    middle = (bounds[..., 1:] + bounds[..., :-1]) // 2
    keys = means(rotate(cache.keys, back))
    keys = rotate(keys, rope_of_layers(c, middle, scaled=False))
    bias = jnp.log(sizes.astype(jnp.float32))[None, ..., None]
    bias = jnp.broadcast_to(bias, keys.shape[:-1])
    return keys, means(cache.values), bias

  return entries_beside(model, decoder, layout, entries)


# --- rows with training -----------------------------------------------------


def trained(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  layout: Layout,
  *,
  swapped: bool = False,
) -> States:
  """A coprocessor's; `swapped`: by latents of another document's point."""
  harmless = layout.start == "harmless"

  def states(text, points):
    placed = traces.layout_traces(text.tokens, text.documents, points, layout)
    args = model, decoder, coproc, text.cache, placed
    if not swapped:
      return objective.traces_states(*args, text.cache)[0]
    copied, _ = objective.embedded(model, decoder, placed)
    out = coprocessor.outputs(model, coproc, text.cache, placed, copied)
    flat = out.reshape(-1, *out.shape[2:])[half_way_round(points)]
    z = coprocessor.combine(copied, flat.reshape(out.shape), harmless)
    return objective.decoder_states(
      model, decoder, text.cache, z, placed, layout.latents - 1
    )

  return states


def half_way_round(points: jax.Array) -> jax.Array:  # [B m]
  """For each point the one that is half of all that bear a trace further on.

  Points [B, m] are numbered row by row; rows of a mixed batch are of other
  documents.
  """
  there = (points >= 0).reshape(-1)
  order = jnp.argsort(~there)  # those that bear one first, in order
  count = jnp.maximum(there.sum(), 1)
  rank = jnp.cumsum(there) - 1
  return order[(rank + count // 2) % count]


def rows_of(
  config: ConfigDict, found: LM, runs: str
) -> Iterator[tuple[str, States]]:
  """Every row by name, the trained ones as their directories are called.

  Raises:
    UserError: a run of another decoder.
  """
  layout = configs.layout_of(config).with_horizon(config.eval.ahead)
  more = dataclasses.replace(layout, window=layout.window + layout.latents)
  both = found.model, found.decoder
  yield FULL, functools.partial(whole, ahead=layout.ahead)
  yield WINDOW, alone(*both, layout)
  yield "window of W+N", alone(*both, more)
  yield "read anew", anew(*both, layout)
  yield "heaviest, all rows", heaviest(*both, layout, recent=False)
  yield "heaviest, last W rows", heaviest(*both, layout, recent=True)
  yield "pooled", pooled(*both, layout)
  for path in sorted(pathlib.Path(runs).iterdir()) if runs else ():
    if not (path / "report" / "report.md").exists():
      continue
    coproc = found.with_coprocessor(str(path)).coprocessor
    spec = coproc.spec.with_horizon(config.eval.ahead)
    yield path.name, trained(*both, coproc.params, spec)
    if spec.kind.value == "coprocessor":
      yield (
        f"{path.name}, swapped",
        trained(*both, coproc.params, spec, swapped=True),
      )


# --- the table --------------------------------------------------------------


def measured(
  model: Transformer, decoder: Params, layout: Layout, states: States
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """(tokens, documents [B, S], points [B, P]) -> nll and KL [B, P, A]."""

  def run(tokens, documents, points):
    hidden, cache = objective.context_pass(
      model, decoder, tokens, documents, layout
    )
    text = Text(tokens, documents, hidden, cache)

    def log_likely(hidden):
      return jax.nn.log_softmax(transformer.logits(model, decoder, hidden))

    def some(points):  # [B, m]
      likely = log_likely(states(text, points))
      teacher = log_likely(whole(text, points, ahead=layout.ahead))
      after = jnp.arange(1, layout.ahead + 1)[None, None]
      at = jnp.maximum(points, 0)[..., None] + after
      at = jnp.minimum(at, tokens.shape[1] - 1)
      target = jax.vmap(lambda row, i: row[i])(tokens, at)[..., None]
      nll = -jnp.take_along_axis(likely, target, -1)[..., 0]
      return nll, (jnp.exp(teacher) * (teacher - likely)).sum(-1)

    return perplexity.in_turns(some, points)

  return jax.jit(run)


def sums_of(
  config: ConfigDict, found: LM, runs: str, every: int
) -> DocumentSums:
  """Sums of nll and of KL by document, a column each of every row.

  Raises:
    UserError: no document is long enough, or as of `rows_of`.
  """
  layout = configs.layout_of(config).with_horizon(config.eval.ahead)
  functions = {
    name: measured(found.model, found.decoder, layout, states)
    for name, states in rows_of(config, found, runs)
  }

  def measure(batch):
    text = batch["tokens"], batch["documents"]
    points = perplexity.points_of(text[1], layout, config.eval.context)
    weights = perplexity.point_weights(text[1], layout, config.eval.context)
    kept = jnp.arange(text[0].shape[1]) % every == 0
    columns = {}
    for name, function in functions.items():
      for column, values in zip(
        (name, _KL + name), function(*text, points[:, ::every]), strict=True
      ):
        spread = np.zeros(weights.shape, np.float32)
        spread[:, ::every] = values
        columns[column] = spread
    return columns, weights * kept[None, :, None]

  (name,) = run_report.source_names(config)
  batches = run_report.held_out(config, found.tokenizer, name, mixed=True)
  positions = [j for j in perplexity.POSITIONS if j <= layout.ahead]
  return perplexity.document_sums(measure, batches, tuple(positions))


def closed(
  sums: DocumentSums, row: str, positions: slice, *, kl: bool
) -> tuple[float, float, float]:
  """Share of the gap from window to whole context closed, and its interval.

  Args:
    sums: of `sums_of`.
    row: a column's name.
    positions: of sums.positions, taken together.
    kl: by divergence, and not by nll.
  """
  before = _KL if kl else ""

  def column(name):
    return sums.nll[before + name][:, positions].sum(1)

  over = column(WINDOW) - column(FULL)
  left = column(row) - column(FULL)
  shares = [
    1.0 - (drawn @ left) / (drawn @ over)
    for drawn in bootstrap.resample(len(over), seed=0)
  ]
  low, high = np.percentile(np.concatenate(shares), (2.5, 97.5))
  return 1.0 - left.sum() / over.sum(), low, high


def with_means(sums: DocumentSums) -> DocumentSums:
  """And a column for each row of several seeds, the mean of theirs."""
  nll, groups = dict(sums.nll), {}
  for name in sums.nll:
    found = re.fullmatch(r"(.*)-seed\d+(.*)", name)
    if found:
      groups.setdefault("".join(found.groups()), []).append(sums.nll[name])
  for name, columns in groups.items():
    if len(columns) > 1:
      nll[f"{name} ({len(columns)} seeds)"] = np.mean(columns, 0)
  return dataclasses.replace(sums, nll=nll)


def table(sums: DocumentSums, *, kl: bool) -> list[tuple[str, ...]]:
  """Header, nats of the two ends, and shares in percent of every row."""
  before, count = _KL if kl else "", sums.tokens.sum(0)
  heads = [str(j) for j in sums.positions]
  lines = [("row", "together", *heads)]
  for name in (FULL, WINDOW):
    total = sums.nll[before + name].sum(0)
    nats = [total.sum() / count.sum(), *(total / count)]
    lines.append((f"{name}, nats", *(f"{x:.3f}" for x in nats)))
  for name in sums.nll:
    if name.startswith(_KL) or name in (FULL, WINDOW):
      continue
    wanted = [slice(None), *(slice(j, j + 1) for j in range(len(heads)))]
    cells = []
    for positions in wanted:
      share, low, high = closed(sums, name, positions, kl=kl)
      cells.append(f"{100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f})")
    lines.append((name, *cells))
  return lines


def main() -> None:
  """Prints both tables."""
  values = flags.FLAGS
  config = configs.resolve(values.config)
  if values.every < 1:
    raise UserError(f"--every={values.every} must be at least 1")
  if not config.traces.window:
    raise UserError("traces.window=0: nothing is thrown away; set it")
  found = build.load(config.decoder.path, dtype=config.precision.compute)
  sums = with_means(sums_of(config, found, values.runs, values.every))
  print(f"{len(sums.documents)} documents, {sums.tokens[:, 0].sum()} points")
  for kl in (False, True):
    print(f"\nshare of the gap closed, %, by {'KL' if kl else 'nll'}")
    print(report.aligned(table(sums, kl=kl)))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/sweeps/window.py")
  command.run(main, __doc__)
