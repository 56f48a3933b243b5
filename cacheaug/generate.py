"""Continues text, with and without latents.

  python -m cacheaug.generate --prompt="def main(argv):" --compare

Without --workdir and --decoder it is the tiny decoder that ships in the
package, with its coprocessor. Without --prompt, --file and --problem each line
that is typed, or comes through a pipe, is a prompt. One prompt's text is shown
as it comes; several are one batch, shown at its end. With --chat a prompt is a
message to an instruct model, put into that model's own format.
"""

import itertools
import pathlib
import sys
import textwrap
import time

from absl import flags

from cacheaug.build import latents_of, open_lm
from cacheaug.data import problems
from cacheaug.data.problems import Problem
from cacheaug.errors import UserError
from cacheaug.inference.completion import Completion
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import Insertion, InsertionSchedule
from cacheaug.lm import LM
from cacheaug.run import command

_COLUMN = 38  # characters a side of --compare, two within 80
_AROUND = 6  # tokens that --trace shows before and after the latents

flags.DEFINE_multi_string("prompt", [], "text to continue; may be repeated")
flags.DEFINE_string("file", "", "a file of prompts, one a line")
flags.DEFINE_string(
  "problem", "", "instead of a prompt, KIND:STEPS of data/problems.py; --seed"
)
flags.DEFINE_string("workdir", "", "a run: its coprocessor and its decoder")
flags.DEFINE_string(
  "decoder", "", "a directory, FILE.gguf, hub name or shipped:NAME"
)
flags.DEFINE_string(
  "coprocessor", "", "an exported coprocessor, a run, or shipped:NAME"
)
flags.DEFINE_enum(
  "latents",
  None,
  ["on", "off"],
  "augment the decoder's cache; unset: where there is a coprocessor",
)
flags.DEFINE_integer("max_new_tokens", 64, "the most tokens of a continuation")
flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token")
flags.DEFINE_integer("top_k", 0, "draw from so many likeliest tokens; 0: all")
flags.DEFINE_float("top_p", 1.0, "draw from the likeliest of this probability")
flags.DEFINE_integer("seed", 0, "of the draws")
flags.DEFINE_multi_string("stop", [], "text that ends; may be repeated")
flags.DEFINE_list(
  "insert_at", ["0"], "insert latents after so many new tokens; 0: at once"
)
flags.DEFINE_integer(
  "insert_every",
  -1,
  "and after every so many new tokens; 0: not, -1: as the coprocessor was "
  "trained (traces.stride)",
)
flags.DEFINE_list(
  "insert_before", [], "and so many tokens before the prompt's end"
)
flags.DEFINE_string(
  "gate", "", "latents only where it says so: entropy:NATS, head:DIR[:NATS]"
)
flags.DEFINE_multi_string("insert_after", [], "and after this text, one token")
flags.DEFINE_bool(
  "chat", False, "prompts are messages to an instruct model, in its own format"
)
flags.DEFINE_bool("compare", False, "the frozen decoder beside the augmented")
flags.DEFINE_bool("trace", False, "show where latents went, or a gate declined")
flags.DEFINE_string("store", "", "of cacheaug.deliberate: where to read on")


def plan_of(
  lm: LM,
  at: list[str],
  every: int,
  after: list[str],
  *,
  before: list[str] | None = None,
) -> InsertionSchedule:
  """When latents are inserted, from the flags.

  Raises:
    UserError: a count that is none, or text that is not one token.
  """
  steps, earlier = _counts("insert_at", at), _counts("insert_before", before)
  trained = (
    InsertionSchedule.trained(lm.coprocessor.spec)
    if lm.coprocessor
    else InsertionSchedule()
  )
  if every < 0:
    every = trained.every
    if every:
      print(
        f"latents again after every {every} new tokens, as this coprocessor "
        "was trained; --insert_every=0 inserts them once",
        file=sys.stderr,
      )
  ids = []
  for text in after:
    found = lm.tokenizer.encode(text) if lm.tokenizer else []
    if len(found) != 1:
      raise UserError(
        f"--insert_after={text!r} is {len(found)} tokens of this decoder's "
        "tokenizer: give the text of one"
      )
    ids += found
  return InsertionSchedule(
    steps, every, tuple(ids), before=earlier, rounds=trained.rounds
  )


def _counts(flag: str, given: list[str] | None) -> tuple[int, ...]:
  try:
    return tuple(int(count) for count in given or ())
  except ValueError:
    raise UserError(
      f"--{flag}={','.join(given)}: give counts of tokens, as 0,16"
    ) from None


