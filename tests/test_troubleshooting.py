"""docs/troubleshooting.md quotes what the code says: every error is provoked.

Each message stands in the page word for word, with DIR for the test's own
directory.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy
import small_runs
from ml_collections import ConfigDict

import cacheaug
from cacheaug import build, sharding, validate
from cacheaug import config as configs
from cacheaug.data import (
  gguf_metadata,
  opening,
  problems,
  record_files,
  shards,
  tokenizers,
)
from cacheaug.errors import UserError
from cacheaug.run import agreement, checkpoint, command, lock, metrics
from cacheaug.run import workdir as workdirs
from cacheaug.run.metrics import check_finite
from cacheaug.weights import pretrained, published

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = (_ROOT / "docs" / "troubleshooting.md").read_text()


def _batches(config: ConfigDict) -> None:
  tokenizer = tokenizers.load("byte")
  opening.open_batches(config.data, tokenizer, split="train", seed=0)


def no_weights(config, directory):
  validate.check_config(configs.resolve(published.experiment("gemma2_2b")), 1)


def no_such_directory(config, directory):
  config.decoder.path = "/models/gemma-2-2b"
  config.decoder.how_to_get = published.how_to_get("gemma2_2b")
  build.open_model(config)


def no_config_json(config, directory):
  (directory / "weights").mkdir()
  pretrained.read_config(directory / "weights")


def another_family(config, directory):
  _weights(directory, model_type="gpt2")
  pretrained.read_config(directory / "weights")


def another_shape(config, directory):
  config.decoder.path = "shipped:nano"
  config.decoder.shape.width = 64
  build.open_model(config)


def names_that_do_not_match(config, directory):
  found = _weights(directory, num_hidden_layers=2)
  _load(found)


def shapes_that_do_not_match(config, directory):
  found = _weights(directory, hidden_size=96)
  _load(found)


def another_head(config, directory):
  found = _weights(directory)
  path = found / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  head = tensors["model.embed_tokens.weight"] + 1
  safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, path)
  _load(found)


def a_wrapper(config, directory):
  found = _weights(directory)
  path = found / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors = {f"_orig_mod.{name}": x for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, path)
  _load(found)


def another_architecture(config, directory, monkeypatch):
  _gguf(directory, monkeypatch, {"general.architecture": "mamba"})


def a_part_of_a_file(config, directory, monkeypatch):
  pair = {"general.architecture": "llama", "split.count": 3}
  _gguf(directory, monkeypatch, pair)


def _gguf(directory, monkeypatch, metadata):
  monkeypatch.setattr(gguf_metadata, "read_all", lambda path: (metadata, {}))
  pretrained.read_config(directory / "m.gguf")


def pickled(config, directory):
  found = _weights(directory)
  (found / "model.safetensors").rename(found / "pytorch_model.bin")
  _load(found)


def truncated(config, directory):
  found = _weights(directory)
  whole = (found / "model.safetensors").read_bytes()
  (found / "model.safetensors").write_bytes(whole[:1000])
  _load(found)


def _load(found: Path) -> None:
  pretrained.load(found, pretrained.read_config(found), dtype="float32")


def _weights(directory: Path, **changes) -> Path:
  """The nano decoder's files, with entries of config.json changed."""
  source, found = pretrained.resolve("shipped:nano"), directory / "weights"
  found.mkdir()
  for path in source.iterdir():
    (found / path.name).write_bytes(path.read_bytes())
  entries = json.loads((found / "config.json").read_text()) | changes
  entries.pop("layer_types", None)
  (found / "config.json").write_text(json.dumps(entries))
  return found


def wrong_tokenizer(config, directory):
  config.decoder.shape.vocab_size = 100
  build.open_model(config)


def another_decoder(config, directory):
  cacheaug.load("shipped:nano").with_coprocessor("shipped:tiny_coprocessor")


def no_coprocessor(config, directory):
  cacheaug.load("shipped:tiny").generate(["a"], latents=True)


def a_number_of_another_type(config, directory):
  cacheaug.load("shipped:tiny").generate(["a"], 4.0)


def prompt_too_short(config, directory):
  lm = cacheaug.load("shipped:tiny")
  lm.with_coprocessor("shipped:tiny_coprocessor").generate(["a"])


