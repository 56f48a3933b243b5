"""Exact match on held-out questions, with and without latents."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from cacheaug.augment.traces import Layout
from cacheaug.data import problems
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, report
from cacheaug.inference import context, padding
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import files

ANSWER_TOKENS = 6  # of a generated problem, its line's end included
LONGEST = 64  # tokens of other answers; longer ones are not asked for
BATCH = 128
FILE = "problems.json"
_Z = 1.959964  # of a 95 % interval

Answers = Mapping[str, tuple[int, int]]  # kind and steps -> (right, asked)


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked, and what its answer is compared with.

  Attributes:
    prompt: tokens up to and including the cue, a BOS first where there is one.
    answer: its text, one line.
    name: under which it is counted, such as 'hops-3'.
  """

  prompt: tuple[int, ...]
  answer: str
  name: str


def of_problems(
  options: problems.Options, tokenizer: Tokenizer, count: int, *, seed: int = 0
) -> list[Question]:
  """Held-out problems, by kind and steps; the first of several questions.

  Args:
    options: of the problems.
    tokenizer: the decoder's.
    count: of problems.
    seed: of the problems.
  """
  asked = (
    problems.generate(seed, i, options, split="validation")
    for i in range(count)
  )
  return [
    Question(
      (*tokenizer.prefix, *tokenizer.encode(p.question)),
      p.answer,
      f"{p.kind}-{p.steps}",
    )
    for p in asked
  ]


def of_rows(
  batches: Iterable[Mapping[str, np.ndarray]],
  tokenizer: Tokenizer,
  count: int,
  *,
  name: str,
) -> list[Question]:
  """The first `count` documents of rows whose answers are marked.

  Documents that their row cuts off are left out, and so are answers of more
  than one line or of `LONGEST` tokens or more; a log line says how many.

  Args:
    batches: with 'answers', as data.answers_only makes them.
    tokenizer: the decoder's.
    count: the most that are asked.
    name: of the source.

  Raises:
    UserError: no answer is short enough.
  """
  found, skipped = [], 0
  for batch in batches:
    rows = zip(
      batch["tokens"], batch["documents"], batch["answers"], strict=True
    )
    for tokens, documents, answers in rows:
      for number in np.unique(documents[documents >= 0]):
        (slots,) = np.nonzero(documents == number)
        marked = slots[answers[slots]]
        if not len(marked) or slots[-1] == len(tokens) - 1:
          continue
        answer = tokenizer.decode(tokens[marked].tolist()).strip()
        if "\n" in answer or not answer or len(marked) >= LONGEST:
          skipped += 1
        else:
          prompt = tokens[slots[0] : marked[0]].tolist()
          found.append(Question(tuple(prompt), answer, name))
        if len(found) == count:
          return found
  if skipped:
    logging.warning(
      "%s: %d answers of several lines, or of %d tokens or more, are not asked "
      "for",
      name,
      skipped,
      LONGEST,
    )
  if not found:
    raise UserError(
      f"data.sources.{name} has no held-out answer of one line and under "
      f"{LONGEST} tokens: set eval.problems=0"
    )
  return found


def _greedy(
  model: Transformer,
  decoder: Params,
  pad_id: int,
  prompts: list[list[int]],
  new: int,
  *,
  stop_id: int,
  length: int,
  coproc: Params | None = None,
  spec: Layout | None = None,
  late: int = 0,
) -> np.ndarray:  # [B, new]
  delay = None
  if coproc is not None and late:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Of questions too short for latents the answer is not used.
    delay = np.clip(lengths - spec.context_needed, 0, late)
  tokens, documents = padding.pad_left(prompts, pad_id, length)
  out = context.greedy(
    model,
    decoder,
    coproc,
    tokens,
    documents,
    spec=spec,
    max_new_tokens=new,
    stop_id=stop_id,
    late=delay,
  )
  return np.asarray(out)