def prompts_of(prompts: list[str], file: str) -> list[str]:
  """Prompts from the flags; [] where neither is set.

  Raises:
    UserError: an empty prompt, or a file that cannot be read.
  """
  if prompts and file:
    raise UserError("--prompt and --file: give one of the two")
  if any(not prompt for prompt in prompts):
    raise UserError("--prompt is empty: give at least one character")
  for prompt in prompts:
    check_text("--prompt", prompt)
  if not file:
    return list(prompts)
  try:
    text = pathlib.Path(file).expanduser().read_text(encoding="utf-8-sig")
  except OSError as e:
    raise UserError(f"--file={file}: cannot be read ({e.strerror})") from e
  except UnicodeDecodeError as e:
    raise UserError(f"--file={file}: not UTF-8 text") from e
  lines = [line for line in text.split("\n") if line.strip()]
  if not lines:
    raise UserError(f"--file={file}: holds no prompt; give one a line")
  return lines


def check_text(name: str, text: str) -> None:
  """Refuses bytes that are no text: Python hands them on as surrogates.

  Raises:
    UserError: such bytes; names the flag.
  """
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise UserError(f"{name} is not UTF-8 text: {ascii(text)[:60]}") from e


def problem_of(text: str, seed: int) -> Problem:
  """The held-out problem that --problem=KIND:STEPS names.

  Raises:
    UserError: no such kind, or a number of steps that it cannot have.
  """
  kind, _, steps = text.partition(":")
  if not steps.isdecimal():
    raise UserError(f"--problem={text}: give KIND:STEPS, such as hops:2")
  size = (4, 4) if kind in ("compose", "reorder") else (8, 8)
  options = problems.Options((kind,), (int(steps),) * 2, size)
  try:
    options.check()
  except UserError as e:
    raise UserError(f"--problem={text}: {e}") from e
  return problems.generate(seed, 0, options, split="validation")


def explain(lm: LM, problem: Problem) -> str:
  """The answer, the steps to it, and what either side has for them."""
  line = f"answer: {problem.answer}"
  if not problem.results:
    return line
  layers = lm.model.config.layers
  return (
    f"{line}, by {' -> '.join(problem.results)}: each step reads the result of "
    f"the one before it.\nThe frozen decoder has its {layers} layers for that; "
    f"latents have been through {layers} of the\ncoprocessor's before they go "
    f"through the decoder's {layers}."
  )


def describe(lm: LM, completion: Completion, insertion: Insertion) -> str:
  """One line: the point, the tokens around it, the latents' places."""
  first, n = insertion.position, insertion.latents
  ends = {"replace": "in place of the cache there", "overlay": "beside it"}
  how = ends.get(lm.coprocessor.spec.positions, "further text pushed back")
  return (
    f"{_where(lm, completion, insertion.step)}: {n} latents at positions "
    f"{first}-{first + n - 1}, {how}, slots {insertion.slot}-"
    f"{insertion.slot + n - 1}"
  )


def _where(lm: LM, completion: Completion, step: int) -> str:
  """The point after so many new tokens, and the tokens around it."""
  ids = completion.prompt + completion.ids
  at = len(completion.prompt) + step
  before = _tokens(lm, ids[max(0, at - _AROUND) : at])
  after = _tokens(lm, ids[at : at + _AROUND])
  return f"trace: after token {at - 1} ({step} new): {before} | {after}"


def trace(lm: LM, completion: Completion) -> list[str]:
  """A line for each point where latents went or were declined, in order."""
  found = [(x.step, describe(lm, completion, x)) for x in completion.insertions]
  for x in completion.declined:
    line = f"{_where(lm, completion, x.step)}: the gate said no"
    found.append((x.step, line))
  return [line for _, line in sorted(found, key=lambda x: x[0])]


def _tokens(lm: LM, ids: tuple[int, ...]) -> str:
  """Each token's text; its number where it has none, as a BOS."""
  texts = ((i, lm.tokenizer.decode([i])) for i in ids)
  return " ".join(repr(text) if text else f"<{i}>" for i, text in texts)


def _compare(lm: LM, prompt: str, options: dict) -> tuple[list[str], list[str]]:
  """Both continuations, each with its speed and nll, and where latents went.

  Speed is over the tokens after the first, which waits for the compiler.
  """
  sides, traces = [], []
  for name, on in (("frozen decoder", False), ("with latents", True)):
    writer = lm.writer([prompt], **options, latents=[on], scored=True)
    writer.advance(1)
    start = time.perf_counter()
    (done,) = writer.complete()
    seconds, count = time.perf_counter() - start, len(done.ids)
    head = f"{name}: {count} tokens"
    if count > 1:
      rate = (count - 1) / seconds
      head += f"\n{rate:.0f} tokens/s, nll {done.nll.mean():.4f} a token"
    sides.append(_column(head) + ["-" * _COLUMN] + _column(done.text))
    traces += trace(lm, done)
  lines = [
    f"{a:<{_COLUMN}} | {b}".rstrip()
    for a, b in itertools.zip_longest(*sides, fillvalue="")
  ]
  return lines, traces


