"""Every kind of coprocessor: in parallel = one trace at a time = dense mask.

As test_objective.py, which holds the paper's own kind to the same.
"""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest
from cases import slow_but
from packed import (
  DOCUMENTS,
  POINTS,
  A,
  S,
  cut_off,
  layout_traces,
  nll_at_start,
  one_at_a_time,
  with_gradient,
)
from tolerances import GRADIENT, LOSS, NLL, close, close_trees, far

from cacheaug.augment import coprocessor, dense_masks, kinds, objective, traces
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.attention import NO_LIMIT, QueryLayout
from cacheaug.model.cache import KVCache
from cacheaug.model.rope import rope_table, rotate

N = 3
KINDS = tuple(k for k in kinds.NAMES if k != "coprocessor")
# One kind of embeddings and one of keys and values are quick.
CASES = slow_but(
  [(kind, start) for start in ("harmless", "as_is") for kind in KINDS],
  quick=[KINDS.index(kind) for kind in ("pause", "prefix")],
)


def setup(kind, start, scheme="insert"):
  return packed.setup(N, start, scheme, kind=kind)


@functools.cache
def parallel(kind, start):
  model, spec, decoder, _, tokens = setup(kind, start)

  @with_gradient
  def nll(coproc, laid):
    args = model, decoder
    hidden, cache = objective.context_pass(*args, tokens, DOCUMENTS, spec)
    reading = coprocessor.source_cache(model, coproc, cache, hidden, spec)
    return objective.traces_nll(*args, coproc, cache, laid, reading)

  return nll


def run_parallel(kind, start, scheme):
  _, spec, _, coproc, tokens = setup(kind, start, scheme)
  laid = layout_traces(tokens, spec)
  w = laid.weights / laid.weights.sum()
  return laid, parallel(kind, start)(coproc, w, laid)


# --- one trace by itself, from plain caches ---------------------------------


def prefix_of(model, coproc, cache, at, harmless):
  """Layer by layer: trained keys rotated to `at` [N], and what they add to."""
  c, keys, values = model.config, [], []
  for i, kind in enumerate(c.layer_kinds):
    k, v = (coproc[f"prefix_{x}"][i][None] for x in ("keys", "values"))

    def turn(k, by, kind=kind):
      tables = rope_table(c, by[None])
      return rotate(k, tables[-1 if kind == "sliding" else 0])

    k = turn(k, at)
    if harmless:
      there = cache.positions[0, -N:]
      k = k + turn(cache.keys[i][:, -N:], at - there)
      v = v + cache.values[i][:, -N:]
    keys.append(k)
    values.append(v)
  return jnp.stack(keys), jnp.stack(values)


@functools.cache
def alone(kind, start):
  model, _, decoder, _, _ = setup(kind, start)
  harmless = start == "harmless"

  @with_gradient
  def nll(coproc, prefix, ahead, targets, first_latent, first_ahead, cut):
    hidden, cache = transformer.prefill(model, decoder, prefix)
    full, length = cache, prefix.shape[1]
    cache = cut_off(cache, length - N) if cut else cache
    copied = transformer.embed(model, decoder, prefix[:, -N:])
    at = first_latent + jnp.arange(N)
    extend = functools.partial(transformer.extend, model)
    fed = transformer.embed(model, decoder, ahead)
    after = first_ahead + jnp.arange(A - 1)
    if kind in ("pause", "activations"):
      soft = z = coproc["soft_tokens"][None]
      if kind == "activations":
        body = coproc["transformer"]
        _, own = extend(body, None, hidden)
        rows = soft + copied if harmless else soft
        z, _ = extend(body, own, rows, at[None])
        z = z @ coproc["latent_projection"] if harmless else z
      z = copied + z if harmless else z
      x = jnp.concatenate([z, fed], 1)
      at = jnp.concatenate([at, after])[None]
      out, _ = extend(decoder, cache, x, at)
      out = out[:, N - 1 :]
    else:
      if kind == "handover":
        body = coproc["transformer"] | {"final_norm": decoder["final_norm"]}
        rows = coproc["soft_tokens"][None] + (copied if harmless else 0.0)
        reads = cache if harmless else full
        _, own = extend(body, reads, rows, at[None])
        kv = own.keys, own.values
      else:
        kv = prefix_of(model, coproc, full, at, harmless)
      own = KVCache(*kv, at[None], jnp.ones((1, N), jnp.int32))
      # The last token again: it asks, and is not seen.
      x = jnp.concatenate([copied[:, -1:], fed], 1)
      at = jnp.concatenate([at[-1:], after])[None]
      order = jnp.tri(A, dtype=bool) & (jnp.arange(A) > 0)[None]
      rows = QueryLayout.plain(at, jnp.ones_like(at)).replace(
        block_mask=order[None, None]
      )
      args = model, decoder, x[:, None], rows, cache.concat(own)
      out = transformer.run_blocks(*args)[:, 0]
    logp = jax.nn.log_softmax(transformer.logits(model, decoder, out))[0]
    return -logp[jnp.arange(A), targets]

  return nll


