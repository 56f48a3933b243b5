"""Text with a trained coprocessor, from transformers' own `generate`.

  model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)

DIR holds this file and the coprocessor's weights; nothing else is needed beside
torch, transformers and safetensors. At the prompt's end the coprocessor reads
the decoder's key-value cache and computes N latents, which the decoder reads
before it goes on (arXiv 2412.17747). Sampling, streamers, logits processors and
stopping criteria are those of transformers. Further arguments:

  latents=False    plain generate, without the coprocessor
  check=False      take a decoder whose weights are not bit for bit those that
                   the coprocessor was trained for (another precision)
  coprocessor=DIR  the weights, if not where custom_generate says

`prompt_embeds` gives the rows that a server takes in place of the prompt.
Axes: B sequences, S prompt tokens, N latents, T cache entries, D width.
"""

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import pathlib
import sys
import weakref
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.utils import cached_file

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56):
  # Before, generate took no function as custom_generate.
  raise ImportError("a coprocessor needs transformers 4.56 or newer")

_REFUSED = ("inputs_embeds", "cache", "past_key_values", "assistant_model")
_REFUSED += ("return_dict_in_generate",)
_opened = weakref.WeakKeyDictionary()  # model -> (which, Coprocessor)


@dataclasses.dataclass
class Coprocessor:
  """An exported directory, read for one decoder."""

  config: dict  # config.json
  network: torch.nn.Module | None  # of the decoder's class; a pause has none
  tensors: dict[str, Tensor]  # soft_tokens [N, D] and the like
  scale: float  # what the decoder multiplies inputs_embeds by
  harmless: bool  # the latents begin as the context's last tokens
  replace: bool  # they stand in the place of these


def generate(
  model: PreTrainedModel,
  *,
  latents: bool = True,
  coprocessor: str | None = None,
  check: bool = True,
  **kwargs: Any,
) -> Tensor:
  """`model.generate(**kwargs)`, with latents at the prompts' ends."""
  if latents:
    if asked := [key for key in _REFUSED if kwargs.get(key)]:
      raise ValueError(f"{asked[0]} with latents is not supported")
    opened = open_coprocessor(model, coprocessor, check)
    bound = {"coproc": opened, "streamer": kwargs.get("streamer")}
    kwargs["custom_generate"] = functools.partial(_decode, **bound)
  return model.generate(**kwargs)


def prompt_embeds(
  model: PreTrainedModel,
  ids: Tensor,  # [B, S]
  mask: Tensor | None = None,  # [B, S], 0 = padding
  *,
  coprocessor: str | None = None,
  check: bool = True,
  scaled: bool = True,
) -> Tensor:
  """Rows [B, S, D] in place of a prompt; with 'insert' [B, S + N, D].

  The embeddings of the tokens that stay, then the latents: `inputs_embeds` of
  this model. With scaled=False without Gemma's multiplier of embeddings, for
  programs that multiply whatever they are sent.
  """
  coproc = open_coprocessor(model, coprocessor, check)
  z = augment(model, coproc, ids, mask)[-1]
  if z is None:
    kind = coproc.config["kind"]
    raise ValueError(f"kind {kind!r} hands over keys, no rows: use generate")
  stay = ids[:, : -z.shape[1]] if coproc.replace else ids
  rows = torch.cat([_embed(model, coproc, stay), z], dim=1) / coproc.scale
  multiplier = getattr(model.get_input_embeddings(), "embed_scale", 1.0)
  return rows if scaled else rows / multiplier


# --- the exported directory -------------------------------------------------


