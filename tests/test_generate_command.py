"""`python -m cacheaug.generate`."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

import cacheaug
from cacheaug import config as configs
from cacheaug.errors import UserError
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import InsertionSchedule
from cacheaug.weights import pretrained

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def command():
  """The module; its flags are the process's while these tests run."""
  before = set(flags.FLAGS)
  from cacheaug import generate

  yield generate
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  sys.modules.pop("cacheaug.generate")


def run(*arguments, stdin=""):
  done = subprocess.run(
    [sys.executable, "-m", "cacheaug.generate", *arguments],
    cwd=_ROOT,
    input=stdin,
    capture_output=True,
    text=True,
    timeout=280,
  )
  return done.returncode, done.stdout, done.stderr


def test_compare_and_trace():
  prompt = "def main(argv):"
  status, out, err = run(
    f"--prompt={prompt}",
    "--compare",
    "--trace",
    "--max_new_tokens=12",
    "--insert_every=8",
    "--insert_before=2",
    "--gate=entropy:-inf",
  )
  assert (status, err) == (0, "")
  lines = out.splitlines()
  assert lines[0] == f"prompt: {prompt}"
  assert lines[1].split(" | ") == [
    "frozen decoder: 12 tokens".ljust(38),
    "with latents: 12 tokens",
  ]
  assert lines[2].count("tokens/s, nll ") == 2
  traces = [line for line in lines if line.startswith("trace: ")]
  assert len(traces) == 3
  # 16 tokens with the BOS, of which 14 are padded to 32: slots 32-45 are those
  # of the prompt's last two and of the new ones.
  assert "after token 13 (-2 new): " in traces[0]
  assert traces[0].endswith(
    "positions 10-13, in place of the cache there, slots 46-49"
  )
  assert traces[1].startswith(
    "trace: after token 15 (0 new): 'a' 'r' 'g' 'v' ')' ':' | '\\n' "
  )
  assert traces[1].endswith(
    "4 latents at positions 12-15, in place of the cache there, slots 50-53"
  )
  assert "after token 23 (8 new): " in traces[2]
  assert traces[2].endswith(
    "positions 20-23, in place of the cache there, slots 54-57"
  )


def test_trace_tells_where_a_gate_said_no(command):
  lm = command.open_lm("", "", "", True)
  (done,) = lm.complete(["abcdef"], 3, gate="entropy:inf")
  (line,) = command.trace(lm, done)
  assert line.startswith("trace: after token 6 (0 new): ")
  assert line.endswith(": the gate said no")


def test_lines_of_a_pipe_are_prompts():
  status, out, err = run("--latents=off", "--max_new_tokens=3", stdin="ab\nc\n")
  assert (status, err) == (0, "")
  texts = cacheaug.load("shipped:tiny")
  expected = [p + texts.generate([p], 3, latents=False)[0] for p in ("ab", "c")]
  assert out == "\n".join([*expected, ""])


def test_bad_flags_are_one_line():
  for arguments, message in (
    (["--prompt=ab", "--temprature=1"], "did you mean temperature"),
    (["--prompt=ab"], "prompt 0 has 3 tokens"),
    (["--prompt=abcd", "--gate=never"], "is not entropy:NATS"),
    (["--gate=entropy:1", "--latents=off"], "--gate decides on latents"),
    (["--gate=entropy:1", "--store=x"], "--gate and --store"),
  ):
    status, out, err = run(*arguments)
    assert status == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err, err


