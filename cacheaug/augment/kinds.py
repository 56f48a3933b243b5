"""The kinds of coprocessor: one table.

  coprocessor  the paper's: a network reads the decoder's cache with N soft
               tokens, and its last hidden states are the latents.

The other kinds are what it is compared with:

  activations  the same network, but the cache that its rows read is its own:
               it reads the decoder's last hidden states [B, S, D] as input
               embeddings. Gradients go through that pass too.
  pause        no network: the soft tokens are the latents.
  handover     keys and values of the network's rows, of all layers, stand in
               the latents' slots of the decoder's cache. Of the network's last
               layer only what makes keys and values is trained.
  prefix       no network: trained keys and values [L, N, K, E] stand there.

A new kind needs: a row here; parameters in `coprocessor.init_boxed`; its
computation in `coprocessor.hidden_states` and `project` (latents that are
embeddings) or in `kv_latents.latent_kv` (keys and values); its cost in
flops.py; a line in weights/transformers_files.py. A feature that its row does
not list is refused by `Kind.check`.
"""

import enum
from collections.abc import Mapping
from typing import Any

from cacheaug.errors import UserError

_WHOLE = ("blocks", "final_norm")

# Features that only some kinds support, with the message for the others.
_REFUSALS = {
  "late": (
    "coprocessor.kind={kind!r} knows no late latents (only {able} do): set "
    "traces.late_max=0, ask for none"
  ),
  "scratch": (
    "coprocessor.init='scratch': coprocessor.kind={kind!r} has no network that "
    "could begin so; leave it 'decoder'"
  ),
  "rounds": (
    "traces.rounds={rounds}: coprocessor.kind={kind!r} knows one round only; "
    "set it to {able}, or the rounds to 1"
  ),
  "background": (
    "coprocessor.kind={kind!r}: the background runs kind {able} alone; insert "
    "latents at once (Session)"
  ),
  "store": (
    "coprocessor.kind={kind!r}: a store keeps neither hidden states nor what "
    "is hidden from the decoder; decode without one"
  ),
  "diagnostics": (
    "coprocessor.kind={kind!r}: diagnostics are of latents that are "
    "embeddings, this kind hands over keys and values; give --nodiagnostics"
  ),
  "labels": (
    "coprocessor.kind={kind!r} hands over keys and values, off which no head "
    "reads a label ({able} have rows): set supervision.weight=0"
  ),
  "labels_of_its_own": (
    "supervision.at='coprocessor': coprocessor.kind={kind!r} has no rows of "
    "its own ({able} do): set it to 'decoder'"
  ),
  "kv_bias": (
    "coprocessor.kv_bias: coprocessor.kind={kind!r} hands over no keys that "
    "could have a bias (only {able} do); set it to False"
  ),
  "dense": (
    "coprocessor.kind={kind!r}: there is no dense way to compute it; compare "
    "kind {able}"
  ),
}


# The `does` column of the table below: features, separated by spaces.
_COPROCESSOR_DOES = " ".join(key for key in _REFUSALS if key != "kv_bias")
_PAUSE_DOES = "store diagnostics labels"
_PREFIX_DOES = "kv_bias"
_HANDOVER_DOES = "scratch store kv_bias"
_ACTIVATIONS_DOES = "scratch late diagnostics labels labels_of_its_own"


class Kind(enum.StrEnum):
  """A kind by its name, the value of `coprocessor.kind`.

  network: the parts of a transformer that it trains; () for none.
  latents_are_kv: latents are keys and values for the decoder, not embeddings.
  reads_states: it reads the decoder's hidden states and not its cache.
  does: the features it supports, keys of _REFUSALS. Any other is refused with
    that key's message.
  """

  network: tuple[str, ...]
  latents_are_kv: bool
  reads_states: bool
  does: frozenset[str]

  # fmt: off
  #             name           network      kv     states does
  COPROCESSOR = "coprocessor", _WHOLE,      False, False, _COPROCESSOR_DOES
  PAUSE       = "pause",       (),          False, False, _PAUSE_DOES
  PREFIX      = "prefix",      (),          True,  False, _PREFIX_DOES
  HANDOVER    = "handover",    ("blocks",), True,  False, _HANDOVER_DOES
  ACTIVATIONS = "activations", _WHOLE,      False, True,  _ACTIVATIONS_DOES
  # fmt: on

  def __new__(
    cls,
    name: str,
    network: tuple[str, ...],
    latents_are_kv: bool,
    reads_states: bool,
    does: str,
  ) -> "Kind":
    """A row of the table."""
    kind = str.__new__(cls, name)
    kind._value_ = name
    kind.network, kind.does = network, frozenset(does.split())
    kind.latents_are_kv, kind.reads_states = latents_are_kv, reads_states
    return kind

  def __repr__(self) -> str:
    return repr(self.value)  # messages show what a config says

  @classmethod
  def of(cls, name: str) -> "Kind":
    """The kind of that name.

    Raises:
      UserError: there is none.
    """
    if name not in NAMES:
      raise UserError(
        f"coprocessor.kind={str(name)!r} is not one of {', '.join(NAMES)}"
      )
    return cls(name)

  def part(self, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a transformer's parameters that it trains; {} for none."""
    return {name: transformer[name] for name in self.network}

  @property
  def variant(self) -> str:
    """What latents are for the decoder, as an export's config.json says."""
    return "cache" if self.latents_are_kv else "embeddings"

  def check(self, feature: str, **numbers: Any) -> None:
    """Refuses a feature that this kind does not have.

    Args:
      feature: of the `does` column.
      numbers: what the refusal names.

    Raises:
      UserError: names the kind and the remedy.
    """
    if feature in self.does:
      return
    names = [kind.value for kind in Kind if feature in kind.does]
    able = repr(names[0])
    if len(names) > 1:
      able = f"{', '.join(names[:-1])} and {names[-1]}"
    text = _REFUSALS[feature]
    raise UserError(text.format(kind=self.value, able=able, **numbers))


NAMES = tuple(kind.value for kind in Kind)