# --- one block under a dense mask -------------------------------------------


def flat(x):
  """[B, M, R, ...] -> [B, 1, M R, ...]."""
  return x.reshape(x.shape[0], 1, -1, *x.shape[3:])


def joined(cache, rows, order, given=None):
  """[context | rows of all traces] as one block, the context's kv given."""
  first = [cache.keys[:, :, None], cache.values[:, :, None]]
  if given is not None:
    shape = (*cache.keys.shape[:2], 1, -1, *cache.keys.shape[3:])
    own = [x.reshape(shape) for x in given]
    first = [jnp.concatenate(x, 3) for x in zip(first, own, strict=True)]
  positions, segments = (
    jnp.concatenate([a[:, None], flat(b)], 2)
    for a, b in (
      (cache.positions, rows.positions),
      (cache.segments, rows.segments),
    )
  )
  limits = jnp.full((2, 1, 1), NO_LIMIT)
  return QueryLayout(positions, segments, limits, order), tuple(first)


@functools.cache
def dense(kind, start):
  model, _, decoder, _, tokens = setup(kind, start)
  m, harmless = POINTS.shape[1], start == "harmless"

  @with_gradient
  def nll(coproc, laid, order, latent_order, latents_first):
    segments = traces.segments_of(DOCUMENTS, True)
    args = model, decoder, tokens
    hidden, cache = transformer.prefill(*args, segments=segments)
    copied = transformer.embed(model, decoder, laid.input_tokens)
    soft = jnp.broadcast_to(coproc["soft_tokens"][None, None], copied.shape)
    reads, x = cache, soft + copied if harmless else soft
    if kind == "activations":
      rows = QueryLayout.plain(cache.positions, segments)
      body = coproc["transformer"]
      own = transformer.run(model, body, hidden[:, None], rows, None)
      reads = cache.replace(keys=own.keys[:, :, 0], values=own.values[:, :, 0])
    if kind != "pause":
      rows, first = joined(reads, laid.latent_rows, latent_order)
      body = {"final_norm": decoder["final_norm"]} | coproc["transformer"]
      args = model, body, flat(x), rows, None
      out = transformer.run(*args, past_kv=first)
      x = out.hidden.reshape(copied.shape)
      if kind == "activations" and harmless:
        x = copied + x @ coproc["latent_projection"]
    embed = functools.partial(transformer.embed, model, decoder)
    if kind != "handover":
      rows, first = joined(cache, laid.rows, order)
      x = flat(jnp.concatenate([x, embed(laid.ahead)], 2))
    else:
      # PastKV rows of all traces, then all their own.
      rows, first = joined(cache, laid.rows, order, (out.keys, out.values))
      take = lambda a: a[:, :, latents_first]  # noqa: E731
      rows = rows.replace(
        positions=take(rows.positions), segments=take(rows.segments)
      )
      asked = jnp.concatenate([laid.input_tokens[..., -1:], laid.ahead], -1)
      x = flat(embed(asked))
    out = transformer.run_blocks(model, decoder, x, rows, None, past_kv=first)
    out = out[:, 0].reshape(2, m, -1, out.shape[-1])[:, :, -A:]
    logp = jax.nn.log_softmax(transformer.logits(model, decoder, out))
    return -jnp.take_along_axis(logp, laid.targets[..., None], -1)[..., 0]

  return nll


def run_dense(kind, start, scheme):
  _, spec, _, coproc, tokens = setup(kind, start, scheme)
  laid = layout_traces(tokens, spec)
  pairs = list(zip(DOCUMENTS, POINTS, strict=True))
  order = np.stack([dense_masks.dense_mask(d, p, spec) for d, p in pairs])
  own = np.stack([dense_masks.dense_latent_mask(d, p, spec) for d, p in pairs])
  square = np.zeros((2, own.shape[2], own.shape[2]), bool)
  square[:, S:] = own
  # Slots in the order: context, all traces' latents, all the other rows.
  blocks = S + np.arange(POINTS.shape[1] * spec.rows).reshape(-1, spec.rows)
  index = np.concatenate([np.arange(S), *blocks[:, :N], *blocks[:, N:]])
  if spec.reruns:
    order = order[:, index][:, :, index]
  w = laid.weights / laid.weights.sum()
  return dense(kind, start)(
    coproc, w, laid, order[:, None], square[:, None], index
  )


