"""Module names that users may have typed, kept for one release."""

import importlib
import runpy
import sys

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


@pytest.mark.parametrize("name", ("cacheaug.evals.gating", "cacheaug.matching"))
def test_a_former_command_runs(name, monkeypatch):
  """As `python -m` finds its code; it is not run as the main module here."""
  monkeypatch.delitem(sys.modules, name, raising=False)
  names = runpy.run_module(name, run_name="not_main")
  assert callable(names["main"])
  with pytest.raises(ImportError):
    runpy.run_module(f"{name}_", run_name="not_main")
