"""Runs a context kernel on the real device, once, before a run relies on it.

A kernel is code for one device, compiled by that machine's own compiler. This
module runs it there at small shapes, compares the results with plain attention
in float64 on the host, and names the XLA path where the kernel does not compile
or is wrong. It costs two small programs; a verdict that a kernel is right is
kept, for the same device kind, versions, source and shapes.
"""

import dataclasses
import functools
import hashlib
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cacheaug.errors import UserError, one_line
from cacheaug.kernels import context_attention, dispatch

# B sequences, K key heads, S slots: more than one tile of rows and of slots
# (512 x 256 on a TPU, 128 x 128 on a GPU), and no multiple of either.
B, K, S = 2, 2, 600
ROWS = 640  # at least, of a sequence and key head; whole traces of TRACE rows
TRACE = 5  # rows

# Norm of a row's difference over the mean norm of the rows, for the worst row;
# nats for the log-sum-exp. In bfloat16 the weights are rounded to 2^-9 before
# the second product; and a GPU's tanh may be off by 2^-11, which moves a score
# of 20 by 0.01. Seen in interpret mode: 3.3e-3, 7e-6 and 1.7e-2; with every
# tanh off by as much as it may be 8.5e-3, 1.0e-2 and 5.0e-2. A slot too many is
# off by more than 1, a cap of 50 left out of the gradient by 4.
TOLERANCE = {
  "float32": {"result": 1e-4, "log-sum-exp": 1e-4, "gradient": 1e-4},
  "bfloat16": {"result": 3e-2, "log-sum-exp": 3e-2, "gradient": 1.5e-1},
}


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What a run asks of a kernel."""

  head_dim: int  # E
  groups: int  # G, query heads of a key head
  softcap: float  # 0: none
  dtype: str


@dataclasses.dataclass(frozen=True)
class Case:
  """Arguments of context_attention's two functions, and the right results."""

  q: np.ndarray  # [B, K, Q, E], as are dout, out and dq
  keys: np.ndarray  # [B, K, S, E]
  values: np.ndarray  # [B, K, S, E]
  start: np.ndarray  # [B, Q]
  stop: np.ndarray  # [B, Q]
  dout: np.ndarray
  out: np.ndarray  # float64, as are lse, delta and dq
  lse: np.ndarray  # [B, K, Q], as is delta
  delta: np.ndarray
  dq: np.ndarray


def choose(
  name: str,
  shapes: Shapes,
  devices: Sequence[jax.Device],
) -> tuple[str, str]:
  """The kernel to run on these devices, checked on one of them, and why.

  Args:
    name: of dispatch.NAMES; what config.attention says.
    shapes: of the run.
    devices: the run's; those of another process, or of a machine that is not
      here, are not run on.

  Raises:
    UserError: a kernel that was asked for by name and does not work.
  """
  platform = devices[0].platform
  chosen, why = dispatch.choose(
    name, platform, shapes.head_dim, jnp.dtype(shapes.dtype)
  )
  if chosen not in dispatch.PALLAS:
    return chosen, why
  attached = jax.local_devices()
  mine = [device for device in devices if device in attached]
  if not mine:
    return chosen, f"{why}; not checked: they are not attached here"
  problem = _agreed(check(chosen, shapes, mine[0]), devices)
  if problem is None:
    return chosen, f"{why}; checked on {mine[0].device_kind}"
  line = (
    f"the {chosen} kernel for attention over the context {problem} on "
    f"{mine[0].device_kind} ({', '.join(versions(mine[0]))}; {shapes})"
  )
  if name != "auto":
    raise UserError(
      f"config.attention={name!r}: {line}: give attention=auto, and report it "
      "with this line"
    )
  logging.warning(
    "%s: the XLA path runs in its place, slower and with the same result; "
    "please report this line",
    line,
  )
  return "xla", "the kernel failed its check"


def check(name: str, shapes: Shapes, device: jax.Device) -> str | None:
  """What is wrong with a kernel on a device; None where it is right.

  A right kernel is remembered beside the compiled programs (the directory
  jax_compilation_cache_dir), a wrong one in this process alone.
  """
  key = _key(name, shapes, device)
  return _check(name, shapes, device, key)


