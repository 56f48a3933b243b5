"""An LM as lm_eval's harness asks it: the model named 'cacheaug'.

  import cacheaug.projects.lm_eval.model
  lm_eval.simple_evaluate(model="cacheaug", model_args={"decoder": DIR, ...})

Tokens are those of lm_eval's own Hugging Face class: context and continuation
are encoded together and cut at the context's length, its trailing spaces
counted to the continuation; too long ones lose their left. Differences:

- Text that spells a special token stays text.
- Stop strings end a text alone, whatever stands in its batch.
- A continuation that its context's last token swallows is encoded alone, and
  counted ("melted"); the harness stops there.
- Running text has one BOS, not a second one that is scored.
"""

import functools
from collections.abc import Sequence
from typing import Any

from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from cacheaug.build import open_lm
from cacheaug.errors import UserError
from cacheaug.inference.sampling import Sampling
from cacheaug.projects.lm_eval.answering import (
  AUGMENTED,
  FROZEN,
  Answerer,
  Request,
)

# New tokens where a task does not say, as lm_eval's own class.
_MAX_NEW_TOKENS = 256
# Arguments of transformers' generate that tasks give, and the value with which
# each does nothing. Another value would change the text: it is refused.
_NEUTRAL = {
  "diversity_penalty": 0.0,
  "early_stopping": False,
  "encoder_repetition_penalty": 1.0,
  "epsilon_cutoff": 0.0,
  "eta_cutoff": 0.0,
  "frequency_penalty": 0.0,
  "length_penalty": 1.0,
  "min_length": 0,
  "min_new_tokens": 0,
  "min_p": 0.0,
  "no_repeat_ngram_size": 0,
  "num_beam_groups": 1,
  "num_beams": 1,
  "num_return_sequences": 1,
  "penalty_alpha": 0.0,
  "presence_penalty": 0.0,
  "repetition_penalty": 1.0,
  "typical_p": 1.0,
  "use_cache": True,
}


