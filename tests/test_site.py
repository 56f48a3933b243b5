"""The site builds without a dead link, and the notebook runs."""

import json
import os
import re
import subprocess
import sys

import pytest
from fenced import ROOT

_NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def _needs(name: str, extra: str) -> None:
  pytest.importorskip(name, reason=f"{name}: pip install -e '.[{extra}]'")


def _build(config: str, out) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"-f{config}"]
    + [f"-d{out}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
  )


def test_site_builds_without_a_dead_link(tmp_path):
  _needs("mkdocs", "docs")
  built = _build(str(ROOT / "mkdocs.yml"), tmp_path / "site")
  assert built.returncode == 0, built.stderr
  page = (tmp_path / "site" / "method" / "index.html").read_text()
  # Figures are in the page itself, where they follow its colours.
  assert page.count('<svg xmlns="http://www.w3.org/2000/svg" viewBox') >= 6
  # Parts of the README are in the pages, in place of their names.
  for page, part in (
    ("index.html", "hops: held-out perplexity"),
    ("index.html", "cacheaug.load("),
    ("clusters/index.html", "tpu_vm.sh resume"),
    ("recipes/index.html", "configs/sweeps/gpu.py"),
  ):
    html = (tmp_path / "site" / page).read_text()
    assert part in re.sub(r"<[^>]+>", "", html), page
  for file in (tmp_path / "site").rglob("*.html"):
    assert "8&lt;--" not in file.read_text(), file
    fetched = re.findall(
      r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"',
      file.read_text(),
    )
    assert [url for url in fetched if "canonical" not in url] == [], file


def test_dead_link_is_refused(tmp_path):
  """The control of the test above."""
  _needs("mkdocs", "docs")
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs" / "index.md").write_text("[gone](none.md)\n")
  config = tmp_path / "mkdocs.yml"
  text = (ROOT / "mkdocs.yml").read_text()
  text = re.sub(r"^nav:\n(  .*\n)+", "", text, flags=re.MULTILINE)
  config.write_text(text)
  built = _build(str(config), tmp_path / "site")
  assert built.returncode == 1
  assert "none.md" in built.stderr + built.stdout


def test_notebook_is_committed_with_its_outputs():
  cells = json.loads(_NOTEBOOK.read_text())["cells"]
  code = [c for c in cells if c["cell_type"] == "code"]
  silent = [c for c in code if not c["outputs"]]
  assert len(code) > 6 and len(silent) == 1, "all but the imports print"
  kinds = {o["output_type"] for c in code for o in c["outputs"]}
  assert kinds == {"stream"}
  assert _NOTEBOOK.stat().st_size < 40_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebook_runs():
  """68 seconds of processor time, in a kernel of this Python."""
  _needs("nbclient", "test")
  _needs("ipykernel", "test")
  # In a process of its own: its event loop and ours do not share warnings.
  code = f"""
import json, nbformat, sys
from nbclient import NotebookClient
from jupyter_client import KernelManager
notebook = nbformat.read({str(_NOTEBOOK)!r}, 4)
manager = KernelManager()
manager.kernel_spec.argv[0] = sys.executable
where = {{"metadata": {{"path": {str(_NOTEBOOK.parent)!r}}}}}
client = NotebookClient(notebook, km=manager, timeout=800, resources=where)
client.execute()
print("".join(
  o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])
))
"""
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env.pop("XLA_FLAGS", None)  # one device, as a person has
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=850,
    env=env,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  frozen, latents = (
    int(re.search(rf"^{name}: (\d+) of 64 right", done.stdout, re.M)[1])
    for name in ("frozen", "with latents")
  )
  assert latents > frozen + 10
  assert "code: held-out perplexity" in done.stdout