def exact_match(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokenizer: Tokenizer,
  spec: Layout | None,
  questions: Sequence[Question],
  *,
  late: int = 0,
  early: bool = False,
) -> dict[str, tuple[int, int]]:  # kind and steps -> (right, asked)
  """Greedy answers; 'all' sums the others.

  A question with fewer tokens than the latents stand on is answered without
  them, so that every coprocessor is asked the same; a log line says how many.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: None answers without latents.
    tokenizer: the decoder's.
    spec: the coprocessor's.
    questions: of `of_problems` or `of_rows`; at least one.
    late: tokens between what the coprocessor has read and its latents. It has
      read the question, and the decoder says so many tokens of the answer by
      itself before the latents come (the paper's table 8).
    early: instead, latents come at the question's end, and the coprocessor
      has not read the question's last `late` tokens, or as many as it can do
      without in a short one.

  Raises:
    UserError: a tokenizer without a line's end.
  """
  stop = tokenizer.encode("\n")
  if len(stop) != 1:
    raise UserError(
      f"tokenizer {tokenizer.name} has no single token for a line's end, "
      "which ends an answer: set eval.problems=0"
    )
  count = len(questions)
  prompts = [list(question.prompt) for question in questions]
  # One more than the longest answer, so that what goes on is not taken for it.
  longest = max(len(tokenizer.encode(q.answer)) for q in questions) + 1
  tokens = max(ANSWER_TOKENS, longest)
  decoded_first = 0 if early or coproc is None else min(late, tokens)
  short = np.zeros(count, bool)
  if coproc is not None:
    short = np.array([len(p) < spec.context_needed for p in prompts])
  if short.any():
    logging.warning(
      "%d of %d questions are shorter than the %d tokens that latents=%d stand "
      "on and are answered without latents",
      short.sum(),
      count,
      spec.context_needed,
      spec.latents,
    )
  length = max(map(len, prompts)) + decoded_first
  right: dict[str, list[bool]] = {}
  for start in range(0, count, BATCH):
    some = prompts[start : start + BATCH]
    some += [some[0]] * (BATCH - len(some))  # one shape, one compilation
    answer = functools.partial(
      _greedy, model, decoder, tokenizer.pad_id, stop_id=stop[0], length=length
    )
    begun = np.zeros((BATCH, 0), np.int32)
    if decoded_first:
      begun = answer(some, tokens)[:, :decoded_first]
      some = [p + ids for p, ids in zip(some, begun.tolist(), strict=True)]
    out = begun
    if decoded_first < tokens:
      new = tokens - decoded_first
      rest = answer(some, new, coproc=coproc, spec=spec, late=late)
      bare = np.resize(short[start : start + BATCH], BATCH)
      if bare.any():
        rest = np.where(bare[:, None], answer(some, new), rest)
      # What a sequence says after its answer's end is not read.
      out = np.concatenate([begun, rest], 1)
    batch = questions[start : start + BATCH]
    for question, ids in zip(batch, out, strict=False):
      ok = problems.check(question.answer, tokenizer.decode(ids.tolist()))
      for name in ("all", question.name):
        right.setdefault(name, []).append(ok)
  return {k: (sum(v), len(v)) for k, v in sorted(right.items())}


def interval(right: int, asked: int) -> tuple[float, float]:
  """The 95 % interval of a share right / asked (Wilson's score interval)."""
  share, spread = right / asked, _Z * _Z / asked
  middle = (share + spread / 2) / (1 + spread)
  half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
  return max(middle - half, 0.0), min(middle + half, 1.0)


def cells(right: int, asked: int) -> str:
  """'61.2% (56.9 to 65.4)'."""
  low, high = interval(right, asked)
  return f"{100 * right / asked:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def table(columns: Mapping[str, Answers]) -> list[tuple[str, ...]]:
  """Header and rows: a row a kind, 'all' last, with 95 % intervals.

  Args:
    columns: name -> answers, all to the same questions.
  """
  first = next(iter(columns.values()))
  header = ("exact match", *columns, "questions")
  return [header] + [
    (kind, *(cells(*c[kind]) for c in columns.values()), str(first[kind][1]))
    for kind in _kinds(first)
  ]


def _kinds(answers: Answers) -> list[str]:
  """By name, 'all' last, if it is not the same as the only one."""
  kinds = sorted(kind for kind in answers if kind != "all")
  return kinds if len(kinds) == 1 else [*kinds, "all"]


def plot(columns: Mapping[str, Answers]) -> bytes:
  """PNG: exact match by kind, a line a column, 95 % intervals as bars.

  Args:
    columns: name -> answers, all to the same questions.
  """
  figure = report.make_figure(7, 4)
  axes = figure.add_subplot()
  kinds = [k for k in _kinds(next(iter(columns.values()))) if k != "all"]
  for i, (name, answers) in enumerate(columns.items()):
    share = [100 * answers[k][0] / answers[k][1] for k in kinds]
    ends = [interval(*answers[k]) for k in kinds]
    spread = [
      [s - 100 * low for s, (low, _) in zip(share, ends, strict=True)],
      [100 * high - s for s, (_, high) in zip(share, ends, strict=True)],
    ]
    color = "0.4" if name == bootstrap.FROZEN else f"C{i - 1}"
    axes.errorbar(
      range(len(kinds)),
      share,
      spread,
      fmt="o-",
      capsize=3,
      color=color,
      label=name,
    )
  axes.set_xticks(range(len(kinds)), kinds)
  axes.set_ylim(0, 105)
  axes.set_ylabel("exact match (%)")
  axes.set_title("Exact match on held-out questions")
  axes.grid(alpha=0.3)
  axes.legend()
  return report.to_png(figure)


def save(directory: epath.Path, columns: Mapping[str, Answers]) -> None:
  """Writes problems.json: kind -> column -> [right, asked].

  Args:
    directory: of a run's report; made if absent.
    columns: of `paired`, such as FROZEN; all of the same problems.

  Raises:
    UserError: no space, no permission.
  """
  kinds = next(iter(columns.values()))
  found = {k: {name: c[k] for name, c in columns.items()} for k in kinds}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    files.write_whole(directory / FILE, json.dumps(found, indent=2).encode())
  except OSError as e:
    raise UserError(
      f"{directory / FILE} cannot be written ({e.strerror or e}): free space "
      "or give another --workdir"
    ) from e


def read(
  directory: epath.PathLike,
) -> dict[str, dict[str, tuple[int, int]]]:
  """Of `save`: kind -> column -> (right, asked).

  Raises:
    UserError: no such file, or a damaged one.
  """
  path = epath.Path(directory) / FILE
  try:
    return {
      kind: {column: (int(a), int(b)) for column, (a, b) in columns.items()}
      for kind, columns in json.loads(path.read_text()).items()
    }
  except (OSError, ValueError, AttributeError, TypeError) as e:
    raise UserError(
      f"{path}: no answers that can be read ({type(e).__name__}): let the run "
      "report again"
    ) from e