def open_coprocessor(
  model: PreTrainedModel, directory: str | None = None, check: bool = True
) -> Coprocessor:
  """Reads an export for a decoder, once."""
  directory = directory or _directory()
  path = {
    name: pathlib.Path(cached_file(directory, name))
    for name in ("config.json", "coprocessor.safetensors")
  }
  key = directory, check, model.dtype, model.device
  key += tuple(p.stat().st_mtime_ns for p in path.values())
  if _opened.get(model, (None,))[0] == key:
    return _opened[model][1]
  config = {"kind": "coprocessor", "rounds": 1, "stride": 0, "window": 0}
  config |= json.loads(path["config.json"].read_text())
  asked = [f"traces.{key}" for key in ("stride", "window") if config[key]]
  asked += ["positions 'overlay'"] if config["positions"] == "overlay" else []
  if asked:
    raise ValueError(f"{directory}: {asked[0]} is not possible in transformers")
  table = cached_file(directory, "custom_generate/decoder.json")
  table = json.loads(pathlib.Path(table).read_text())
  found, ours = fingerprint(model, table, check), config["decoder_fingerprint"]
  if check and found != ours:
    raise ValueError(
      f"{directory}: trained for decoder {ours} ({config['source']}), this one "
      f"is {found}; load that decoder, or give check=False"
    )
  coproc = _read(model, config, load_file(path["coprocessor.safetensors"]))
  _opened[model] = key, coproc
  return coproc


def _directory():
  """What custom_generate says: our caller knows it and does not pass it on."""
  frame = sys._getframe(1)
  while frame := frame.f_back:
    where = frame.f_locals.get("custom_generate")
    if frame.f_code.co_name == "generate" and isinstance(where, str):
      return where
  return str(pathlib.Path(__file__).resolve().parent.parent)


def _read(model, config, tensors):
  decoder, network = model.get_decoder(), None
  tensors = {k: x.to(model.device, model.dtype) for k, x in tensors.items()}
  body = [k for k in tensors if k.startswith("model.")]
  body = {k.removeprefix("model."): tensors.pop(k) for k in body}
  if body:
    shape = copy.deepcopy(decoder.config)
    shape.vocab_size, shape.pad_token_id = 1, None  # it embeds no tokens
    network = AutoModel.from_config(shape, attn_implementation="eager")
    body["embed_tokens.weight"] = network.embed_tokens.weight
    body.setdefault("norm.weight", network.norm.weight)  # handover has none
    network.load_state_dict(body, assign=True)
    network = network.to(model.device).eval().requires_grad_(False)
  # Since transformers 5 only embeddings are multiplied, by their own class.
  inside = config["model"]["model_type"] in ("gemma", "gemma2")
  inside &= not hasattr(decoder.embed_tokens, "embed_scale")
  scale = torch.tensor(decoder.config.hidden_size**0.5, dtype=model.dtype)
  harmless, replace = config["start"] == "harmless", config["positions"]
  args = float(scale) if inside else 1.0, harmless, replace == "replace"
  return Coprocessor(config, network, tensors, *args)


def fingerprint(model: PreTrainedModel, table: list, sums: bool = True) -> str:
  """12 digits of the decoder's weights in bfloat16, as in config.json.

  `table` lists [our name, shape, tensor's name with {} for the layer]; without
  `sums` only shapes are compared.
  """
  weights = dict(model.named_parameters(remove_duplicate=False))
  totals = []
  for path, shape, name in table:
    total = place = 0
    layers = shape[0] if "{}" in name else 1
    for i in range(layers):
      x, size = weights.get(name.format(i)), math.prod(shape) // layers
      if x is None or x.numel() != size:
        raise ValueError(
          f"another decoder: its {name.format(i)} has "
          f"{'no' if x is None else x.numel()} elements, not {size}"
        )
      x = x.detach().T if path.endswith("/kernel") else x.detach()
      for part in x.bfloat16().reshape(-1).split(2**24) if sums else ():
        at = torch.arange(place, place + len(part), device=x.device) % 2**32
        odd = 2 * (at * 2654435761 ^ at >> 15) + 1  # its low 32 bits count
        words = part.view(torch.int16).long() & 0xFFFF
        total += int((words * (odd & 0xFFFFFFFF) & 0xFFFFFFFF).sum())
        place += len(part)
    totals.append(total % 2**32)
  text = json.dumps([[[path, *shape] for path, shape, _ in table], totals])
  return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- passes -----------------------------------------------------------------