@pytest.mark.parametrize("kind, start", CASES)
def test_parallel_equals_one_at_a_time_equals_dense(kind, start):
  losses = []
  for scheme in traces.POSITIONS:
    laid, (loss, nll, grads) = run_parallel(kind, start, scheme)
    _, spec, _, coproc, tokens = setup(kind, start, scheme)
    single, nlls, single_grads = one_at_a_time(
      alone(kind, start), coproc, tokens, spec
    )
    assert len(nlls) == 6
    close(loss, single, LOSS)
    for (b, m), expected in nlls.items():
      got = np.asarray(nll)[b, m][np.asarray(laid.weights)[b, m] > 0]
      close(got, expected, NLL)
    # Of handover's last layer only keys and values are used.
    grads, single_grads = used(kind, grads), used(kind, single_grads)
    close_trees(grads, single_grads, GRADIENT)
    losses.append(loss)
    # A prefix has no rows that a dense mask could hold.
    if kind != "prefix":
      whole, whole_nll, whole_grads = run_dense(kind, start, scheme)
      close(loss, whole, LOSS)
      there = np.asarray(laid.weights) > 0
      close(np.asarray(nll)[there], np.asarray(whole_nll)[there], NLL)
      close_trees(grads, used(kind, whole_grads), GRADIENT)
  for a, b in ((0, 1), (1, 2), (0, 2)):
    far(losses[a], losses[b])


def used(kind, grads):
  """Leaves with a gradient, by name; asserts that the others have none."""
  flat, unused = {}, []
  for path, x in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if kind == "handover" and "blocks" in name:
      last = name.split("blocks/")[1]
      makes_kv = last.startswith(("attention/k", "attention/v"))
      if not makes_kv and "attention_norm" not in last:
        unused.append(np.abs(x[-1]).max())
        x = x[:-1]
    flat[name] = x
  assert not any(unused)
  return flat


# --- starts -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_harmless_replacement_begins_as_the_frozen_decoder(kind):
  close(*nll_at_start("harmless", "replace", kind), LOSS)


@pytest.mark.parametrize(
  "kind, scheme, start",
  [("prefix", "overlay", "harmless"), ("handover", "replace", "as_is")],
)
def test_other_starts_do_not(kind, scheme, start):
  far(*nll_at_start(start, scheme, kind))


# --- one table ---------------------------------------------------------------

_PACKAGE = Path(kinds.__file__).parents[1]
_COLUMNS = {"network", "latents_are_kv", "reads_states", "does"}


def asking(source):
  """Lines of a file that read a column of the table or compare with a kind."""
  lines = set()
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Attribute):
      continue
    of_table = isinstance(node.value, ast.Name) and node.value.id == "Kind"
    of_kind = isinstance(node.value, ast.Attribute | ast.Name) and (
      getattr(node.value, "attr", getattr(node.value, "id", "")) == "kind"
    )
    if (of_kind and node.attr in _COLUMNS) or (
      of_table and node.attr.isupper()
    ):
      lines.add(node.lineno)
  return lines


def test_kinds_are_asked_for_in_few_places():
  """Beside the default of a class, which asks nothing."""
  found = []
  for path in _PACKAGE.rglob("*.py"):
    if path.name != "kinds.py":
      text = path.read_text()
      found += [
        f"{path.relative_to(_PACKAGE)}:{line}"
        for line in sorted(asking(text))
        if "kind: Kind = " not in text.splitlines()[line - 1]
      ]
  assert len(found) <= 10, found


def test_what_asks_for_a_kind_is_found():
  assert asking("if x.kind.network:\n  pass\nif kind is Kind.PAUSE: pass") == {
    1,
    3,
  }
  assert not asking("x.kind.check('late')\ny = x.network")


def test_every_kind_is_in_the_table_once():
  assert kinds.NAMES == tuple(kind.value for kind in kinds.Kind)
  with pytest.raises(UserError, match="coprocessor.kind='brake' is not one of"):
    kinds.Kind.of("brake")
  for kind in kinds.Kind:
    assert kinds.Kind.of(kind.value) is kind
    assert kind.part({"blocks": 1, "final_norm": 2, "embedder": 3}).keys() == (
      set(kind.network)
    )
