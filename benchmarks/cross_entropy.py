"""The loss over a large vocabulary, against float64: errors, time, memory.

  python benchmarks/cross_entropy.py [--vocab_size=256128 --vocab_size=262144]
      [--rows=2048] [--width=2304] [--dtype=bfloat16 --dtype=float32]

`frozen` is kernels/cross_entropy.py as training uses it: nll and its gradient
with respect to the hidden rows from the same logits, two products. `chunked` is
the usual way, logits of a chunk computed again in the backward pass: three
products. `whole` keeps the logits of all rows. Errors are of the worst row,
against NumPy in float64 from the same (rounded) hidden rows and embedding: nll
in nats, the gradient's difference over the mean norm of a row's gradient.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.kernels import cross_entropy

WAYS = ("frozen", "chunked", "whole")
CAPS = {256_128: 30.0, 256_000: 30.0}  # Gemma 2's; Gemma 3 has none
DTYPES = ("bfloat16", "float32")
CHECKED = 64  # rows computed in float64


@dataclasses.dataclass(frozen=True)
class Measured:
  """One way's figures at one vocabulary and dtype."""

  way: str
  vocab_size: int
  dtype: str
  rows: int
  nll_error: float  # nats, worst of the rows that were checked
  gradient_error: float  # worst row, over the mean norm of a row
  seconds: float  # median of loss and gradient of all rows
  temporary_bytes: int  # of the compiled program


def measure(
  vocab_size: int,
  dtype: str,
  *,
  rows: int,
  width: int,
  ways: Sequence[str] = WAYS,
  repeats: int = 3,
) -> list[Measured]:
  """Figures of each way.

  Args:
    vocab_size: V.
    dtype: of hidden rows and embedding; sums are float32 in any case.
    rows: hidden rows of one loss, with equal weights.
    width: D.
    ways: of WAYS.
    repeats: timed, after one that is not.
  """
  hidden, embedding, targets = _arrays(vocab_size, dtype, rows, width)
  softcap = CAPS.get(vocab_size, 0.0)
  right = reference(
    np.asarray(hidden[:CHECKED], np.float64),
    np.asarray(embedding, np.float32),
    targets[:CHECKED],
    softcap=softcap,
  )
  found = []
  arguments = jax.device_put((hidden, embedding, targets))
  for way in ways:
    run = jax.jit(functools.partial(_loss, way, softcap=softcap))
    compiled = run.lower(*arguments).compile()
    times = []
    for _ in range(1 + repeats):
      began = time.perf_counter()
      out = jax.block_until_ready(compiled(*arguments))
      times.append(time.perf_counter() - began)
    nll, gradient = (np.asarray(x[:CHECKED], np.float64) for x in out)
    apart = np.linalg.norm(gradient - right[1], axis=-1)
    found.append(
      Measured(
        way=way,
        vocab_size=vocab_size,
        dtype=dtype,
        rows=rows,
        nll_error=float(np.abs(nll - right[0]).max()),
        gradient_error=float(
          apart.max() / np.linalg.norm(right[1], axis=-1).mean()
        ),
        seconds=statistics.median(times[1:]),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
      )
    )
  return found


def reference(
  hidden: np.ndarray,  # [T, D] float64
  embedding: np.ndarray,  # [V, D]
  targets: np.ndarray,  # [T]
  *,
  softcap: float,
) -> tuple[np.ndarray, np.ndarray]:  # [T], [T, D]
  """Nll and its gradient with respect to each row, in float64."""
  top = np.full(len(hidden), -np.inf)
  total = np.zeros(len(hidden))
  target_logit = np.zeros(len(hidden))
  parts = range(0, len(embedding), 2**15)
  for first in parts:
    logits, _ = _logits(hidden, embedding[first : first + 2**15], softcap)
    higher = np.maximum(top, logits.max(1))
    total = total * np.exp(top - higher)
    total += np.exp(logits - higher[:, None]).sum(1)
    top = higher
    inside = (first <= targets) & (targets < first + logits.shape[1])
    target_logit[inside] = logits[inside, targets[inside] - first]
  lse = top + np.log(total)
  gradient = np.zeros_like(hidden)
  for first in parts:
    part = embedding[first : first + 2**15].astype(np.float64)
    logits, slope = _logits(hidden, part, softcap)
    back = np.exp(logits - lse[:, None])
    inside = np.flatnonzero(
      (first <= targets) & (targets < first + logits.shape[1])
    )
    back[inside, targets[inside] - first] -= 1
    gradient += (back * slope) @ part
  return lse - target_logit, gradient


def _logits(hidden, embedding, softcap):
  """Capped logits, and d logit / d product."""
  logits = hidden @ embedding.T.astype(np.float64)
  if not softcap:
    return logits, 1.0
  bent = np.tanh(logits / softcap)
  return softcap * bent, 1 - bent**2


def _arrays(vocab_size, dtype, rows, width):
  """Rows that predict their targets in part, as a trained decoder's do."""
  random = np.random.default_rng(0)
  embedding = random.standard_normal((vocab_size, width), np.float32)
  embedding *= width**-0.5
  targets = random.integers(0, vocab_size, rows).astype(np.int32)
  hidden = random.standard_normal((rows, width), np.float32)
  # The target's logit is 0 to 16 above the rest, whose deviation is 2.
  sure = random.uniform(0, 16, (rows, 1)).astype(np.float32)
  hidden = 2 * hidden + sure * embedding[targets]
  dtype = jnp.dtype(dtype)
  return hidden.astype(dtype), embedding.astype(dtype), targets


def _loss(way, hidden, embedding, targets, *, softcap):
  """Nll [T] and its gradient [T, D] by one of WAYS."""

  def logits_of(hidden):
    logits = jnp.einsum(
      "...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32
    )
    return softcap * jnp.tanh(logits / softcap) if softcap else logits

  def nll(hidden):
    if way == "whole":
      logits = logits_of(hidden)
      at = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
      out = jax.nn.logsumexp(logits, axis=-1) - at
    else:
      out = cross_entropy.token_nll(
        logits_of,
        hidden[None],
        targets[None],
        vocab_size=len(embedding),
        frozen=way == "frozen",
      )[0]
    return out.sum(), out

  gradient, out = jax.grad(nll, has_aux=True)(hidden)
  return out, gradient


def table(found: Sequence[Measured]) -> str:
  """The figures as Markdown."""
  lines = [
    "| V | dtype | rows | way | nll error, nats | gradient error | ms | "
    "temporary MB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in found:
    lines.append(
      f"| {row.vocab_size:,} | {row.dtype} | {row.rows} | {row.way} | "
      f"{row.nll_error:.1e} | {row.gradient_error:.1e} | "
      f"{1e3 * row.seconds:,.1f} | {row.temporary_bytes / 1e6:,.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--vocab_size", type=int, action="append")
  parser.add_argument("--dtype", action="append", choices=DTYPES)
  parser.add_argument("--rows", type=int, default=2048)
  parser.add_argument("--width", type=int, default=2304)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  found = []
  for vocab_size in args.vocab_size or (256_128, 262_144):
    for dtype in args.dtype or DTYPES:
      found += measure(
        vocab_size,
        dtype,
        rows=args.rows,
        width=args.width,
        repeats=args.repeats,
      )
  if args.json:
    print(json.dumps([dataclasses.asdict(row) for row in found]))
    return
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}, D = {args.width}")
  print(table(found))


if __name__ == "__main__":
  main()
