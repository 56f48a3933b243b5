"""The frozen decoder's scores by this package and by lm_eval's own class.

  python benchmarks/lm_eval_parity.py --decoder=DIR --data=DIR [--limit=100]

Needs the `eval` and `parity` extras. Same harness, tasks, documents, prompts
and cuts; once through cacheaug (latents off), once through lm_eval's Hugging
Face class in PyTorch on the CPU. One row a benchmark: every metric of either,
the largest difference of a log-likelihood, and how many documents agree (same
choice or same text, and the same metrics).

Both sides read tokenizer.json as it stands: transformers 5's own class for
Llama forgets that file's unknown token and drops what has no other.
"""

import argparse
import dataclasses

import numpy as np
import transformers
from lm_eval.models.huggingface import HFLM

import cacheaug
from cacheaug.projects.lm_eval import benchmarks
from cacheaug.projects.lm_eval import tasks as lm_eval_tasks
from cacheaug.projects.lm_eval.answering import Answerer
from cacheaug.projects.lm_eval.model import AugmentedLM

TASKS = (
  "gsm8k,arc_easy,arc_challenge,hellaswag,winogrande,piqa,boolq,mmlu,drop,"
  "mbpp,bbh"
)


@dataclasses.dataclass(frozen=True)
class Parity:
  """One benchmark by both.

  Attributes:
    documents: how many.
    ours: metric and filter -> mean.
    theirs: the same.
    worst: the largest difference of a log-likelihood, nats; 0 of texts.
    largest: the largest log-likelihood, nats, that it is a difference of.
    same_answers: documents with the same choice, or the same text.
    same_metrics: documents whose every metric is equal.
  """

  documents: int
  ours: dict[str, float]
  theirs: dict[str, float]
  worst: float
  largest: float
  same_answers: int
  same_metrics: int


def peer(decoder: str, answerer: Answerer, batch: int) -> HFLM:
  """lm_eval's own class over the same weights, tokenizer and positions."""
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(decoder)
  return HFLM(
    pretrained=decoder,
    tokenizer=tokenizer,
    device="cpu",
    dtype="float32",
    batch_size=batch,
    max_length=answerer.max_length,
  )


def compare(
  ours: AugmentedLM, theirs: HFLM, task: lm_eval_tasks.Prepared
) -> Parity:
  """Runs one of `benchmarks.prepare` through both."""
  with benchmarks.quiet():
    a = lm_eval_tasks.evaluate(ours, task.tasks)
    b = lm_eval_tasks.evaluate(theirs, task.tasks)
  worst = largest = 0.0
  answers: dict[tuple, bool] = {}
  metrics: dict[tuple, bool] = {}
  for x, y in zip(a, b, strict=True):
    assert x["doc_hash"] == y["doc_hash"]
    assert x["arguments"] == y["arguments"]
    key = x["doc_hash"], x["prompt_hash"], x["doc_id"]
    same = all(x[m] == y[m] for m in x["metrics"])
    metrics[key] = metrics.get(key, True) and same
    if isinstance(x["resps"][0][0], str):
      answers[key] = x["resps"] == y["resps"]
      continue
    p, q = (
      np.array([r[0][0] for r in side["resps"]], np.float64) for side in (x, y)
    )
    worst = max(worst, float(np.abs(p - q).max()))
    largest = max(largest, float(np.abs(q).max()))
    greedy = [[r[0][1] for r in side["resps"]] for side in (x, y)]
    answers[key] = p.argmax() == q.argmax() and greedy[0] == greedy[1]
  return Parity(
    documents=len(answers),
    ours=_means(a),
    theirs=_means(b),
    worst=worst,
    largest=largest,
    same_answers=sum(map(bool, answers.values())),
    same_metrics=sum(metrics.values()),
  )


def _means(samples) -> dict[str, float]:
  values: dict[str, list[float]] = {}
  for s in samples:
    name = "" if s["filter"] == "none" else f" ({s['filter']})"
    for metric in s["metrics"]:
      values.setdefault(f"{metric}{name}", []).append(float(s[metric]))
  return {k: float(np.mean(v)) for k, v in values.items()}


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--decoder", required=True)
  parser.add_argument("--data", required=True)
  parser.add_argument("--tasks", default=TASKS)
  parser.add_argument("--limit", type=int, default=100)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--max_gen_toks", type=int, default=128)
  args = parser.parse_args()
  answerer = Answerer(
    cacheaug.load(args.decoder, dtype="float32"),
    latents=False,
    batch=args.batch,
  )
  theirs = peer(args.decoder, answerer, args.batch)
  tasks = benchmarks.prepare(
    args.tasks.split(","),
    data=args.data,
    limit=args.limit,
    cot="",
    max_gen_toks=args.max_gen_toks,
    execute=True,
  )
  print(
    "| benchmark | shots | documents | metric | this package | lm_eval's class "
    "| largest difference | same answers | same metrics |"
  )
  print("|" + " --- |" * 9)
  for task in tasks:
    answerer.counts.clear()
    found = compare(AugmentedLM(answerer=answerer, latents=False), theirs, task)
    worst = "texts"
    if found.largest:
      worst = f"{found.worst:.1e} of {found.largest:.0f} nats"
    for metric, ours in found.ours.items():
      cells = (
        task.name,
        task.shots,
        found.documents,
        metric,
        f"{ours:.6f}",
        f"{found.theirs[metric]:.6f}",
        worst,
        found.same_answers,
        found.same_metrics,
      )
      print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
  main()
