"""What latents gain against the share of contexts that get them, by gate.

  python -m cacheaug.projects.gating.report --workdir=runs/tiny_coprocessor
  python -m cacheaug.projects.gating.report \
      --config=configs/tiny_coprocessor.py \
      --coprocessor=shipped:tiny_coprocessor --out=runs/gate

At every token of held-out text that can bear a trace, the nats that latents
save on the next A tokens are measured. A gate ranks these contexts; the report
says which part of the whole gain it reaches with the best 10, 20 .. 100 % of
them. Besides: `random`, what chance reaches; `best possible`, which ranks by
the gain itself, as no gate can. The learned head is fitted to the training
text and written, with the threshold that lets --share percent of that text
through, to --out (the run's own directory `gate` by default; see
inference/gates.py). At the end come the flags with which
`python -m cacheaug.generate` decides so.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cacheaug import build
from cacheaug import config as configs
from cacheaug.augment import objective
from cacheaug.augment.traces import Layout
from cacheaug.data import opening
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.evals import perplexity, run_report
from cacheaug.evals.bootstrap import resample
from cacheaug.inference import gates
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import command
from cacheaug.run.files import refuse_remote
from cacheaug.weights import trained

SHARES = tuple(range(0, 101, 10))  # percent
EVERY = (1, 2, 4, 8)
LEARNED, ENTROPY = "learned head", "entropy"
BEST, RANDOM = "best possible", "random"

Batches = Iterable[dict[str, np.ndarray]]  # tokens, documents [B, S]


@dataclasses.dataclass(frozen=True)
class Contexts:
  """Every context of some text that can bear a trace."""

  hidden: np.ndarray  # [T, D], the decoder's
  entropy: np.ndarray  # [T] nats, of the next token
  tokens: np.ndarray  # [T], of its document so far
  gain: np.ndarray  # [T] nats saved on the next A tokens
  documents: np.ndarray  # [T]

  def __len__(self) -> int:
    return len(self.gain)


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def _seen(model, decoder, tokens, documents, *, spec):
  """The decoder's hidden states [B, S, D] and entropies [B, S]."""
  hidden, _ = objective.context_pass(model, decoder, tokens, documents, spec)
  return hidden, gates.entropy(model, decoder, hidden)


def measure(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batches: Batches,
  spec: Layout,
) -> Contexts:
  """The gain of latents after every token, and the inputs of gates.

  Raises:
    UserError: no token has room for a trace.
  """
  found = []
  for batch in batches:
    args = model, decoder, coproc, batch["tokens"], batch["documents"]
    frozen, augmented, weights = perplexity.both_nll(*args, spec=spec)
    gain = np.asarray(((frozen - augmented) * weights).sum(-1))
    keep = np.asarray(weights)[..., 0] > 0
    hidden, entropy = _seen(
      model, decoder, batch["tokens"], batch["documents"], spec=spec
    )
    so_far = _tokens_so_far(np.asarray(batch["documents"]))
    columns = hidden, entropy, so_far, gain, batch["documents"]
    found.append([np.asarray(x)[keep] for x in columns])
  if not sum(len(x[0]) for x in found):
    raise UserError("no token has room for a trace: give longer documents")
  return Contexts(*map(np.concatenate, zip(*found, strict=True)))


def _tokens_so_far(documents: np.ndarray) -> np.ndarray:
  """Tokens of its document up to and including each, [B, S]."""
  index = np.arange(documents.shape[1])
  new = np.diff(documents, axis=1, prepend=-2) != 0
  return index - np.maximum.accumulate(np.where(new, index, 0), 1) + 1


def join(parts: Iterable[Contexts]) -> Contexts:
  """Several texts' contexts as one; their documents stay separate."""
  parts, first, columns = list(parts), 0, []
  for part in parts:
    renumbered = dataclasses.replace(part, documents=part.documents + first)
    first = int(renumbered.documents.max()) + 1
    columns.append(
      [getattr(renumbered, f.name) for f in dataclasses.fields(part)]
    )
  return Contexts(*map(np.concatenate, zip(*columns, strict=True)))


def reached(
  score: np.ndarray, gain: np.ndarray, shares: Iterable[float] = SHARES
) -> np.ndarray:
  """Percent of the whole gain with the highest scores, by share in percent.

  Beyond 100 where the contexts left out lose by latents. Equal scores are
  taken in order. Negative where the gain of all is a loss.

  Args:
    score: [T], the gate's.
    gain: [T] nats.
    shares: of the T contexts, in percent.
  """
  order = np.argsort(-score, kind="stable")
  sums = np.concatenate([[0.0], np.cumsum(gain[order], dtype=np.float64)])
  counts = np.rint(np.asarray(list(shares)) / 100 * len(gain)).astype(int)
  return 100.0 * sums[counts] / abs(sums[-1])


