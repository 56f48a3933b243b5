"""Module names that users may have typed, kept for one release."""

import importlib
import runpy

import pytest

import cacheaug

_TYPED = (
  "cacheaug.sweeping.rows",
  "cacheaug.evals.lm_eval_model",
  "cacheaug.evals.paired",
  "cacheaug.evals.gating",
  "cacheaug.matching",
  "cacheaug.inference.store",
)


@pytest.mark.parametrize("name", _TYPED)
def test_a_former_name_is_the_module_itself(name):
  if "lm_eval" in name:
    pytest.importorskip("lm_eval", reason="pip install 'cacheaug[eval]'")
  found = importlib.import_module(name)
  assert found is importlib.import_module(cacheaug._FORMER[name])
  assert found.__spec__.name == cacheaug._FORMER[name]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ("cacheaug.evals.gating", "cacheaug.matching"))
def test_a_former_command_runs(name):
  """As `python -m` finds its code; it is not run as the main module here."""
  names = runpy.run_module(name, run_name="not_main")
  assert callable(names["main"])
  with pytest.raises(ImportError):
    runpy.run_module(f"{name}_", run_name="not_main")
