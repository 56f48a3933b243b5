"""Exact match on generated problems, with and without latents."""

import functools
import json
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath

from cacheaug.augment.traces import TraceSpec
from cacheaug.data import problems
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.inference import context, padding
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import files

ANSWER_TOKENS = 6
BATCH = 128
FILE = "problems.json"

Answers = Mapping[str, tuple[int, int]]  # kind and steps -> (right, asked)


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
  spec: TraceSpec | None = None,
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
  spec: TraceSpec | None,
  *,
  count: int,
  options: problems.Options,
  seed: int = 0,
  late: int = 0,
  early: bool = False,
) -> dict[str, tuple[int, int]]:  # kind and steps -> (right, asked)
  """Greedy answers to `count` held-out problems; 'all' sums the others.

  A question with fewer tokens than the latents stand on is answered without
  them, so that every coprocessor is asked the same; a log line says how many.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: None answers without latents.
    tokenizer: the decoder's.
    spec: the coprocessor's.
    count: of problems.
    options: of the problems; of several questions the first is asked.
    seed: of the problems.
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
  asked = [
    problems.generate(seed, i, options, split="validation")
    for i in range(count)
  ]
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  prompts = [bos + tokenizer.encode(p.question) for p in asked]
  said = 0 if early or coproc is None else min(late, ANSWER_TOKENS)
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
  length = max(map(len, prompts)) + said
  right: dict[str, list[bool]] = {}
  for start in range(0, count, BATCH):
    some = prompts[start : start + BATCH]
    some += [some[0]] * (BATCH - len(some))  # one shape, one compilation
    answer = functools.partial(
      _greedy, model, decoder, tokenizer.pad_id, stop_id=stop[0], length=length
    )
    begun = np.zeros((BATCH, 0), np.int32)
    if said:
      begun = answer(some, ANSWER_TOKENS)[:, :said]
      some = [p + ids for p, ids in zip(some, begun.tolist(), strict=True)]
    out = begun
    if said < ANSWER_TOKENS:
      new = ANSWER_TOKENS - said
      rest = answer(some, new, coproc=coproc, spec=spec, late=late)
      bare = np.resize(short[start : start + BATCH], BATCH)
      if bare.any():
        rest = np.where(bare[:, None], answer(some, new), rest)
      # What a sequence says after its answer's end is not read.
      out = np.concatenate([begun, rest], 1)
    batch = asked[start : start + BATCH]
    for problem, ids in zip(batch, out, strict=False):
      ok = problems.check(problem, tokenizer.decode(ids.tolist()))
      for name in ("all", f"{problem.kind}-{problem.steps}"):
        right.setdefault(name, []).append(ok)
  return {k: (sum(v), len(v)) for k, v in sorted(right.items())}


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