def interval(
  chosen: np.ndarray, contexts: Contexts, *, seed: int, resamples: int = 1000
) -> tuple[float, float]:
  """95 % interval of the percent reached by `chosen` [T] bool.

  A bootstrap over documents, the choice being as it is.
  """
  _, owner = np.unique(contexts.documents, return_inverse=True)
  whole = np.bincount(owner, contexts.gain)
  part = np.bincount(owner, contexts.gain * chosen)
  shares = [
    100.0 * (drawn @ part) / np.abs(drawn @ whole)
    for drawn in resample(len(whole), seed=seed, resamples=resamples)
  ]
  low, high = np.percentile(np.concatenate(shares), [2.5, 97.5])
  return float(low), float(high)


def gain_interval(
  contexts: Contexts, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
  """95 % interval of the mean gain in nats a context, over documents."""
  _, owner = np.unique(contexts.documents, return_inverse=True)
  gain, counts = np.bincount(owner, contexts.gain), np.bincount(owner)
  means = [
    drawn @ gain / (drawn @ counts)
    for drawn in resample(len(gain), seed=seed, resamples=resamples)
  ]
  low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
  return float(low), float(high)


def scores(
  contexts: Contexts, head: Params, seed: int = 0
) -> dict[str, np.ndarray]:
  """Each gate's scores, by which it ranks contexts: name -> [T]."""
  noise = np.random.default_rng(seed).random(len(contexts))
  return {
    LEARNED: np.asarray(gates.predicted_gain(head, contexts.hidden)),
    ENTROPY: contexts.entropy,
    RANDOM: noise,
    BEST: contexts.gain,
  }


@dataclasses.dataclass(frozen=True)
class Row:
  """One gate on one text."""

  gate: str
  percent: tuple[float, ...]  # of the whole gain, at SHARES
  at_half: tuple[float, float]  # interval at 50 %
  # At the threshold that lets the wanted share of the training text through.
  share: float | None = None
  gained: float | None = None


def table(
  contexts: Contexts,
  head: Params,
  thresholds: Mapping[str, float],
  *,
  seed: int = 0,
) -> list[Row]:
  """A row a gate."""
  rows = []
  for name, score in scores(contexts, head, seed).items():
    order = np.argsort(-score, kind="stable")
    half = np.zeros(len(score), bool)
    half[order[: round(len(score) / 2)]] = True
    row = Row(
      name,
      tuple(reached(score, contexts.gain).tolist()),
      interval(half, contexts, seed=seed),
    )
    if name in thresholds:
      on = score > thresholds[name]
      gained = 100.0 * contexts.gain[on].sum() / abs(contexts.gain.sum())
      row = dataclasses.replace(
        row, share=100.0 * float(on.mean()), gained=float(gained)
      )
    rows.append(row)
  return rows


def periodic(contexts: Contexts) -> list[tuple[int, float, float]]:
  """(k, share, percent of the whole gain) of a gate every k tokens."""
  out = []
  for k in EVERY:
    on = np.asarray(gates.every(contexts.tokens, k))
    gained = contexts.gain[on].sum() / abs(contexts.gain.sum())
    out.append((k, 100.0 * float(on.mean()), 100.0 * float(gained)))
  return out


def format_table(contexts: Contexts, rows: list[Row]) -> str:
  """Aligned plain text."""
  mean = contexts.gain.mean()
  loses = 100.0 * (contexts.gain < 0).mean()
  lines = [
    f"{len(contexts)} contexts of {len(np.unique(contexts.documents))} "
    f"documents; latents save {mean:+.4f} nats a context, and lose on "
    f"{loses:.1f} % of them",
    "percent of the gain    " + "".join(f"{s:>7} %" for s in SHARES),
  ]
  low, high = gain_interval(contexts)
  if low <= 0 <= high:
    lines[0] += (
      f"; from {low:+.4f} to {high:+.4f} nats, which may be nothing: what "
      "parts of it are reached says little"
    )
  for row in rows:
    cells = "".join(f"{x:9.1f}" for x in row.percent)
    lines.append(f"{row.gate:23}{cells}")
  for row in rows:
    line = f"{row.gate}: at 50 % {row.percent[5]:.1f} % of the gain "
    line += f"({row.at_half[0]:.1f} to {row.at_half[1]:.1f})"
    if row.share is not None:
      line += (
        f"; at the training text's threshold {row.share:.1f} % augmented, "
        f"{row.gained:.1f} % of the gain"
      )
    lines.append(line)
  for k, share, gained in periodic(contexts):
    lines.append(
      f"every {k}: {share:.1f} % augmented, {gained:.1f} % of the gain"
    )
  return "\n".join(lines)


def training_text(
  config: ConfigDict, tokenizer: Tokenizer, name: str
) -> Iterator[dict[str, np.ndarray]]:
  """Training batches of one source: eval.sequences, in the run's own order."""
  data = ConfigDict(config.data.to_dict())
  data.sources = ConfigDict({name: config.data.sources[name].to_dict()})
  data.batch = config.eval.batch
  batches = opening.open_batches(
    data, tokenizer, split="train", seed=config.seed
  )
  for step in range(-(-config.eval.sequences // data.batch)):
    yield batches.at(step)


def main() -> None:
  """Reads the flags that are defined below."""
  values = flags.FLAGS
  workdir, path = values.workdir, values.coprocessor
  if bool(workdir) == bool(path):
    raise UserError("give either --workdir, or --config and --coprocessor")
  if workdir:
    config, path = trained.read_run(workdir).config, workdir
  elif "config" not in values:
    raise UserError("--config is missing: the text and decoder to gate on")
  else:
    config = configs.resolve(values.config)
  if not config.decoder.path:
    raise UserError("decoder.path is empty: a random decoder gains nothing")
  if not 0 < values.share < 100:
    raise UserError(f"--share={values.share:g} must be between 0 and 100")
  out = values.out or (workdir and f"{workdir.rstrip('/')}/gate")
  if not out:
    raise UserError("--out is missing: a directory for the gate's head")
  refuse_remote(out, "--out")
  found = build.load(config.decoder.path).with_coprocessor(path)
  config.eval.sequences = values.sequences
  spec, coproc = found.coprocessor.spec, found.coprocessor.params
  ahead = values.ahead or spec.ahead
  if spec.stride:  # A gate decides on latents at one point.
    spec = dataclasses.replace(spec, rounds=1, stride=0)
  spec = spec.with_horizon(ahead)
  names = run_report.source_names(config)

  def contexts(text):
    args = found.model, found.decoder, coproc
    return {
      name: measure(*args, text(config, found.tokenizer, name), spec)
      for name in names
    }

  train = join(contexts(training_text).values())
  head = gates.fit_head(jax.random.key(config.seed), train.hidden, train.gain)
  thresholds = {
    name: float(np.percentile(score, 100.0 - values.share))
    for name, score in scores(train, head).items()
    if name in (LEARNED, ENTROPY)
  }
  meta = {
    "decoder_fingerprint": found.fingerprint,
    "coprocessor": str(path),
    "ahead": ahead,
    "share": values.share,
    "threshold": thresholds[LEARNED],
  }
  gates.save_head(out, head, meta)
  held = contexts(run_report.held_out)
  texts = held | ({"all": join(held.values())} if len(held) > 1 else {})
  for name, some in texts.items():
    rows = table(some, head, thresholds, seed=config.seed)
    print(f"{name}, held-out, the next {ahead} tokens")
    print(format_table(some, rows) + "\n", flush=True)
  print(
    f"gate's head, fitted to {len(train)} training contexts: {out} "
    f"({values.share:g} % of them are above {thresholds[LEARNED]:.4f} nats)"
  )
  where = f"--workdir={workdir}"
  if not workdir:
    where = f"--decoder={config.decoder.path} --coprocessor={path}"
  print(f"latents for {values.share:g} % of such contexts, by either:")
  for gate in (f"entropy:{thresholds[ENTROPY]:.4f}", f"head:{out}"):
    print(f"  python -m cacheaug.generate {where} --gate={gate}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "a run: its coprocessor, decoder and text")
  flags.DEFINE_string(
    "coprocessor", "", "with --config: an exported coprocessor, shipped:NAME"
  )
  flags.DEFINE_string("out", "", "directory for the learned head")
  flags.DEFINE_integer("sequences", 512, "of training and of held-out text")
  flags.DEFINE_float("share", 50, "percent of contexts to let through")
  flags.DEFINE_integer("ahead", 0, "tokens the gain is over; 0: as trained")
  if any(a.lstrip("-").startswith("config") for a in sys.argv[1:]):
    # Only then: cacheaug.run.command insists on a flag of this name.
    config_flags.DEFINE_config_file("config", help_string="text and decoder")
  command.run(main, __doc__)