def _column(text: str) -> list[str]:
  """Lines that fit one side."""
  wrapped = (
    textwrap.wrap(line.expandtabs(), _COLUMN, drop_whitespace=False) or [""]
    for line in text.splitlines()
  )
  return [line for lines in wrapped for line in lines]


def _answer(
  lm: LM,
  prompts: list[str],
  options: dict,
  *,
  shown: list[str],
  problem: Problem | None = None,
) -> list[str]:
  """Prints the continuations of one batch, each after what is shown of it.

  Returns:
    The continuations; none with --compare.
  """
  values, traces = flags.FLAGS, []
  if values.compare:
    for prompt in prompts:
      lines, traces = _compare(lm, prompt, options)
      lines += [explain(lm, problem)] if problem else []
      print("\n".join([f"prompt: {prompt}", *lines]))
      print("\n".join([*(traces if values.trace else []), ""]), flush=True)
    return []
  writer = lm.writer(prompts, **options)
  if len(prompts) == 1:
    print(shown[0], end="", flush=True)
    for _, piece in writer.pieces(1):
      print(piece, end="", flush=True)
    print()
  completions = writer.complete()
  for begin, done in zip(shown, completions, strict=True):
    if len(prompts) > 1:
      print(f"{begin}{done.text}\n", flush=True)
    for line in trace(lm, done) if values.trace else ():
      print(line, flush=True)
  if problem:
    print(explain(lm, problem), flush=True)
  return [done.text for done in completions]


def _first_messages(lm: LM, texts: list[str]) -> list[str]:
  """Each text as the first message of a conversation of its own."""
  return [lm.render([{"role": "user", "content": text}]) for text in texts]


def _converse(lm: LM, options: dict) -> None:
  """Each line that comes is a prompt, until there are no more.

  With --chat the lines and their answers are one conversation.
  """
  typed, chat = sys.stdin.isatty(), flags.FLAGS.chat
  if typed:
    print("A line is a prompt; an empty one ends.", file=sys.stderr)
  messages: list[dict[str, str]] = []
  while True:
    print("> " * typed, end="", flush=True)
    try:
      line = sys.stdin.readline()
    except UnicodeDecodeError as e:
      raise UserError("standard input is not UTF-8 text") from e
    text = line.rstrip("\n").removeprefix("\ufeff")
    if not line or (typed and not text):
      return
    try:
      if not text:
        raise UserError("a prompt is empty: give at least one character")
      check_text("a prompt", text)
      if chat:
        asked = [*messages, {"role": "user", "content": text}]
        answers = _answer(lm, [lm.render(asked)], options, shown=[""])
        answer = {"role": "assistant", "content": "".join(answers)}
        messages = [*asked, answer] if answers else []
      else:
        _answer(lm, [text], options, shown=[text])
    except UserError as e:
      if not typed:
        raise
      print(f"error: {e}", file=sys.stderr)


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  for flag, use in (("compare", "shows both"), ("gate", "decides on latents")):
    if getattr(values, flag) and values.latents == "off":
      raise UserError(f"--{flag} {use}: leave out --latents=off")
  if values.gate and values.store:
    raise UserError("--gate and --store: latents of a store are there already")
  if values.chat and values.store:
    raise UserError("--chat and --store: a store holds plain texts")
  for name in ("stop", "insert_after"):
    for text in getattr(values, name):
      check_text(f"--{name}", text)
  prompts, problem = prompts_of(values.prompt, values.file), None
  if values.problem:
    if prompts:
      raise UserError("--problem is a prompt: leave out --prompt and --file")
    problem = problem_of(values.problem, values.seed)
    prompts = [problem.question]
  sampling = Sampling(values.temperature, values.top_k, values.top_p)
  lm = open_lm(
    values.workdir,
    values.decoder,
    values.coprocessor,
    # Both need one.
    True if values.compare or values.gate else latents_of(values.latents),
  )
  if values.store:
    from cacheaug.projects.context_store.lm import with_store
    from cacheaug.projects.context_store.store import Store

    lm = with_store(lm, Store.existing(values.store))
  options = dict(
    max_new_tokens=values.max_new_tokens,
    plan=plan_of(
      lm,
      values.insert_at,
      values.insert_every,
      values.insert_after,
      before=values.insert_before,
    ),
    sampling=sampling,
    seed=values.seed,
    stop=values.stop,
    gate=values.gate,
  )
  shown = prompts
  if values.chat:
    shown = [f"{prompt}\n" for prompt in prompts]
    prompts = _first_messages(lm, prompts)
  if prompts:
    _answer(lm, prompts, options, shown=shown, problem=problem)
  else:
    _converse(lm, options)


if __name__ == "__main__":
  command.run(main, __doc__)