@register_model("cacheaug")
class AugmentedLM(TemplateLM):
  """One column of an `Answerer`.

  Two over one Answerer share all work: the second finds its answers ready.
  """

  def __init__(
    self,
    decoder: str = "",
    coprocessor: str = "",
    *,
    workdir: str = "",
    latents: bool | str | None = None,
    batch_size: int | str = 8,
    answerer: Answerer | None = None,
    **ignored: Any,
  ):
    """Opens a decoder, or takes an Answerer.

    Args:
      decoder: a Hugging Face directory, or shipped:NAME.
      coprocessor: an exported coprocessor, a run, or shipped:NAME.
      workdir: a run: its coprocessor and its decoder.
      latents: answer with them; False is the frozen decoder. By default there
        are latents where there is a coprocessor.
      batch_size: contexts at a time.
      answerer: in place of all but `latents`.
      **ignored: what lm_eval gives to every model (device, max_batch_size).

    Raises:
      UserError: paths that do not fit together, or an unknown argument.
    """
    super().__init__()
    unknown = set(ignored) - {"device", "max_batch_size"}
    if unknown:
      raise UserError(f"model_args: {sorted(unknown)[0]!r} is no argument")
    if latents is not None:
      latents = str(latents).lower() not in ("false", "off", "0")
    if answerer is None:
      lm = open_lm(workdir, decoder, coprocessor, latents)
      answerer = Answerer(lm, latents=latents, batch=int(batch_size))
    self.answerer = answerer
    if latents is None:
      latents = AUGMENTED in answerer.columns
    self.column = AUGMENTED if latents else FROZEN
    self._tokenizer = answerer.lm.tokenizer
    self._chat = False
    # A context comes with each of its continuations, for each column.
    self._encoded = functools.lru_cache(1 << 14)(self._encode)

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    return _first(self._tokenizer.eos_id, self._tokenizer.named_bos_id)

  @property
  def prefix_token_id(self) -> int:
    """The token that stands for an empty context."""
    return _first(self._tokenizer.named_bos_id, self._tokenizer.eos_id)

  @property
  def tokenizer_name(self) -> str:
    """Identifies the mapping from text to tokens."""
    return self._tokenizer.name

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    """Tokens, a BOS first where the tokenizer has one."""
    if add_special_tokens is False and self._chat:
      return self._tokenizer.encode(string, parse_special=True)
    if add_special_tokens is False:
      return self._tokenizer.encode(string)
    return list(self._encoded(string))

  def _encode(self, text: str) -> tuple[int, ...]:
    if not self._chat:
      return tuple(self.answerer.lm.encode(text))
    ids = self._tokenizer.encode(text, parse_special=True)
    # As lm_eval's own class: a BOS where the template has spelled none.
    if not text.startswith(self._tokenizer.spell(self.prefix_token_id)):
      ids = [*self._tokenizer.prefix, *ids, *self._tokenizer.suffix]
    return tuple(ids)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The template that lm_eval notes among its results."""
    name = chat_template if isinstance(chat_template, str) else "default"
    templates = self._tokenizer.chat_templates
    return (templates.get(name) or "") if chat_template else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """The conversation in the model's own format.

    From then on, text that spells a special token means it.

    Raises:
      UserError: a decoder without a chat template.
    """
    if not self._chat:
      self._chat = True
      self._encoded.cache_clear()
    options = dict(
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )
    lm = self.answerer.lm
    try:
      return str(lm.render(chat_history, **options))
    except UserError:
      # As lm_eval's own class: some templates know no system message.
      without = [m for m in chat_history if m["role"] != "system"]
      if len(without) == len(chat_history):
        raise
      return str(lm.render(without, **options))

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """(log-probability in nats, every token the most likely) of each.

    Raises:
      UserError: a request that is all empty.
    """
    for context, continuation in (r.args for r in requests):
      if not continuation and not context:
        raise UserError(
          "a request has neither context nor continuation: its log-likelihood "
          "says nothing; mend the task's choices"
        )
      self.answerer.counts["empty"] += not context
    return super().loglikelihood(requests, disable_tqdm=True)

  def _encode_pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    """As lm_eval's, but for a continuation that melts into its context.

    "Ans" and "wer" may be the one token "Answer", of which nothing is left for
    the continuation.
    """
    both = super()._encode_pair(context, continuation)
    if both[1] or not continuation:
      return both
    self.answerer.counts["melted"] += 1
    return both[0], self.tok_encode(continuation, add_special_tokens=False)

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[Any, list[int], list[int]]],
    disable_tqdm: bool = False,
    **_: Any,
  ) -> list[tuple[float, bool]]:
    answers = self.answerer.loglikelihoods(
      [
        (tuple(context), tuple(continuation))
        for _, context, continuation in requests
      ]
    )
    return self._hand_out("loglikelihood", [r[0] for r in requests], answers)

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of each text, in windows of the decoder's positions."""
    windows, owners = [], []
    for i, (text,) in enumerate(r.args for r in requests):
      for window in lm_eval_utils.get_rolling_token_windows(
        token_list=self._without_prefix(self.tok_encode(text)),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.answerer.max_length,
        context_len=1,
      ):
        before, scored = lm_eval_utils.make_disjoint_window(window)
        windows.append((tuple(before), tuple(scored)))
        owners.append(i)
    totals = [0.0] * len(requests)
    for i, answer in zip(owners, self.answerer.running(windows), strict=True):
      totals[i] += answer[self.column]
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def _without_prefix(self, ids: list[int]) -> list[int]:
    """A text's tokens without the BOS that its window brings already."""
    return ids[1:] if ids[:1] == [self.prefix_token_id] else ids

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Text after each prompt, up to a stop string."""
    answers = self.answerer.texts([self._request(*r.args) for r in requests])
    args = [r.args for r in requests]
    return self._hand_out("generate_until", args, answers)

  def _request(self, prompt: str, gen_kwargs: dict[str, Any]) -> Request:
    wanted = dict(normalize_gen_kwargs(gen_kwargs, _MAX_NEW_TOKENS))
    new, stop = wanted.pop("max_gen_toks"), wanted.pop("until")
    stop = [text for text in stop if text]  # None or "" ends nothing
    draw = wanted.pop("do_sample")
    wanted = {k: v for k, v in wanted.items() if v is not None}
    law = {k: wanted.pop(k) for k in ("top_k", "top_p") if k in wanted}
    law["temperature"] = float(wanted.pop("temperature", 1.0))
    for key, value in sorted(wanted.items()):
      if key not in _NEUTRAL:
        raise UserError(f"generation_kwargs: {key!r} is not known")
      if value != _NEUTRAL[key]:
        raise UserError(
          f"generation_kwargs: {key}={value!r} is not supported, only "
          f"{_NEUTRAL[key]!r}, which does nothing"
        )
    sampling = Sampling(**law) if draw else Sampling()
    ids = self.tok_encode(prompt) or [self.prefix_token_id]
    # Spelled out, too: a small model may write it letter by letter.
    eos = self._tokenizer.eos_id
    stop += [] if eos is None else [self._tokenizer.spell(eos)]
    return Request(tuple(ids), new, tuple(stop), sampling)

  def _hand_out(
    self, kind: str, args: Sequence[Any], answers: Sequence[dict[str, Any]]
  ) -> list[Any]:
    """The column's own, entered into lm_eval's cache where it keeps one."""
    mine = [answer[self.column] for answer in answers]
    for arg, answer in zip(args, mine, strict=True):
      if arg is not None:
        self.cache_hook.add_partial(kind, arg, answer)
    return mine


def _first(*ids: int | None) -> int:
  for token in ids:
    if token is not None:
      return token
  raise UserError(
    "the tokenizer has neither a BOS nor an EOS, which an empty context needs"
  )
