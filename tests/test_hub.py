"""Decoders and coprocessors by the names of hub repositories."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import fake_hub
import gguf_files
import make_golden
import pytest
from huggingface_hub import constants

import cacheaug
from cacheaug.errors import UserError
from cacheaug.weights import hub, pretrained

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def refuses(message):
  return pytest.raises(UserError, match=re.escape(message))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  root = tmp_path_factory.mktemp("repositories")
  decoder = root / "decoder"
  shutil.copytree(pretrained.resolve("shipped:nano"), decoder)
  (decoder / "pytorch_model.bin").write_bytes(b"a pickle")
  (decoder / "original").mkdir()
  (decoder / "original" / "model.safetensors").write_bytes(b"another")
  (decoder / "consolidated.safetensors").write_bytes(b"another")
  pickled = root / "pickled"
  pickled.mkdir()
  (pickled / "config.json").write_text("{}")
  (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
  files = root / "files"
  files.mkdir()
  gguf_files.write_plain(files / "a-Q8_0.gguf", make_golden.GOLDEN / "qwen3")
  with fake_hub.serving(
    {
      "org/nano": decoder,
      "org/pickled": pickled,
      "org/files-GGUF": files,
      "gated/nano": decoder,
      "org/tiny_coprocessor": pretrained.resolve("shipped:tiny_coprocessor"),
    }
  ) as served:
    yield served


@pytest.fixture(autouse=True)
def clean(server, monkeypatch, tmp_path):
  """The library as if it had just been imported with these variables."""
  monkeypatch.setattr(constants, "ENDPOINT", server.url)
  template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
  monkeypatch.delenv("HF_TOKEN", raising=False)
  monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
  hub.download.cache_clear()
  server.requests.clear()
  yield
  hub.download.cache_clear()


def downloaded(server):
  return sorted(
    path.partition(f"{fake_hub.SHA}/")[2]
    for command, path in server.requests
    if command == "GET" and "/resolve/" in path
  )


def test_a_decoder_by_name(server):
  """The shipped one's weights and tokenizer; only the files that are read."""
  lm = cacheaug.load("org/nano")
  assert lm.fingerprint == cacheaug.load("shipped:nano").fingerprint
  assert lm.tokenizer is not None
  assert downloaded(server) == [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  asked = len(server.requests)
  assert pretrained.resolve("org/nano").is_dir()
  assert len(server.requests) == asked  # once in a process


def test_revisions(server):
  assert pretrained.resolve("org/nano@v1").is_dir()
  assert pretrained.resolve(f"org/nano@{fake_hub.SHA}").is_dir()
  assert ("GET", "/api/models/org/nano/revision/v1") in server.requests
  with refuses("has no such revision"):
    pretrained.resolve("org/nano@v2")


def test_one_gguf_file(server):
  path = pretrained.resolve("org/files-GGUF/a-Q8_0.gguf")
  assert path.is_file() and pretrained.read_config(path).family == "qwen3"
  with refuses("org/files-GGUF has no such file"):
    pretrained.resolve("org/files-GGUF/b.gguf")
  with refuses("has no model.safetensors at its top"):
    pretrained.resolve("org/files-GGUF")


def test_a_coprocessor_by_name(server):
  lm = cacheaug.load("shipped:tiny").with_coprocessor("org/tiny_coprocessor")
  want = cacheaug.load("shipped:tiny").with_coprocessor(
    "shipped:tiny_coprocessor"
  )
  assert lm.coprocessor.spec == want.coprocessor.spec
  assert "coprocessor.safetensors" in downloaded(server)


def test_gated(server, monkeypatch):
  with refuses("gated/nano: gated: accept its licence at "):
    pretrained.resolve("gated/nano")
  monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
  assert pretrained.resolve("gated/nano").is_dir()


def test_no_such_repository():
  with refuses("org/absent: no such directory here, and "):
    pretrained.resolve("org/absent")


def test_pickles_stay_where_they_are(server):
  with refuses("org/pickled: the repository has no model.safetensors"):
    pretrained.resolve("org/pickled")
  assert downloaded(server) == ["config.json"]


def test_offline(server, monkeypatch):
  pretrained.resolve("org/nano")
  hub.download.cache_clear()
  server.requests.clear()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert pretrained.resolve("org/nano").is_dir()
  with refuses("org/other: no such directory here, HF_HUB_OFFLINE is set and"):
    pretrained.resolve("org/other")
  assert not server.requests


def test_no_network(monkeypatch):
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
  with refuses("does not answer") as error:
    pretrained.resolve("org/nano")
  assert "hf download org/nano --local-dir=DIR" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "path", ("/tmp/absent/x", "absent", "~/absent", "a/b/c", "./a/b", "a/b@")
)
def test_paths_are_no_repositories(path, server):
  with refuses(f"{path}: no such directory of weights"):
    pretrained.resolve(path)
  assert not server.requests


def test_what_is_here_comes_first(server, tmp_path, monkeypatch):
  (tmp_path / "org" / "nano").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert pretrained.resolve("org/nano") == pathlib.Path("org/nano")
  assert not server.requests


def test_environment_variables(server, tmp_path):
  """A process of its own: HF_ENDPOINT, HF_HOME and HF_TOKEN are heeded."""
  env = os.environ | {
    "HF_ENDPOINT": server.url,
    "HF_HOME": str(tmp_path / "home"),
    "HF_TOKEN": fake_hub.TOKEN,
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
  }
  env.pop("HF_HUB_CACHE", None)
  code = (
    "from cacheaug.weights import pretrained; "
    "print(pretrained.resolve('gated/nano'))"
  )
  child = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=_ROOT,
    env=env,
  )
  assert child.stdout.startswith(str(tmp_path / "home" / "hub"))


_PAGE = " ".join((_ROOT / "docs" / "troubleshooting.md").read_text().split())


@pytest.mark.parametrize(
  "spec", ("gated/nano", "org/absent", "org/nano@v2", "org/pickled")
)
def test_messages_are_quoted(spec, server):
  """In docs/troubleshooting.md, with HUB for where the server is."""
  with pytest.raises(UserError) as error:
    pretrained.resolve(spec)
  line = str(error.value).replace(server.url.partition("//")[2], "HUB")
  assert line in _PAGE