@torch.no_grad()
def augment(
  model: PreTrainedModel,
  coproc: Coprocessor,
  ids: Tensor,  # [B, S]
  mask: Tensor | None = None,  # [B, S], 0 = padding
) -> tuple[Tensor, DynamicCache, Tensor, Tensor | None]:
  """Logits [B, V] after N latents, the cache, its mask [B, T], z [B, N, D].

  z is None where the latents are keys and values.
  """
  kind, n = coproc.config["kind"], coproc.config["latents"]
  mask = torch.ones_like(ids) if mask is None else mask.to(ids)
  _check_prompts(mask, n if coproc.harmless or coproc.replace else 1)
  cache = DynamicCache()  # sliding layers keep all: the mask has the window
  states = _run(model.get_decoder(), cache, mask, input_ids=ids)[0]  # [B, S, D]
  copied = _embed(model, coproc, ids[:, -n:])
  x = coproc.tensors.get("soft_tokens", torch.zeros(1).to(copied))
  x = copied + x if coproc.harmless else x.expand(len(ids), n, -1)
  if kind in ("handover", "prefix"):
    mask = _hand_over(model, coproc, cache, mask, x)
    # The last token again, where the last latent stands; it leaves no entry.
    x, at = copied[:, -1:], _ends(mask, 1)
    out = _rows(model, coproc, cache, mask, x, at, sees_itself=False)
    cache.crop(-1)
    return out.logits[:, -1], cache, mask, None
  for _ in range(coproc.config["rounds"]):
    z, read = x, cache
    if kind == "activations":  # it reads hidden states, into its own cache
      read, rows = DynamicCache(), states / coproc.scale
      _run(coproc.network, read, mask, inputs_embeds=rows)
    if kind != "pause":
      at = _ends(mask, n, 0 if coproc.replace else n)
      z = _rows(coproc.network, coproc, read, mask, x, at)[0]
      read.crop(-n)
      if coproc.harmless:
        z = copied + z @ coproc.tensors["latent_projection"]
    mask = _longer(_hide(cache, mask, n) if coproc.replace else mask, n)
    out = _run(model, cache, mask, inputs_embeds=z / coproc.scale)
  return out.logits[:, -1], cache, mask, z


def _check_prompts(mask, least):
  if (mask[:, 1:] < mask[:, :-1]).any() or not mask[:, -1].all():
    raise ValueError(
      "attention_mask: a prompt is padded on the right, where its latents "
      "stand; use tokenizer.padding_side = 'left'"
    )
  if (shortest := int(mask.sum(1).min())) < least:
    raise ValueError(
      f"a prompt of {shortest} tokens is too short: its latents need {least}; "
      "lengthen it, or give latents=False"
    )


def _embed(model, coproc, ids):
  return model.get_input_embeddings()(ids) * coproc.scale


def _positions(mask):
  return (mask.cumsum(1) - 1).clamp(min=0)


def _ends(mask, n, shift=0):
  """[B, N] positions of the last N entries, moved by `shift`."""
  return _positions(mask)[:, -1:] + torch.arange(1 - n, 1).to(mask) + shift


def _longer(mask, rows):
  return torch.cat([mask, mask.new_ones(len(mask), rows)], dim=1)


def _hide(cache, mask, n):
  """Removes the last N entries of a cache; the mask of the others."""
  cache.crop(-n)
  return mask[:, :-n]


@functools.lru_cache
def _arguments(kind):
  """A model class's name for its cache, and what spares it logits."""
  names = inspect.signature(kind.forward).parameters
  keep = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
  return "cache" if "cache" in names else "past_key_values", keep


def _run(module, cache, mask, at=None, **rows):
  """Runs further rows over a cache, which keeps them; mask [B, T + rows]."""
  name, keep = _arguments(type(module))
  if at is None:
    at = _positions(mask)[:, -next(iter(rows.values())).shape[1] :]
  rows |= {"attention_mask": mask, "position_ids": at, name: cache}
  return module(use_cache=True, **rows, **keep)


def _rows(module, coproc, cache, mask, x, at, sees_itself=True):
  """Runs rows [B, R, D] at positions [B, R], which the cache may have too.

  They see the cache and each other causally. Windows are of positions here,
  while the masks of transformers count entries.
  """
  block = torch.ones(at.shape[1], at.shape[1]).tril().bool().to(x.device)
  seen = mask.bool()[:, None].expand(-1, at.shape[1], -1)
  seen = torch.cat([seen, (block & sees_itself).expand(len(x), -1, -1)], dim=2)
  back = at[..., None] - torch.cat([_positions(mask), at], dim=1)[:, None]
  window = getattr(module.config, "sliding_window", None) or 2**30
  full, near = (  # [B, 1, R, T + R]
    torch.where(see, 0.0, torch.finfo(x.dtype).min).to(x.dtype)[:, None]
    for see in (seen, seen & (back < window))
  )
  kinds = getattr(module.config, "layer_types", None)
  if kinds is None:  # all layers are alike
    masks = near
  else:
    masks = {"full_attention": full, "sliding_attention": near}
    masks = masks if "sliding_attention" in kinds else full
  return _run(module, cache, masks, at, inputs_embeds=x / coproc.scale)


