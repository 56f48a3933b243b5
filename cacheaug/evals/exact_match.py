"""Exact match on generated problems, with and without latents."""

import numpy as np

from cacheaug.augment.traces import TraceSpec
from cacheaug.data import problems
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.inference import generate
from cacheaug.model.transformer import Params, Transformer

ANSWER_TOKENS = 6
BATCH = 128


def exact_match(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokenizer: Tokenizer,
  spec: TraceSpec | None,
  *,
  count: int,
  kinds: tuple[str, ...],
  steps: tuple[int, int],
  seed: int = 0,
) -> dict[str, tuple[int, int]]:  # kind and steps -> (right, asked)
  """Greedy answers to `count` held-out problems; 'all' sums the others."""
  stop = tokenizer.encode("\n")
  if len(stop) != 1:
    raise UserError(
      f"tokenizer {tokenizer.name} has no single token for a line's end, "
      "which ends an answer: set eval.problems=0"
    )
  asked = [
    problems.generate(seed, i, kinds=kinds, steps=steps, split="validation")
    for i in range(count)
  ]
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  prompts = [bos + tokenizer.encode(p.question) for p in asked]
  if coproc is not None:
    generate.check_prompts(prompts, spec)
  length = max(map(len, prompts))
  right: dict[str, list[bool]] = {}
  for start in range(0, count, BATCH):
    some = prompts[start : start + BATCH]
    some += [some[0]] * (BATCH - len(some))  # one shape, one compilation
    tokens, documents = generate.pad_left(some, tokenizer.pad_id, length)
    out = generate.greedy(
      model,
      decoder,
      coproc,
      tokens,
      documents,
      spec=spec,
      max_new_tokens=ANSWER_TOKENS,
      stop_id=stop[0],
    )
    batch = asked[start : start + BATCH]
    for problem, ids in zip(batch, np.asarray(out), strict=False):
      ok = problems.check(problem, tokenizer.decode(ids.tolist()))
      for name in ("all", f"{problem.kind}-{problem.steps}"):
        right.setdefault(name, []).append(ok)
  return {k: (sum(v), len(v)) for k, v in sorted(right.items())}
