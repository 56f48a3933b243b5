"""A kernel is run before it is relied on, and replaced where it is wrong."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheaug.errors import UserError
from cacheaug.kernels import (
  context_attention,
  context_gpu,
  dispatch,
  self_check,
)

SHAPES = self_check.Shapes(64, 2, 50.0, "bfloat16")
CPU = jax.devices("cpu")[:1]


def kernel(**changes):
  """A module as context_attention's, by default as correct as it."""
  right = {
    "forward": context_attention.forward,
    "backward_dq": context_attention.backward_dq,
    "supported": lambda head_dim, dtype: None,
    "__file__": __file__,
  }
  return types.SimpleNamespace(**(right | changes))


def late_stop(function):
  """The same, but each row sees one slot too many."""

  def changed(q, keys, values, start, stop, *rest, softcap):
    stop = jnp.where(stop > start, stop + 1, stop)
    return function(q, keys, values, start, stop, *rest, softcap=softcap)

  return changed


def uncapped(q, *arguments, softcap):
  return context_attention.backward_dq(q, *arguments, softcap=0.0 * softcap)


def last_tile_lost(*arguments, softcap):
  out, lse = context_attention.forward(*arguments, softcap=softcap)
  return out.at[1, 1, -16:].set(0), lse


def raising(*arguments, softcap):
  raise NotImplementedError("no such instruction")


def infinite(*arguments, softcap):
  dq = context_attention.backward_dq(*arguments, softcap=softcap)
  return dq.at[0, 0, 0, 0].set(jnp.nan)


@pytest.fixture
def installed(monkeypatch, tmp_path):
  """Puts a module in the place of the GPU kernel, on this machine's CPU.

  With fewer rows and slots than a device needs: one tile, quick to compile.
  """
  calls = []
  monkeypatch.setattr(self_check, "ROWS", 60)
  monkeypatch.setattr(self_check, "S", 200)

  def install(module):
    def load(name):
      calls.append(name)
      return module

    monkeypatch.setitem(dispatch.KERNELS, "gpu", "pretended")
    monkeypatch.setattr(self_check.importlib, "import_module", load)
    monkeypatch.setattr(
      dispatch, "choose", lambda name, *_: ("gpu", "pretended to be one")
    )
    return calls

  self_check._check.cache_clear()
  self_check.make_case.cache_clear()
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  yield install
  jax.config.update("jax_compilation_cache_dir", before)
  self_check._check.cache_clear()
  self_check.make_case.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_the_xla_path_is_right(softcap, dtype):
  shapes = self_check.Shapes(64, 3, softcap, dtype)
  case = self_check.make_case(shapes)
  run = functools.partial(context_attention.forward, softcap=softcap)
  out, lse = jax.jit(run)(case.q, case.keys, case.values, case.start, case.stop)
  dq = context_attention.backward_dq(
    *(case.q, case.keys, case.values, case.start, case.stop),
    case.lse.astype(np.float32),
    case.delta.astype(np.float32),
    case.dout,
    softcap=softcap,
  )
  errors = self_check.errors_of(case, *jax.device_get((out, lse, dq)))
  for name, tolerance in self_check.TOLERANCE[dtype].items():
    # Room for a device's own rounding.
    assert errors[name] < tolerance / 5, errors


def test_the_gpu_kernel_is_right_in_interpret_mode(monkeypatch):
  """With a tanh that is off by as much as the instruction may be."""
  monkeypatch.setattr(
    context_gpu,
    "_tanh",
    lambda x, dtype, interpret: jnp.tanh(x) * (1 + 2.0**-11),
  )
  jax.clear_caches()  # programs with another tanh
  problem = self_check.compare(
    functools.partial(context_gpu.forward, softcap=50.0, interpret=True),
    functools.partial(context_gpu.backward_dq, softcap=50.0, interpret=True),
    SHAPES,
    CPU[0],
  )
  assert problem is None


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"forward": late_stop(context_attention.forward)}, "wrong result"),
    ({"forward": last_tile_lost}, "wrong result"),
    ({"backward_dq": late_stop(context_attention.backward_dq)}, "gradient"),
    ({"backward_dq": infinite}, "wrong gradient (off by nan"),
    ({"forward": raising}, "does not run (NotImplementedError: no such"),
    ({"backward_dq": raising}, "does not run"),
  ],
)
def test_a_wrong_kernel_is_replaced_with_one_line(
  changes, words, installed, caplog
):
  installed(kernel(**changes))
  with caplog.at_level(logging.WARNING):
    name, _ = self_check.choose("auto", SHAPES, CPU)
  assert name == "xla"
  (record,) = [r for r in caplog.records if "kernel" in r.getMessage()]
  line = record.getMessage()
  assert words in line and "\n" not in line
  assert "please report this line" in line and jax.__version__ in line
  assert CPU[0].device_kind in line and "head_dim=64" in line


def test_a_cap_that_is_left_out_is_seen(installed):
  """Though it bends few of the scores, and in the gradient alone."""
  installed(kernel(backward_dq=uncapped))
  assert "gradient" in self_check.check("gpu", SHAPES, CPU[0])


def test_asked_for_by_name_it_is_an_error(installed):
  installed(kernel(forward=raising))
  with pytest.raises(UserError, match="config.attention='gpu'.*does not run"):
    self_check.choose("gpu", SHAPES, CPU)


def test_a_right_kernel_is_checked_once(installed, monkeypatch):
  installed(kernel())
  assert self_check.choose("auto", SHAPES, CPU)[0] == "gpu"
  self_check._check.cache_clear()  # as in a new process
  monkeypatch.setattr(self_check, "compare", None)
  assert self_check.choose("auto", SHAPES, CPU)[0] == "gpu"
  other = self_check.Shapes(64, 2, 0.0, "bfloat16")
  with pytest.raises(TypeError):  # another shape is checked anew
    self_check.check("gpu", other, CPU[0])


def test_a_wrong_kernel_is_checked_again(installed):
  """It may have failed for want of memory: nothing of it is kept."""
  installed(kernel(forward=raising))
  assert self_check.choose("auto", SHAPES, CPU)[0] == "xla"
  self_check._check.cache_clear()
  installed(kernel())
  assert self_check.choose("auto", SHAPES, CPU)[0] == "gpu"


def test_costs_nothing_where_no_kernel_is_chosen(monkeypatch):
  monkeypatch.setattr(self_check, "check", None)
  name, why = self_check.choose("auto", SHAPES, CPU)
  assert name == "xla" and "no kernel for cpu" in why


def test_devices_that_are_not_here_are_not_run_on(installed):
  installed(kernel(forward=raising))
  away = types.SimpleNamespace(platform="cpu", process_index=0)
  name, why = self_check.choose("auto", SHAPES, [away])
  assert name == "gpu" and "not checked" in why
