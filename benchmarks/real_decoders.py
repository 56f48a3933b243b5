"""A published decoder by this package and by `transformers`, part by part.

  python benchmarks/real_decoders.py --decoder=FILE.gguf --out=DIR

Both load the same directory or GGUF file in float32 on the CPU. Each part
writes OUT/PART.json as soon as it is done and is not run again while that file
is there, so that a run goes on where it was stopped; `--parts` names some:

  tensors  every weight of ours beside transformers' own
  ids      the tokens of held-out texts, with special tokens and without
  nll      the negative log-likelihood of held-out tokens
  greedy   most likely continuations; where they part, the gap of the logits
  ragged   prompts of unequal lengths in one batch, beside each alone
  speed    tokens a second of prefill and of decoding, in turns (turns.py)

Texts are those of --data (JSON lines, gzipped or plain, key 'text'), the first
documents that are long enough. Ends with a Markdown table. Needs the extras
`parity` and `gguf`.
"""

import functools
import gzip
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
import transformers
import turns
from absl import flags

import cacheaug
from cacheaug.augment import objective
from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.transformer import Transformer
from cacheaug.run import command
from cacheaug.weights import leaves, pretrained

_DECODER = flags.DEFINE_string("decoder", "", "a directory or a GGUF file")
_DATA = flags.DEFINE_list("data", [], "files of JSON lines, held out")
_OUT = flags.DEFINE_string("out", "", "directory of the results")
_PARTS = flags.DEFINE_list("parts", [], "some parts; all by default")
_TEXTS = flags.DEFINE_integer("texts", 1000, "texts of the part ids")
_TOKENS = flags.DEFINE_integer("tokens", 20_000, "tokens of the part nll")
_WINDOW = flags.DEFINE_integer("window", 512, "tokens of a sequence there")
_PROMPTS = flags.DEFINE_integer("prompts", 20, "of the part greedy")
_NEW = flags.DEFINE_integer("new_tokens", 100, "tokens of a continuation")
_REPEATS = flags.DEFINE_integer("repeats", 5, "blocks of the part speed")
_THREADS = flags.DEFINE_integer("threads", 2, "torch's")

_PROMPT = 32  # tokens of a prompt
_RAGGED = (7, 16, 25, 32)  # tokens of the prompts of one batch


class Sides:
  """Both decoders and tokenizers, loaded when a part first asks for them."""

  @functools.cached_property
  def ours(self) -> LM:
    """The decoder by this package."""
    return cacheaug.load(_DECODER.value, dtype="float32")

  @functools.cached_property
  def theirs(self) -> Any:
    """The decoder by transformers."""
    directory, names = _of_transformers(_DECODER.value)
    model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, **names
    )
    return model.eval()

  @functools.cached_property
  def their_tokenizer(self) -> Any:
    """The tokenizer by transformers."""
    directory, names = _of_transformers(_DECODER.value)
    return transformers.AutoTokenizer.from_pretrained(directory, **names)


def _of_transformers(path: str) -> tuple[str, dict[str, str]]:
  """from_pretrained's arguments for a directory or a GGUF file."""
  found = pretrained.resolve(path)
  if found.is_file():
    return str(found.parent), {"gguf_file": found.name}
  return str(found), {}


# --- data -------------------------------------------------------------------


def texts() -> Iterator[str]:
  """The texts of all files, one of each in turn; UserError: no --data."""

  def lines(path: str) -> Iterator[str]:
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
      for line in file:
        yield json.loads(line)["text"]

  if not _DATA.value:
    raise UserError("--data is missing: give files of JSON lines")
  for row in itertools.zip_longest(*map(lines, _DATA.value)):
    yield from (text for text in row if text is not None)


def sequences(lm: LM, count: int, length: int) -> np.ndarray:  # [count, length]
  """The first tokens of `count` long texts; UserError: there are fewer."""
  rows = []
  for text in texts():
    ids = lm.encode(text[: 8 * length])
    if len(ids) >= length:
      rows.append(ids[:length])
    if len(rows) == count:
      return np.array(rows, np.int32)
  raise UserError(
    f"--data has {len(rows)} texts of {length} tokens, not {count}"
  )


# --- parts ------------------------------------------------------------------


def tensors(sides: Sides) -> dict[str, Any]:
  """Compares every weight, bit for bit."""
  theirs = sides.theirs.state_dict()
  flat = leaves.flatten(sides.ours.decoder)
  equal, worst, values, missing = 0, 0.0, 0, []
  names = 0
  for leaf in leaves.leaves_of(sides.ours.model.config):
    array = np.asarray(flat[leaf.path])
    parts = array if leaf.stacked else array[None]
    for name, part in zip(leaf.names, parts, strict=True):
      names += 1
      if name not in theirs:
        missing.append(name)
        continue
      a, b = leaf.theirs(part), theirs[name].numpy()
      values += a.size
      equal += np.array_equal(a, b)
      worst = max(worst, float(np.abs(a - b).max()))
  return dict(
    tensors=names,
    equal=int(equal),
    values=values,
    largest_difference=worst,
    missing=missing,
    quantised=pretrained.quantisation(pretrained.resolve(_DECODER.value)),
    fingerprint=sides.ours.fingerprint,
  )