def no_tokenizer(config, directory):
  lm = dataclasses.replace(cacheaug.load("shipped:tiny"), tokenizer=None)
  lm.generate(["a"], latents=False)


def empty_data(config, directory):
  (directory / "text.txt").write_text("\n")
  _batches(config)


def not_utf8(config, directory):
  (directory / "text.txt").write_bytes(b"fine\n---\nbad \xff\n---\nfine\n")
  _batches(config)


def too_short(config, directory):
  (directory / "text.txt").write_text("a\n---\nb\n---\nc\n")
  config.data.validation_fraction = 0.4
  _batches(config)


def one_document(config, directory):
  (directory / "text.txt").write_text("a long story " * 50)
  config.data.sources.text.separator = ""
  _batches(config)


def compressed(config, directory):
  (directory / "text.txt").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00")
  _batches(config)


def columns(config, directory):
  (directory / "text.txt").write_bytes(b"PAR1\x15\x00")
  _batches(config)


def an_array(config, directory):
  (directory / "text.txt").write_text('[{"text": "a"}, {"text": "b"}]')
  config.data.sources.text.kind = "jsonl"
  config.data.validation_fraction = 0.0
  _batches(config)


def answers_beyond_the_row(config, directory):
  line = json.dumps({"q": "long " * 20, "a": "7"})
  (directory / "text.txt").write_text("\n".join([line] * 9))
  config.data.answers_only = True
  source = config.data.sources.text
  source.kind, source.field, source.answer_field = "jsonl", "q", "a"
  _batches(config)


def open_files(config, directory, monkeypatch):
  def full(*_):
    raise RuntimeError("open: Too many open files")

  for i in range(60):
    text = f"text {i} of some length\n---\n"
    with (directory / "text.txt").open("a") as file:
      file.write(text)
  monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  monkeypatch.setattr(record_files, "open_reader", full)
  monkeypatch.setattr(
    record_files.resource, "getrlimit", lambda _: (1024, 4096)
  )
  tokenizer = tokenizers.load("byte")
  batches = opening.open_batches(config.data, tokenizer, split="train", seed=0)
  try:
    batches.at(0)
  except UserError as error:  # Without the cache's own name.
    name = next((directory / "cache").iterdir()).name
    raise UserError(str(error).replace(name, "...")) from error


def no_chat_template(config, directory):
  cacheaug.load("shipped:nano").chat([{"role": "user", "content": "Hi"}])


def no_permission(config, directory, monkeypatch):
  monkeypatch.setattr(workdirs.os, "access", lambda *_: False)
  workdirs.check(config, str(directory / "run"))


def no_space(config, directory, monkeypatch):
  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "_measure", full)
  with checkpoint.Checkpoints(directory / "run", keep=1, save_every=1) as saves:
    saves.save(1, {"x": jnp.zeros(2)}, {})
    saves.wait()


def no_space_for_metrics(config, directory):
  with metrics.MetricWriter(directory / "run") as writer:
    (directory / "run" / "metrics.jsonl").unlink()
    (directory / "run" / "metrics.jsonl").symlink_to("/dev/full")
    writer.write(1, {"loss": 1.0})


def two_trainers(config, directory):
  (directory / "run").mkdir()
  beat = {"state": "training", "pid": 4711, "host": "node3"}
  (directory / "run" / "heartbeat.json").write_text(json.dumps(beat))
  with lock.Lock(directory / "run") as first:
    first.acquire()
    with lock.Lock(directory / "run") as second:
      second.acquire()


def fewer_steps(config, directory):
  workdirs.claim(config, str(directory / "run"))
  (directory / "run" / "metrics.jsonl").write_text('{"step": 2}\n')
  config.optimizer.steps = 60
  workdirs.check(config, str(directory / "run"))


def hosts_that_differ(config, directory, monkeypatch):
  texts = [
    "data.sources.text\t60 documents in 33 rows (1a2b3c4d)",
    "data.sources.text\t30 documents in 17 rows (5e6f7a8b)",
  ]
  monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
  monkeypatch.setattr(agreement, "exchange", lambda _: texts)
  agreement.check(dict)