def test_which_decoder_and_coprocessor(command, tmp_path):
  lm = command.open_lm("", "", "", True)
  assert lm.coprocessor.spec.latents == 4
  assert command.open_lm("", "", "", False).coprocessor is None
  config = json.dumps(configs.base().to_dict())
  (tmp_path / "config.json").write_text(config)
  for arguments, message in (
    (("x", "", "y", True), "--workdir and --coprocessor: give one"),
    (("", "shipped:nano", "", True), "--coprocessor is missing"),
    ((str(tmp_path / "none"), "", "", True), "config.json: missing"),
    ((str(tmp_path), "", "", True), "has no decoder.path"),
    (("", "shipped:nano", "shipped:tiny_coprocessor", True), "trained for"),
  ):
    with pytest.raises(UserError, match=message):
      command.open_lm(*arguments)
  (tmp_path / "config.json").write_text('{"family": "gemma2"}')
  with pytest.raises(UserError, match="not a run's config"):
    command.open_lm(str(tmp_path), "", "", True)


def test_plans_and_prompts(command, tmp_path):
  lm = command.open_lm("", "", "", False)
  assert command.plan_of(lm, ["0"], -1, []) == InsertionSchedule()
  plan = command.plan_of(lm, ["0", "5"], 7, ["="])
  assert (plan.at, plan.every) == ((0, 5), 7)
  assert plan.after == (lm.tokenizer.encode("=")[0],)
  for at, after, message in (
    (["a"], [], "--insert_at=a: give counts"),
    (["0"], ["=="], "--insert_after='==' is 2 tokens"),
    (["0"], [""], "--insert_after='' is 0 tokens"),
  ):
    with pytest.raises(UserError, match=message):
      command.plan_of(lm, at, 0, after)
  path = tmp_path / "prompts.txt"
  path.write_text("one\n\ntwo\n")
  assert command.prompts_of([], str(path)) == ["one", "two"]
  assert command.prompts_of(["a", "b"], "") == ["a", "b"]
  path.write_text(" \n")
  (tmp_path / "latin").write_bytes("é".encode("latin-1"))
  for prompts, file, message in (
    (["a", ""], "", "--prompt is empty"),
    (["a"], str(path), "give one of the two"),
    ([], str(path), "holds no prompt"),
    ([], str(tmp_path / "latin"), "not UTF-8"),
    ([], str(tmp_path), "cannot be read"),
  ):
    with pytest.raises(UserError, match=message):
      command.prompts_of(prompts, file)


def test_a_problem_is_a_prompt_with_its_answer(command, capsys):
  found = command.open_lm("", "", "", True)
  problem = command.problem_of("hops:2", 3)
  facts = dict(problem.question.split()[:-1])
  start = problem.question[-1]
  assert problem.answer == facts[facts[start]]
  assert problem == command.problem_of("hops:2", 3)
  assert problem != command.problem_of("hops:2", 4)
  options = dict(max_new_tokens=1, sampling=Sampling())
  flags.FLAGS(["generate"])
  try:
    prompts = [problem.question]
    command._answer(found, prompts, options, shown=prompts, problem=problem)
  finally:
    flags.FLAGS.unparse_flags()
  out = capsys.readouterr().out
  assert out.startswith(problem.question)
  way = f"{facts[start]} -> {problem.answer}"
  assert f"answer: {problem.answer}, by {way}: each step" in out
  assert "its 3 layers" in out
  plain = command.problem_of("sum:2", 0)
  assert command.explain(found, plain) == f"answer: {plain.answer}"
  for text in ("hops", "hops:x", "riddle:2", "hops:8", "sum:9"):
    with pytest.raises(UserError, match=f"--problem={text}: ") as caught:
      command.problem_of(text, 0)
    assert "\n" not in str(caught.value)


def test_latents_come_as_often_as_trained(command, capsys):
  lm = command.open_lm("", "", "", True)
  spec = dataclasses.replace(lm.coprocessor.spec, rounds=2, stride=4)
  params = dataclasses.replace(lm.coprocessor, spec=spec)
  lm = dataclasses.replace(lm, coprocessor=params)
  assert command.plan_of(lm, ["0"], -1, []) == InsertionSchedule(every=4)
  assert "latents again after every 4 new tokens" in capsys.readouterr().err
  plan = command.plan_of(lm, ["0"], 0, [], before=["2"])
  assert plan == InsertionSchedule(before=(2,)) and not capsys.readouterr().err
  with pytest.raises(UserError, match="--insert_before=x: give counts"):
    command.plan_of(lm, ["0"], 0, [], before=["x"])


