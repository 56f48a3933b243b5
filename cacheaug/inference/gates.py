"""Whether a context gets latents: small functions, and a head that is learned.

Each says yes or no for contexts that the decoder has read, from what it has
computed anyway: the last row's hidden state `hidden` [..., D], as of
`engine.Context`, which predicts the next token.

  every           after every k tokens
  uncertain       the next token's entropy is above a threshold
  worthwhile      the gain that a learned head predicts is above a threshold

What each of them gains, and which threshold to take, is measured by
`python -m cacheaug.projects.gating.report`, which also says how to use them:
`LM.generate(gate="entropy:1.2")`, `python -m cacheaug.generate --gate=...`.
Answers for whole prompts fit `LM.generate(latents=...)`.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.transformer import Params, Transformer
from cacheaug.weights import leaves
from cacheaug.weights import safetensors_io as files

# Hidden states [B, D] of rows that predict the next token -> [B] bool.
Gate = Callable[[jax.Array], jax.Array]

FORMAT = "cacheaug-gate-1"
_CONFIG, _WEIGHTS = "gate.json", "gate.safetensors"
_PARTS = (
  "gain_mean",
  "gain_scale",
  "mean",
  "scale",
  *(f"mlp/{x}/{y}" for x in ("in", "out") for y in ("kernel", "bias")),
)


def every(tokens: jax.Array, k: int) -> jax.Array:  # [...] -> [...] bool
  """After every k tokens; `tokens` are those of the context so far.

  Raises:
    UserError: k below 1.
  """
  if k < 1:
    raise UserError(f"k={k} must be at least 1")
  return tokens % k == 0


def uncertain(
  model: Transformer,
  decoder: Params,
  hidden: jax.Array,  # [..., D]
  threshold: float,  # nats
) -> jax.Array:  # [...] bool
  """Where the decoder does not know what comes next."""
  return entropy(model, decoder, hidden) > threshold


def worthwhile(
  head: Params,
  hidden: jax.Array,  # [..., D]
  threshold: float,
) -> jax.Array:  # [...] bool
  """Where latents are expected to gain more than `threshold` nats."""
  return predicted_gain(head, hidden) > threshold


# --- by name -----------------------------------------------------------------


def parse(
  text: str, model: Transformer, decoder: Params, fingerprint: str
) -> Gate:
  """The gate that 'entropy:NATS' or 'head:DIR[:NATS]' names.

  Args:
    text: NATS is the threshold; a head's own by default.
    model: of the decoder.
    decoder: its parameters.
    fingerprint: the decoder's, for which a head must have been learned.

  Raises:
    UserError: another name, a threshold that is no number, or no such head.
  """
  kind, _, rest = text.partition(":")
  if kind == "entropy" and rest:
    uncertain_ = functools.partial(_uncertain, model, decoder)
    return functools.partial(uncertain_, threshold=_threshold(text, rest))
  if kind != "head" or not rest:
    raise UserError(f"gate {text!r} is not entropy:NATS or head:DIR[:NATS]")
  directory, _, last = rest.rpartition(":")
  # A directory's own name may hold a colon.
  if not directory or (pathlib.Path(rest).expanduser() / _CONFIG).exists():
    directory, last = rest, ""
  head, meta = load_head(directory)
  if meta.get("decoder_fingerprint") != fingerprint:
    raise UserError(
      f"gate {text!r}: its head was learned for decoder "
      f"{meta.get('decoder_fingerprint')}, the one loaded is {fingerprint}: "
      "make one with cacheaug.projects.gating.report"
    )
  threshold = _threshold(text, last) if last else float(meta["threshold"])
  return functools.partial(_worthwhile, head, threshold=threshold)


def _threshold(text: str, number: str) -> float:
  try:
    value = float(number)
  except ValueError:
    value = math.nan
  if math.isnan(value):
    raise UserError(f"gate {text!r}: {number!r} is not a threshold in nats")
  return value


_uncertain = jax.jit(uncertain, static_argnames="model")
_worthwhile = jax.jit(worthwhile)


# --- scores -----------------------------------------------------------------


def entropy(
  model: Transformer,
  decoder: Params,
  hidden: jax.Array,  # [..., D]
) -> jax.Array:  # [...] nats
  """Entropy of the next token, under the frozen decoder."""
  logp = jax.nn.log_softmax(transformer.logits(model, decoder, hidden))
  return -(jnp.exp(logp) * logp).sum(-1)


class _Head(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    x = jax.nn.gelu(nn.Dense(self.width, name="in")(x))
    return nn.Dense(1, name="out")(x)[..., 0]


def predicted_gain(
  head: Params,
  hidden: jax.Array,  # [..., D]
) -> jax.Array:  # [...] nats
  """The head's guess of the nats that latents save on the next A tokens."""
  mean, scale = (_last(head[k], hidden) for k in ("mean", "scale"))
  x = (hidden.astype(jnp.float32) - mean) * scale
  width = head["mlp"]["in"]["bias"].shape[0]
  y = _Head(width).apply({"params": head["mlp"]}, x)
  return y * head["gain_scale"] + head["gain_mean"]