@functools.cache
def _check(name, shapes, device, key) -> str | None:
  marker = _marker(key)
  if marker is not None and marker.exists():
    return None
  module = importlib.import_module(dispatch.KERNELS[name])
  problem = compare(
    functools.partial(module.forward, softcap=shapes.softcap),
    functools.partial(module.backward_dq, softcap=shapes.softcap),
    shapes,
    device,
  )
  if problem is None and marker is not None:
    try:
      marker.parent.mkdir(parents=True, exist_ok=True)
      marker.touch()
    except OSError:  # a directory that only others may write to
      logging.debug("%s: cannot be written", marker)
  return problem


def compare(
  forward: Callable[..., tuple[jax.Array, jax.Array]],
  backward_dq: Callable[..., jax.Array],
  shapes: Shapes,
  device: jax.Device,
) -> str | None:
  """What is wrong with two functions as context_attention's; None if nothing.

  Args:
    forward: of (q, keys, values, start, stop).
    backward_dq: of these and (lse, delta, dout).
    shapes: to compare at.
    device: that runs them.
  """
  case = make_case(shapes)
  number = np.float32
  arguments = jax.device_put(
    (case.q, case.keys, case.values, case.start, case.stop), device
  )
  rest = jax.device_put(
    (case.lse.astype(number), case.delta.astype(number), case.dout), device
  )
  try:
    # Traced outside of any mesh or precision that the caller has set.
    out, lse = jax.device_get(jax.jit(forward)(*arguments))
    dq = jax.device_get(jax.jit(backward_dq)(*arguments, *rest))
  except Exception as e:  # noqa: BLE001, compilers raise what they like
    return f"does not run ({type(e).__name__}: {one_line(e, 200)})"
  return difference(case, out, lse, dq, TOLERANCE[shapes.dtype])


def difference(
  case: Case,
  out: np.ndarray,  # [B, K, Q, E]
  lse: np.ndarray,  # [B, K, Q]
  dq: np.ndarray,  # [B, K, Q, E]
  tolerance: Mapping[str, float],
) -> str | None:
  """The first result beyond its tolerance, in words."""
  for name, error in errors_of(case, out, lse, dq).items():
    if not error <= tolerance[name]:  # NaN too
      return (
        f"gives a wrong {name} (off by {error:.1e}, tolerance "
        f"{tolerance[name]:.1e})"
      )
  return None


def errors_of(
  case: Case, out: np.ndarray, lse: np.ndarray, dq: np.ndarray
) -> dict[str, float]:
  """The worst row of each result: see TOLERANCE."""
  sees = np.broadcast_to((case.start < case.stop)[:, None], case.lse.shape)
  # A row that sees nothing has MASKED, whatever its exact value.
  lse = np.where(sees | (lse > context_attention.MASKED / 2), lse, case.lse)
  return {
    "result": _worst_row(out, case.out),
    "log-sum-exp": float(np.abs(lse - case.lse).max()),
    "gradient": _worst_row(dq, case.dq),
  }


def _worst_row(found: np.ndarray, right: np.ndarray) -> float:
  norms = np.linalg.norm(right, axis=-1)
  errors = np.linalg.norm(found.astype(np.float64) - right, axis=-1)
  return float(errors.max() / norms[norms > 0].mean())


