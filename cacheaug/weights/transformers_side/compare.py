"""An exported coprocessor in torch, beside what JAX computed with it.

  python compare.py DIR DECODER EXPECTED.npz

Needs torch, transformers and safetensors. EXPECTED.npz is what `expected` of
evals/torch_parity.py gives; DECODER is a directory of the hub's layout. Prints
a line for each comparison and ends with 1 if one of them fails.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
import transformers

# Float32 rounding through three passes; a row that sees one token too many or
# stands one position off gives 1e-2 and more.
TOLERANCE = 1e-4
# Between the two largest logits, where rounding may choose the other token.
GAP = 1e-3


class Forced(transformers.LogitsProcessor):
  """Makes generate say given tokens; keeps what it made of each."""

  def __init__(self, tokens: torch.Tensor):  # [B, A]
    self.tokens = tokens
    self.nll: list[torch.Tensor] = []  # [B] nats each
    self.gap: list[torch.Tensor] = []  # [B] logits below the largest

  def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores [B, V] that leave one token of each sequence."""
    token = self.tokens[:, len(self.nll), None]
    self.nll.append(-scores.log_softmax(-1).gather(1, token)[:, 0])
    self.gap.append(scores.max(-1).values - scores.gather(1, token)[:, 0])
    return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def compare(
  directory: str | pathlib.Path,
  decoder: str | pathlib.Path,
  expected: dict[str, np.ndarray],
) -> dict[str, tuple[str, bool]]:
  """What was compared -> (the largest difference, whether it is small).

  Args:
    directory: of the export.
    decoder: of its decoder, of the hub's layout, or a .gguf file.
    expected: of evals/torch_parity.py.

  Raises:
    ValueError: of generate.py.
  """
  decoder, options = pathlib.Path(decoder), {"attn_implementation": "eager"}
  if decoder.suffix == ".gguf":
    decoder, options["gguf_file"] = decoder.parent, decoder.name
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(str(decoder), **options)
  model = model.float().eval()
  settings = model.generation_config
  settings.eos_token_id, settings.pad_token_id = None, 0
  ids = torch.tensor(expected["prompts"]).long()
  mask = torch.tensor(expected["mask"]).long()
  ours = dict(custom_generate=str(directory), trust_remote_code=True)

  def generate(tokens, forced=None, **options):
    options = dict(do_sample=False) | options
    if "inputs_embeds" not in options:
      options |= dict(input_ids=ids, attention_mask=mask)
    if forced is not None:
      forced = transformers.LogitsProcessorList([forced])
    out = model.generate(
      **options,
      max_new_tokens=tokens,
      min_new_tokens=tokens,
      logits_processor=forced,
    )
    return out[:, -tokens:]

  def same(found, wanted):
    equal = bool((found == wanted).all())
    return f"{int((found == wanted).sum())} of {wanted.numel()}", equal

  def close(found, wanted):
    far = float((found - torch.tensor(wanted)).abs().max())
    return f"{far:.1e}", far < TOLERANCE

  rows = {}
  side = _module(directory)
  coproc = side.open_coprocessor(model, directory)
  if "z" in expected:
    z = side.augment(model, coproc, ids, mask)[-1]
    rows["z"] = close(z, expected["z"])
  ahead = torch.tensor(expected["ahead"]).long()
  forced = Forced(ahead)
  generate(ahead.shape[1], forced, **ours)
  rows["nll"] = close(torch.stack(forced.nll, dim=1), expected["nll"])
  if "tokens" not in expected:
    return rows
  wanted = torch.tensor(expected["tokens"]).long()
  count = wanted.shape[1]
  tokens = generate(count, **ours)
  rows["greedy tokens"] = same(tokens, wanted)
  if not rows["greedy tokens"][1]:
    forced = Forced(wanted)
    generate(count, forced, **ours)
    gap = float(torch.stack(forced.gap).max())
    text = f"{rows['greedy tokens'][0]}, by {gap:.1e} of a logit"
    rows["greedy tokens"] = text, gap < GAP
  plain = generate(count, **ours, latents=False)
  rows["latents=False"] = same(plain, generate(count))
  if "z" in expected:
    embeds = side.prompt_embeds(model, ids, mask, coprocessor=directory)
    more = mask.new_ones(len(mask), embeds.shape[1] - mask.shape[1])
    more = torch.cat([mask, more], dim=1)
    served = generate(count, inputs_embeds=embeds, attention_mask=more)
    rows["prompt_embeds"] = same(served, tokens)
  return rows


def _module(directory):
  path = pathlib.Path(directory) / "custom_generate" / "generate.py"
  spec = importlib.util.spec_from_file_location("custom_generate", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def main() -> None:
  """Prints the comparisons of three arguments."""
  directory, decoder, expected = sys.argv[1:]
  with np.load(expected) as arrays:
    rows = compare(directory, decoder, dict(arrays))
  for name, (text, good) in rows.items():
    print(f"{name:28} {text}{'' if good else '   FAILED'}")
  sys.exit(not all(good for _, good in rows.values()))


if __name__ == "__main__":
  main()