def _last(x, like):
  return x.reshape((1,) * (like.ndim - 1) + (-1,))


def fit_head(
  key: jax.Array,
  hidden: np.ndarray,  # [T, D]
  gain: np.ndarray,  # [T] nats, measured
  *,
  width: int = 64,
  steps: int = 2000,
  batch: int = 1024,
  learning_rate: float = 3e-3,
) -> Params:
  """A small MLP that regresses the measured gain on the hidden state.

  Mean squared error of the standardised gain; Adam, cosine to zero.

  Raises:
    UserError: no context to learn from.
  """
  if not len(gain):
    raise UserError("no context to fit a gate's head to: give more text")
  hidden = jnp.asarray(hidden, jnp.float32)
  gain = jnp.asarray(gain, jnp.float32)
  # A constant feature, or gain, has nothing to say: it is not scaled up.
  floor = 1e-6
  head = {
    "mean": hidden.mean(0),
    "scale": 1.0 / jnp.maximum(hidden.std(0), floor),
    "gain_mean": gain.mean(),
    "gain_scale": jnp.maximum(gain.std(), floor),
  }
  init, draw = jax.random.split(key)
  mlp = _Head(width).init(init, hidden[:1])["params"]
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

  def loss(mlp, index):
    error = predicted_gain(head | {"mlp": mlp}, hidden[index]) - gain[index]
    return jnp.mean((error / head["gain_scale"]) ** 2)

  def step(carry, i):
    mlp, state = carry
    index = jax.random.randint(
      jax.random.fold_in(draw, i), (batch,), 0, len(gain)
    )
    updates, state = optimizer.update(jax.grad(loss)(mlp, index), state)
    return (optax.apply_updates(mlp, updates), state), None

  @jax.jit
  def run(mlp):
    carry = mlp, optimizer.init(mlp)
    return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]

  return head | {"mlp": run(mlp)}


# --- files ------------------------------------------------------------------


def save_head(
  directory: str | pathlib.Path, head: Params, meta: dict[str, Any]
) -> None:
  """Writes gate.safetensors and gate.json; `meta` says what it belongs to.

  Raises:
    UserError: a directory that cannot be written.
  """
  directory = pathlib.Path(directory).expanduser()
  flat = {
    k: np.asarray(v, np.float32).reshape(v.shape or (1,))
    for k, v in leaves.flatten(head).items()
  }
  shapes = {k: (v.shape, v.dtype) for k, v in flat.items()}
  files.write(directory / _WEIGHTS, shapes, flat.values())
  files.write_json(directory / _CONFIG, {"format": FORMAT} | meta)


def load_head(
  directory: str | pathlib.Path,
) -> tuple[Params, dict[str, Any]]:
  """Reads a head that `save_head` wrote.

  Raises:
    UserError: no head there, or a damaged one; names the file.
  """
  directory = pathlib.Path(directory).expanduser()
  path = directory / _CONFIG
  if not path.exists():
    raise UserError(
      f"{path}: missing; make it with cacheaug.projects.gating.report"
    )
  meta = files.read_json(path)
  if meta.pop("format", None) != FORMAT:
    raise UserError(f"{path}: not a gate's head ({FORMAT})")
  names = sorted(files.headers([directory / _WEIGHTS]))
  if names != sorted(_PARTS):
    raise UserError(f"{directory / _WEIGHTS}: not a gate's head: has {names}")
  flat = {k: jnp.asarray(files.read(directory / _WEIGHTS, k)) for k in names}
  mlp: Params = {"in": {}, "out": {}}
  for layer in mlp:
    for leaf in ("kernel", "bias"):
      mlp[layer][leaf] = flat[f"mlp/{layer}/{leaf}"]
  head = {k: flat[k] for k in ("mean", "scale")} | {"mlp": mlp}
  return head | {k: flat[k][0] for k in ("gain_mean", "gain_scale")}, meta
