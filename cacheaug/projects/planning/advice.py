"""Suggests keys to change where a step does not fit, with the bytes saved."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from cacheaug import validate
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.projects.planning import memory


@dataclasses.dataclass(frozen=True)
class Suggestion:
  """A change of keys, the bytes it leaves a device with, whether they fit."""

  keys: str  # as on the command line, without --config.
  saves: float
  total: float
  fits: bool
  same_result: bool  # False where the experiment becomes another one


def suggestions(
  config: ConfigDict,
  model_config: ModelConfig,
  devices: int,
  *,
  temporaries: float,
  others: float,
  limit: float,
) -> list[Suggestion]:
  """For each key that helps the smallest change that fits, else the largest.

  Where no key alone is enough, the last is all of them that keep the result.

  Args:
    config: that does not fit.
    model_config: the decoder's.
    devices: in all.
    temporaries: bytes that a step makes on a device, the compiler's where
      it was asked.
    others: bytes that no key changes (code).
    limit: bytes that a device has.
  """
  before = memory.arithmetic(config, model_config, devices)
  # As much more or less than the shapes say as the compiler found here.
  scale = temporaries / before.temporaries
  total = before.arguments + temporaries + others
  found, best = [], {}

  def judge(changes: dict[str, Any], same: bool) -> Suggestion | None:
    changed = _changed(config, changes)
    try:
      validate.check_config(changed, devices)
      after = memory.arithmetic(changed, model_config, devices)
    except UserError:
      return None
    new = after.arguments + scale * after.temporaries + others
    keys = " ".join(f"{k}={v}" for k, v in changes.items())
    return Suggestion(keys, total - new, new, new <= limit, same)

  for same, choices in _candidates(config):
    last = None
    for changes in choices:
      suggestion = judge(changes, same)
      if suggestion and suggestion.saves > 0:
        last = suggestion
        if same:
          best |= changes
        if suggestion.fits:
          break
    if last:
      found.append(last)
  found.sort(key=lambda r: (not r.same_result, not r.fits, -r.saves))
  if len(best) > 1 and not any(r.fits and r.same_result for r in found):
    together = _together(config, best, devices, judge)
    if together:
      found.append(together)
  return found


def _together(config, best, devices, judge) -> Suggestion | None:
  """All of them at once, with as much accumulation as the new mesh divides."""
  while True:
    suggestion = judge(best, True)
    k = best.get("optimizer.accumulation", 1)
    if suggestion or k <= config.optimizer.accumulation:
      return suggestion
    best = best | {"optimizer.accumulation": k // 2}


def _candidates(
  config: ConfigDict,
) -> Iterator[tuple[bool, list[dict[str, Any]]]]:
  """(whether the result stays the same, changes from small to large)."""
  rest = {} if config.mesh.data == -1 else {"mesh.data": -1}
  order = tuple(transformer.REMAT_POLICIES)  # from much to little kept
  later = order[order.index(config.remat) + 1 :]
  yield True, [{"remat": policy} for policy in later]
  twice = [2**i for i in range(1, 11)]
  k, fsdp = config.optimizer.accumulation, config.mesh.fsdp
  yield True, [{"optimizer.accumulation": k * n} for n in twice]
  yield True, [{"mesh.fsdp": fsdp * n} | rest for n in twice]
  if config.precision.decoder != "bfloat16":
    yield True, [{"precision.decoder": "bfloat16"}]
  batch, count = config.data.batch, config.traces.count
  yield False, [{"data.batch": batch // n} for n in twice if batch % n == 0]
  if config.objective == "coprocessor":
    yield (
      False,
      [{"traces.count": count // n} for n in (2, 8) if count % n == 0],
    )
  if config.optimizer.average:
    yield False, [{"optimizer.average": 0.0}]


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  config = ConfigDict(config.copy_and_resolve_references())
  for key, value in changes.items():
    *parents, name = key.split(".")
    inner = config
    for parent in parents:
      inner = inner[parent]
    inner[name] = value
  return config