def _hand_over(model, coproc, cache, mask, x):
  """Gives every layer N keys and values; the mask of what it then has."""
  n, hide = coproc.config["latents"], coproc.replace
  shift = 0 if hide else n
  if coproc.config["kind"] == "handover":
    if hide and coproc.harmless:  # begins as the hidden entries, sees no more
      mask, hide, shift = _hide(cache, mask, n), False, n
    _rows(coproc.network, coproc, cache, mask, x, _ends(mask, n, shift))
    new = [(y.keys[..., -n:, :], y.values[..., -n:, :]) for y in cache.layers]
    cache.crop(-n)
  else:
    rotate, new = functools.partial(_rotate, model.get_decoder()), []
    both = (coproc.tensors[f"prefix_{name}"] for name in ("keys", "values"))
    for i, (k, v) in enumerate(zip(*both, strict=True)):  # [N, heads, head dim]
      k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
      k = rotate(i, k, _ends(mask, n, shift))
      if coproc.harmless:  # added to the last entries, moved to the latents
        layer = cache.layers[i]
        moved, last = (
          torch.full_like(mask[:, :n], shift),
          layer.keys[..., -n:, :],
        )
        k = k + rotate(i, last, moved, again=True)
        v = v + layer.values[..., -n:, :]
      new.append((k, v.expand_as(k)))
  mask = _hide(cache, mask, n) if hide else mask
  for i, (k, v) in enumerate(new):
    cache.update(k, v, i)
  return _longer(mask, n)


def _rotate(decoder, layer, x, at, again=False):
  """RoPE of a layer on x [B, heads, N, head dim] by positions [B, N].

  With `again` of keys that have been rotated, and so scaled, before.
  """
  if not getattr(decoder.layers[layer].self_attn, "use_rope", True):
    return x
  kinds = getattr(decoder.config, "layer_types", None)
  args = (kinds[layer],) if kinds else ()
  rope = decoder.rotary_emb
  if "sliding_attention" in args:  # Gemma 3 before transformers 5
    rope = getattr(decoder, "rotary_emb_local", rope)
  if "layer_type" not in inspect.signature(rope.forward).parameters:
    args = ()
  cos, sin = rope(x, at, *args)
  a, b = x.chunk(2, dim=-1)
  out = x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]
  return out / getattr(rope, "attention_scaling", 1.0) if again else out


def _decode(model, input_ids, *, coproc, streamer, **given):
  """Decodes after the latents: the loop within generate, which calls it."""
  settings, ids = given["generation_config"], input_ids
  mode = settings.get_generation_mode().value
  if mode not in ("greedy_search", "sample"):
    raise ValueError(f"{mode} with latents is not supported")
  mask = given.get("attention_mask")
  logits, cache, mask, _ = augment(model, coproc, ids, mask)
  pad, eos = settings.pad_token_id, settings.eos_token_id
  if pad is None:
    pad = eos[0] if isinstance(eos, list) and eos else eos or 0
  going = torch.ones_like(ids[:, 0])
  while True:
    scores = given["logits_processor"](ids, logits.float())
    if settings.do_sample:
      token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
    else:
      token = scores.argmax(-1)
    token = token * going + pad * (1 - going)
    ids = torch.cat([ids, token[:, None]], dim=1)
    if streamer is not None:
      streamer.put(token.cpu())
    going = going * (~given["stopping_criteria"](ids, ())).long()
    if not going.any():
      break
    mask = _longer(mask, 1)
    out = _run(model, cache, mask, input_ids=token[:, None])
    logits = out.logits[:, -1]
  if streamer is not None:
    streamer.end()
  return ids