def test_a_decoder_without_a_tokenizer(command, tmp_path):
  shipped = pretrained.resolve("shipped:nano")
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((shipped / name).read_bytes())
  lm = command.open_lm("", str(tmp_path), "", False)
  with pytest.raises(UserError, match="without tokenizer.json"):
    lm.generate(["abc"], latents=False)
  with pytest.raises(UserError, match="is 0 tokens of this decoder's"):
    command.plan_of(lm, ["0"], 0, ["a"])


@pytest.mark.parametrize(
  "given, stdin, words",
  [
    (["--prompt=caf\udce9"], "", "--prompt is not UTF-8 text"),
    (["--prompt=ab cd", "--prompt=\udce9"], "", "--prompt is not UTF-8 text"),
    (["--prompt=ab cd", "--stop=\udce9"], "", "--stop is not UTF-8 text"),
    (["--prompt=a", "--insert_after=\udce9"], "", "--insert_after is not UTF"),
    ([], b"caf\xe9\n", "standard input is not UTF-8 text"),
    ([], "caf\udce9\n", "a prompt is not UTF-8 text"),
  ],
)
def test_8_bytes_that_are_no_text_are_one_line(
  command, monkeypatch, given, stdin, words
):
  values = flags.FLAGS
  saved = flagsaver.save_flag_values(values)
  try:
    values(["generate", *given], known_only=True)
    source = (
      io.StringIO(stdin)
      if isinstance(stdin, str)
      else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    )
    monkeypatch.setattr(sys, "stdin", source)
    monkeypatch.setattr(
      command, "open_lm", lambda *_: cacheaug.load("shipped:nano")
    )
    with pytest.raises(UserError, match=words) as raised:
      command.main()
    assert str(raised.value).isascii()
  finally:
    flagsaver.restore_flag_values(saved, values)


def test_8_files_and_pipes_may_begin_with_a_mark(command, tmp_path):
  path = tmp_path / "prompts"
  path.write_bytes(b"\xef\xbb\xbf" + "one\r\ntwo\u2028still two\n".encode())
  assert command.prompts_of([], str(path)) == ["one", "two\u2028still two"]


def test_chat_is_a_conversation(command, monkeypatch, tmp_path, capsys):
  shutil.copytree(pretrained.resolve("shipped:nano"), tmp_path / "nano")
  (tmp_path / "nano" / "chat_template.jinja").write_text(
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
  )
  lm = cacheaug.load(str(tmp_path / "nano"))
  rendered = []

  def render(messages):
    rendered.append([dict(m) for m in messages])
    return lm.render(messages)

  double = mock.Mock(wraps=lm, coprocessor=None, render=render)
  monkeypatch.setattr(command, "open_lm", lambda *_: double)
  first = [{"role": "user", "content": "Hi"}]
  answer = lm.chat(first, 6)
  saved = flagsaver.save_flag_values(flags.FLAGS)
  common = ["generate", "--chat", "--max_new_tokens=6"]
  try:
    flags.FLAGS([*common, "--prompt=Hi", "--prompt=Go on"])
    command.main()
    both = lm.generate([lm.render(first), lm.render(rendered[1])], 6)
    assert capsys.readouterr().out == f"Hi\n{both[0]}\n\nGo on\n{both[1]}\n\n"
    flagsaver.restore_flag_values(saved, flags.FLAGS)
    flags.FLAGS(common)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAnd?\n"))
    command.main()
  finally:
    flagsaver.restore_flag_values(saved, flags.FLAGS)
  second = [
    *first,
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "And?"},
  ]
  assert rendered[2:] == [first, second]
  assert capsys.readouterr().out == f"{answer}\n{lm.chat(second, 6)}\n"