def ids(sides: Sides) -> dict[str, Any]:
  """Compares the tokens of texts."""
  ours, theirs = sides.ours.tokenizer, sides.their_tokenizer
  count = same = same_plain = tokens = 0
  first = ""
  for text in itertools.islice(texts(), _TEXTS.value):
    count += 1
    want = theirs(text, add_special_tokens=True)["input_ids"]
    got = tokenizers.with_special(ours, text)
    tokens += len(want)
    same += got == want
    if got != want and not first:
      first = text[:80]
    want = theirs(text, add_special_tokens=False, split_special_tokens=True)
    same_plain += ours.encode(text) == want["input_ids"]
  return dict(
    texts=count,
    tokens=tokens,
    equal_with_special=same,
    equal_without=same_plain,
    first_that_differs=first,
  )


@functools.partial(jax.jit, static_argnames="model")
def _next_nll(model: Transformer, params: Any, tokens: jax.Array) -> jax.Array:
  """[B, S] tokens -> [B, S - 1] nats."""
  hidden, _ = transformer.prefill(model, params, tokens)
  return objective.next_token_nll(model, params, hidden, tokens)


def nll(sides: Sides) -> dict[str, Any]:
  """Compares nats a token."""
  lm = sides.ours
  rows = sequences(lm, -(-_TOKENS.value // (_WINDOW.value - 1)), _WINDOW.value)
  ours, theirs = [], []
  for i, row in enumerate(rows):
    ours.append(np.asarray(_next_nll(lm.model, lm.decoder, row[None]))[0])
    with torch.no_grad():
      logits = sides.theirs(torch.tensor(row[None]).long()).logits[0, :-1]
      target = torch.tensor(row[1:]).long()
      theirs.append(
        torch.nn.functional.cross_entropy(logits, target, reduction="none")
        .numpy()
        .copy()
      )
    print(f"nll: {i + 1} of {len(rows)} sequences", flush=True)
  a, b = np.concatenate(ours)[: _TOKENS.value], np.concatenate(theirs)
  b = b[: _TOKENS.value]
  return dict(
    tokens=len(a),
    ours=float(a.mean(dtype=np.float64)),
    theirs=float(b.mean(dtype=np.float64)),
    largest_difference=float(np.abs(a - b).max()),
    mean_difference=float(np.abs(a - b).mean()),
  )


def _continue(sides: Sides, rows: Any, new: int) -> list[list[int]]:
  """Most likely tokens after prompts [B, S], by transformers."""
  tokens = torch.tensor(np.asarray(rows)).long()
  with torch.no_grad():
    out = sides.theirs.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      do_sample=False,
      min_new_tokens=new,
      max_new_tokens=new,
      suppress_tokens=None,
      eos_token_id=[],
      pad_token_id=0,
    )
  return out[:, tokens.shape[1] :].tolist()


def _gap(sides: Sides, context: list[int], chosen: int, other: int) -> float:
  """By how much transformers' logit of `chosen` is above that of `other`."""
  with torch.no_grad():
    logits = sides.theirs(torch.tensor([context]).long()).logits[0, -1]
  return float(logits[chosen] - logits[other])


def greedy(sides: Sides) -> dict[str, Any]:
  """Compares most likely continuations, of prompts of one length at once."""
  lm, new = sides.ours, _NEW.value
  rows = sequences(lm, _PROMPTS.value, _PROMPT).tolist()
  ours = lm.decode(lm.prefill(rows), new, stop_ids=()).tolist()
  theirs = _continue(sides, rows, new)
  parted = []
  for i, (row, a, b) in enumerate(zip(rows, ours, theirs, strict=True)):
    if a != b:
      at = next(k for k in range(new) if a[k] != b[k])
      gap = _gap(sides, row + b[:at], b[at], a[at])
      parted.append(dict(prompt=i, at=at, gap=gap))
  equal = len(rows) - len(parted)
  return dict(prompts=len(rows), new_tokens=new, equal=equal, parted=parted)


def ragged(sides: Sides) -> dict[str, Any]:
  """Compares a batch of unequal prompts with each alone, and transformers."""
  lm, new = sides.ours, _NEW.value
  rows = sequences(lm, len(_RAGGED), max(_RAGGED))
  prompts = [row[:n].tolist() for row, n in zip(rows, _RAGGED, strict=True)]
  batch = lm.decode(lm.prefill(prompts), new, stop_ids=()).tolist()
  alone = [
    lm.decode(lm.prefill([p]), new, stop_ids=())[0].tolist() for p in prompts
  ]
  theirs = [_continue(sides, [p], new)[0] for p in prompts]
  return dict(
    prompts=len(prompts),
    lengths=_RAGGED,
    new_tokens=new,
    equal_to_alone=sum(a == b for a, b in zip(batch, alone, strict=True)),
    equal_to_transformers=sum(
      a == b for a, b in zip(batch, theirs, strict=True)
    ),
  )


def speed(sides: Sides) -> dict[str, Any]:
  """Times prefill of 512 tokens and 64 steps of decoding, batch 1."""
  lm, new = sides.ours, 64
  rows = sequences(lm, 1, 512)
  short = rows[:, :_PROMPT].tolist()
  tokens = torch.tensor(rows).long()

  def timed(call: Callable[[], Any]) -> Callable[[], float]:
    def way() -> float:
      begun = time.perf_counter()
      call()
      return time.perf_counter() - begun

    return way

  def their_prefill() -> None:
    with torch.no_grad():
      sides.theirs(tokens, logits_to_keep=1)

  contexts = lm.prefill(short)
  ways = {
    "prefill": timed(lambda: jax.block_until_ready(lm.prefill(rows.tolist()))),
    "prefill, transformers": timed(their_prefill),
    "decoding": timed(lambda: lm.decode(contexts, new, stop_ids=())),
    "decoding, transformers": timed(lambda: _continue(sides, short, new)),
  }
  found = turns.take(ways, _REPEATS.value)
  counts = {"prefill": 512, "decoding": new}
  result: dict[str, Any] = dict(repeats=_REPEATS.value, threads=_THREADS.value)
  for name, count in counts.items():
    mine, other = found[name], found[f"{name}, transformers"]
    result[name] = dict(
      tokens_a_second=count / float(np.median(mine)),
      transformers=count / float(np.median(other)),
      times_as_fast=turns.ratio(other, mine),
    )
  return result


PARTS = dict(
  tensors=tensors, ids=ids, nll=nll, greedy=greedy, ragged=ragged, speed=speed
)


# --- table ------------------------------------------------------------------


def table(name: str, found: dict[str, dict[str, Any]]) -> str:
  """Markdown rows of what is there."""
  rows = []
  if t := found.get("tensors"):
    rows.append(
      f"| weights equal bit for bit | {t['equal']} of {t['tensors']} tensors, "
      f"{t['values']:,} values ({t['quantised'] or 'not quantised'}) |"
    )
  if t := found.get("ids"):
    rows.append(
      f"| texts with equal tokens | {t['equal_with_special']} of {t['texts']} "
      f"with special tokens, {t['equal_without']} without; "
      f"{t['tokens']:,} tokens |"
    )
  if t := found.get("nll"):
    rows.append(
      f"| nats a token | {t['ours']:.6f} against {t['theirs']:.6f} over "
      f"{t['tokens']:,} tokens, largest difference "
      f"{t['largest_difference']:.1e} |"
    )
  if t := found.get("greedy"):
    gaps = ", ".join(f"{p['gap']:.1e}" for p in t["parted"]) or "none"
    rows.append(
      f"| equal greedy continuations | {t['equal']} of {t['prompts']} of "
      f"{t['new_tokens']} tokens; logit gaps where they part: {gaps} |"
    )
  if t := found.get("ragged"):
    rows.append(
      f"| a batch of prompts of {', '.join(map(str, t['lengths']))} tokens | "
      f"{t['equal_to_alone']} of {t['prompts']} equal to the prompt alone, "
      f"{t['equal_to_transformers']} to transformers |"
    )
  for part in ("prefill", "decoding"):
    if t := found.get("speed", {}).get(part):
      rows.append(
        f"| {part}, tokens/s | {t['tokens_a_second']:.1f} against "
        f"{t['transformers']:.1f}; {turns.shown(t['times_as_fast'])} times |"
      )
  return "\n".join(
    [f"| {name} | this package against transformers |", "| --- | --- |", *rows]
  )


def main() -> None:
  """Runs what is not there yet and prints the table."""
  torch.set_num_threads(_THREADS.value)
  transformers.logging.set_verbosity_error()
  if not _DECODER.value or not _OUT.value:
    raise UserError("give --decoder and --out")
  wanted = _PARTS.value or list(PARTS)
  if unknown := [part for part in wanted if part not in PARTS]:
    raise UserError(f"--parts={unknown[0]} is not one of {', '.join(PARTS)}")
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  sides = Sides()
  for part in wanted:
    path = out / f"{part}.json"
    if not path.exists():
      begun = time.perf_counter()
      found = PARTS[part](sides)
      found["seconds"] = round(time.perf_counter() - begun, 1)
      path.write_text(json.dumps(found, indent=2) + "\n")
      print(f"{part}: {json.dumps(found)}", flush=True)
  results = {
    part: json.loads((out / f"{part}.json").read_text())
    for part in PARTS
    if (out / f"{part}.json").exists()
  }
  print(table(pathlib.Path(_DECODER.value).name, results))


if __name__ == "__main__":
  command.run(main, __doc__)