@functools.lru_cache(maxsize=2)
def make_case(shapes: Shapes) -> Case:
  """Random arguments, and plain attention in float64.

  Traces of TRACE rows, sorted by point, over packed documents; one window, one
  row of each trace that sees nothing.
  """
  random = np.random.default_rng(0)
  dtype = jnp.dtype(shapes.dtype)
  e, traces = shapes.head_dim, -(-ROWS // (TRACE * shapes.groups))
  rows = traces * TRACE * shapes.groups

  def normal(*shape):
    return random.standard_normal(shape, np.float32).astype(dtype)

  points = np.sort(random.integers(0, S, (B, traces)), 1)
  documents = np.array([0, S // 3, S // 2])  # first slots
  begins = documents[np.searchsorted(documents, points, side="right") - 1]
  window = np.maximum(points - S // 8, begins)
  begins = np.where(np.arange(traces) % 2, begins, window)
  start = begins.repeat(TRACE * shapes.groups, 1).astype(np.int32)
  stop = (points + 1).repeat(TRACE * shapes.groups, 1).astype(np.int32)
  stop[:, :: TRACE * shapes.groups] = 0  # these see nothing
  # Scores of this standard deviation: wide enough for the cap to bend some,
  # and neither flat nor one slot alone.
  spread = max(2.0, shapes.softcap / 10)
  q = (spread * normal(B, K, rows, e) / e**0.5).astype(dtype)
  keys, values = normal(B, K, S, e), normal(B, K, S, e)
  dout = normal(B, K, rows, e)
  out, lse, delta, dq = plain(
    *(x.astype(np.float64) for x in (q, keys, values, dout)),
    start,
    stop,
    softcap=shapes.softcap,
  )
  return Case(
    q, keys, values, start, stop, dout, out=out, lse=lse, delta=delta, dq=dq
  )


def plain(
  q: np.ndarray,  # [B, K, Q, E] float64, as is dout
  keys: np.ndarray,  # [B, K, S, E] float64
  values: np.ndarray,  # [B, K, S, E] float64
  dout: np.ndarray,
  start: np.ndarray,  # [B, Q]
  stop: np.ndarray,  # [B, Q]
  *,
  softcap: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """(out, lse, delta, dq) by the definition: one softmax with a dense mask."""
  scores = q @ keys.swapaxes(-1, -2)
  slope = np.ones_like(scores)
  if softcap:
    bent = np.tanh(scores / softcap)
    scores, slope = softcap * bent, 1 - bent**2
  slots = np.arange(keys.shape[2])
  seen = (start[..., None] <= slots) & (slots < stop[..., None])  # [B, Q, S]
  seen = np.broadcast_to(seen[:, None], scores.shape)
  top = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0.0)
  weights = np.where(seen, np.exp(np.where(seen, scores, 0.0) - top), 0.0)
  total = weights.sum(-1, keepdims=True)
  some = total > 0
  total = np.where(some, total, 1.0)
  lse = np.where(some, top + np.log(total), context_attention.MASKED)[..., 0]
  weights /= total
  out = weights @ values
  delta = (out * dout).sum(-1)
  back = weights * (dout @ values.swapaxes(-1, -2) - delta[..., None]) * slope
  return out, lse, delta, back @ keys


def versions(device: jax.Device) -> tuple[str, str]:
  """Of jax, and of the device's own compiler and runtime."""
  platform = " ".join(device.client.platform_version.split())
  return f"jax {jax.__version__}", platform


def _key(name: str, shapes: Shapes, device: jax.Device) -> str:
  """What a verdict depends on, as a file's name."""
  module = importlib.import_module(dispatch.KERNELS[name])
  folder = pathlib.Path(__file__).parent
  sources = [folder / "intervals.py", folder / "self_check.py"]
  if module.__file__:
    sources.append(pathlib.Path(module.__file__))
  digest = hashlib.sha256(
    repr((name, shapes, device.device_kind, *versions(device))).encode()
  )
  for path in sources:
    digest.update(path.read_bytes())
  return f"{name}-{digest.hexdigest()[:32]}"


def _marker(key: str) -> epath.Path | None:
  directory = jax.config.jax_compilation_cache_dir
  return epath.Path(directory) / "checked_kernels" / key if directory else None


def _agreed(problem: str | None, devices: Sequence[jax.Device]) -> str | None:
  """The processes of one run compile one program, so one's failure is all's."""
  if len({device.process_index for device in devices}) == 1:
    return problem
  failed = multihost_utils.process_allgather(np.array(problem is not None))
  if problem is None and failed.any():
    return f"fails on process {int(np.argmax(failed))}"
  return problem
