"""What a user gets wrong: one line, a failing status, nothing overwritten."""

import jax
import pytest
import small_runs

from cacheaug import config as configs
from cacheaug import train
from cacheaug.errors import UserError
from cacheaug.run import command
from cacheaug.run import workdir as workdirs


def _one_line(status: int, err: str) -> str:
  lines = err.strip().splitlines()
  assert status == 1
  assert len(lines) == 1 and lines[0].startswith("error: "), err
  return lines[0]


def test_bad_command_lines(tmp_path):
  """In one test: the commands start side by side."""
  workdir = tmp_path / "run"
  small_runs.get_config(str(tmp_path))
  before = small_runs.contents(tmp_path)
  cases = {
    "--config.optimizer.stepz=3": (
      "--config.optimizer.stepz",
      "did you mean optimizer.steps",
    ),
    "--config.seed=abc": ("--config.seed=abc", "int"),
    "--config.coprocessor.latents=0": ("coprocessor.latents=0", "at least 1"),
    "--workdirr=x": ("--workdirr", "did you mean workdir"),
  }
  commands = [
    (small_runs.start(tmp_path, f"--workdir={workdir}", argument), parts)
    for argument, parts in cases.items()
  ]
  commands += [
    (
      small_runs.start_plain(f"--config={tmp_path}/none.py"),
      ("none.py", "cannot be loaded", "No such file"),
    ),
    (small_runs.start_plain(), ("--config is missing", "configs/NAME.py")),
    (
      small_runs.start_plain("--config=configs/gemma2b.py"),
      ("decoder.path is empty", "huggingface.co/google/gemma-2-2b", "licence"),
    ),
  ]
  for process, parts in commands:
    status, out, err = small_runs.finish(process)
    line = _one_line(status, err)
    assert [p for p in parts if p not in line] == [], line
    assert not out
  assert small_runs.contents(tmp_path) == before


def test_help_shows_the_flags_and_a_configs_keys(tmp_path):
  process = small_runs.start(tmp_path, "--help")
  status, out, err = small_runs.finish(process)
  assert (status, err) == (0, "")
  for part in ("--workdir", "resume", "--config.traces.ahead=4"):
    assert part in out


def _refused(config, workdir, tmp_path) -> str:
  before = small_runs.contents(tmp_path)
  with pytest.raises(UserError) as caught:
    train.train(configs.resolve(config), str(workdir))
  assert small_runs.contents(tmp_path) == before
  line = str(caught.value)
  assert "\n" not in line
  return line


@pytest.mark.parametrize(
  "content, reason",
  [
    (b"", "no text in"),
    (b" \n\n ", "no text in"),
    (b"fine\n---\nbad \xff\xfe\n---\nfine\n---\nfine\n", "not UTF-8 at byte"),
    (b"short\n---\nshort\n---\nshort\n", "fewer than one row"),
  ],
)
def test_bad_text_is_refused(tmp_path, content, reason):
  config = small_runs.get_config(str(tmp_path))
  path = tmp_path / "bad.txt"
  path.write_bytes(content)
  config.data.sources.text.path = str(path)
  config.data.cache_dir = str(tmp_path.parent / f"{tmp_path.name}-cache")
  line = _refused(config, tmp_path / "run", tmp_path)
  assert reason in line and "data.sources.text" in line
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_experiment_is_left_alone(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  workdirs.claim(config, str(tmp_path / "run"))
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n')
  config.seed = 5
  line = _refused(config, tmp_path / "run", tmp_path)
  assert "seed (0 there, 5 here)" in line


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_workdir_that_is_no_directory(tmp_path, place):
  config = small_runs.get_config(str(tmp_path))
  (tmp_path / "file").write_text("in the way")
  line = _refused(config, tmp_path / place, tmp_path)
  assert "is not a directory" in line and "--workdir=" in line


def test_workdir_that_may_not_be_written(tmp_path, monkeypatch):
  """The answer of os.access is faked: root may write everywhere."""
  config = small_runs.get_config(str(tmp_path))
  workdirs.check(config, str(tmp_path / "run"))
  monkeypatch.setattr(workdirs.os, "access", lambda *_: False)
  line = _refused(config, tmp_path / "run", tmp_path)
  assert "no permission to write" in line


def test_disk_that_fails_at_the_claim_is_one_line(tmp_path, monkeypatch):
  config = small_runs.get_config(str(tmp_path))

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(workdirs.os, "replace", fail)
  with pytest.raises(UserError, match="No space left on device"):
    workdirs.claim(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
  "path, reason",
  [("nowhere", "no such directory"), ("shipped:none", "no such decoder")],
)
def test_missing_weights(tmp_path, path, reason):
  config = small_runs.get_config(str(tmp_path))
  config.decoder.path, config.decoder.how_to_get = path, "ask for them"
  line = _refused(config, tmp_path / "run", tmp_path)
  assert reason in line and "ask for them" in line and "decoder.path" in line


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.decoder.shape.vocab_size = 100
  line = _refused(config, tmp_path / "run", tmp_path)
  assert "vocabulary 100" in line


def _run(monkeypatch, main):
  for name in ("parse", "_plain_logs", "_keep_compiled"):
    monkeypatch.setattr(command, name, lambda *_: None)
  command.run(main, "")


def test_full_device_is_one_line_with_the_keys_that_help(monkeypatch, capsys):
  def main():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory: 9")

  with pytest.raises(SystemExit) as exit_:
    _run(monkeypatch, main)
  line = _one_line(exit_.value.code, capsys.readouterr().err)
  for part in (
    "data.batch",
    "optimizer.accumulation",
    "remat",
    "Out of memory",
  ):
    assert part in line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
  def main():
    raise ValueError("ours")

  with pytest.raises(ValueError, match="ours"):
    _run(monkeypatch, main)