def hosts_that_share_nothing(config, directory, monkeypatch):
  monkeypatch.setattr(workdirs.jax, "process_count", lambda: 2)
  answers = iter([["a"], [""], [""], ["seen", ""]])
  monkeypatch.setattr(agreement, "exchange", lambda _: next(answers))
  workdirs.claim(config, str(directory / "run"))


def weights_in_a_bucket(config, directory):
  config.decoder.path = "gs://bucket/gemma-2-2b"
  validate.check_config(config, 1)


def another_experiment(config, directory):
  workdirs.claim(config, str(directory / "run"))
  (directory / "run" / "metrics.jsonl").write_text('{"step": 2}\n')
  config.seed = 5
  workdirs.check(config, str(directory / "run"))


def too_few_devices(config, directory):
  config.mesh.fsdp = 16
  validate.check_config(config, 8)


def batch_that_does_not_divide(config, directory):
  config.mesh.data, config.data.batch = 8, 12
  validate.check_config(config, 8)


def shape_that_does_not_divide(config, directory):
  mesh = ConfigDict(dict(data=1, fsdp=1, tensor=8, slices=1))
  mesh = sharding.make_mesh(mesh)
  shapes = {"mlp": jax.ShapeDtypeStruct((16, 12), jnp.float32)}
  sharding.logical_to_sharding(mesh, {"mlp": ("D", "F")}, shapes)


def no_traces(config, directory):
  config.traces.count = 40
  validate.check_config(config, 1)


def a_small_window(config, directory):
  config.traces.window = 1
  validate.check_config(config, 1)


def a_window_below_the_sliding_one(config, directory):
  config.traces.window = 4
  validate.check_model(config, configs.model_of(config))


def a_teacher_that_sees_no_more(config, directory):
  config.teacher.weight = 1.0
  validate.check_config(config, 1)


def a_teacher_without_latents(config, directory):
  config.objective, config.traces.decay = "language_model", 0.9
  config.language_model.loss = "traces"
  validate.check_config(config, 1)


def labels_of_a_prefix(config, directory):
  config.supervision.weight, config.coprocessor.kind = 0.5, "prefix"
  validate.check_config(config, 1)


def more_hops_than_letters(config, directory):
  problems.Options(("hops",), (1, 8), (8, 8)).check("data.sources.hops")


def chains_longer_than_their_lines(config, directory):
  problems.Options(("chains",), (1, 7), (6, 9)).check("data.sources.chains")


def results_of_text(config, directory):
  config.data.results = True
  tokenizer = tokenizers.load("byte")
  opening.open_batches(config.data, tokenizer, split="train", seed=0)


def too_long_for_the_decoder(config, directory):
  config.data.sequence = 128
  validate.check_model(config, configs.model_of(config))


def unknown_key(config, directory):
  config.unlock()
  config.optimizer.stepz = 3
  configs.check_keys(config)


def not_finite(config, directory):
  numbers = dict(loss=float("nan"), gradient_norm=1.0, parameter_norm=1.0)
  check_finite(7, numbers)


ERRORS = [
  value
  for name, value in list(globals().items())
  if callable(value)
  and getattr(value, "__module__", "") == __name__
  and not name.startswith("_")
]


def _quoted(line: str) -> bool:
  """Whether the page has the line, however it is wrapped there."""
  return " ".join(line.split()) in " ".join(_PAGE.split())


@pytest.mark.parametrize("provoke", ERRORS, ids=lambda f: f.__name__)
def test_message_is_quoted(provoke, tmp_path, monkeypatch):
  more = {}
  if "monkeypatch" in provoke.__code__.co_varnames:
    more["monkeypatch"] = monkeypatch
  config = small_runs.get_config(str(tmp_path))
  with pytest.raises(UserError) as caught:
    provoke(config, tmp_path, **more)
  line = str(caught.value)
  assert "\n" not in line
  line = line.replace(str(tmp_path), "DIR")
  # The library's own words differ by version.
  line = re.sub(r"damaged \(.*\)", "damaged (...)", line)
  assert _quoted(line), line


def test_full_device_is_quoted():
  assert _quoted(command._LESS_MEMORY)
  assert _quoted(command._RESTART)
  assert _quoted(command._NO_ROOM)
  assert not _quoted("out of device memory: buy another")
