"""One training step as many would write it today, against this package's.

  python benchmarks/torch_peer.py [--config=configs/benchmark.py] [--repeats=5]

PyTorch and transformers (the `parity` extra), AdamW, logits of every row of a
trace, also of those that predict nothing.
`extended` runs context and all traces' rows as one sequence under one 4-D mask
in the decoder's pass, as the paper's section 2.3 reads; `cached` keeps the
frozen decoder's cache for it. Same weights, tokens and points, so the same
loss, which is checked; all are run in turns, and the matrix products of a
layer and of the head alone between them. With `--config.decoder.path` the
weights are that decoder's and the tokens the first batch of the config's data,
otherwise both are random.
"""

import copy
import os
import statistics
import tempfile
import time
from typing import Any

# Else PyTorch's idle threads spin while the other's steps are timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from ml_collections import config_flags
from torch import Tensor
from transformers import DynamicCache

from cacheaug import benchmark, build, flops, sharding
from cacheaug import config as configs
from cacheaug import step as stepping
from cacheaug.augment import traces
from cacheaug.augment.traces import Layout
from cacheaug.data import opening
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.run import command
from cacheaug.weights import huggingface

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/benchmark.py", "experiment file"
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "turns of a few timed steps", lower_bound=1
)

HIDDEN = -1e30
# transformers 5.24 calls it `cache`; before, `cache` would be ignored.
CACHE = (
  "cache"
  if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
  else "past_key_values"
)
Laid = dict[str, Any]  # of traces.Traces, as tensors


class Peer:
  """The coprocessor, its soft tokens and its optimizer in PyTorch."""

  def __init__(
    self,
    decoder: transformers.PreTrainedModel,
    params: Params,
    spec: Layout,
    learning_rate: float,
  ) -> None:
    self.decoder = decoder.eval().requires_grad_(False)
    self.coprocessor = copy.deepcopy(self.decoder.model).float()
    # In training mode transformers drops nothing here: all rates are 0.
    self.coprocessor.requires_grad_(True).embed_tokens.requires_grad_(False)

    def own(x):
      x = torch.tensor(np.array(x), device=decoder.device)
      return torch.nn.Parameter(x)

    self.soft = own(params["soft_tokens"])
    self.projection = own(params["latent_projection"])
    trained = [p for p in self.coprocessor.parameters() if p.requires_grad]
    trained += [self.soft, self.projection]
    self.optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    self.spec = spec

  def step(self, tokens: Tensor, laid: Laid, extended: bool) -> float:
    """One update; the loss before it."""
    loss = self.loss(tokens, laid, extended)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.optimizer.step()
    return float(loss.detach())

  def loss(self, tokens: Tensor, laid: Laid, extended: bool) -> Tensor:
    """Mean nll of the ahead tokens."""
    _, m, r = laid["rows"]["positions"].shape
    with torch.no_grad():
      past = DynamicCache()  # of a config it would keep windows alone
      self.decoder.model(tokens, use_cache=True, **{CACHE: past})
      copied = self.decoder.model.embed_tokens(laid["copied"])
      ahead = self.decoder.model.embed_tokens(laid["ahead"])
    hidden = self.run(
      self.coprocessor, self.soft + copied, past, laid["latent_rows"]
    )
    z = copied + hidden.reshape(copied.shape) @ self.projection
    x = torch.cat([z, ahead], 2)
    if extended:
      hidden = self.run_extended(tokens, x, laid["rows"])
    else:
      hidden = self.run(self.decoder.model, x, past, laid["rows"])
    nll = self.nll(hidden[:, -m * r :].unflatten(1, (m, r)), laid["targets"])
    return (nll * laid["weights"]).sum() / laid["weights"].sum()

  def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of the targets [B, M, A], which the last A of R rows predict."""
    logits = self.logits(hidden)[:, :, -targets.shape[2] :]
    return torch.nn.functional.cross_entropy(
      logits.flatten(0, 2), targets.flatten(), reduction="none"
    ).reshape(targets.shape)

  def logits(self, hidden: Tensor) -> Tensor:
    """Soft-capped where the decoder's are."""
    logits = self.decoder.lm_head(hidden)
    cap = getattr(self.decoder.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits

  def run(
    self, model: torch.nn.Module, x: Tensor, past: DynamicCache, rows: Laid
  ) -> Tensor:
    """All traces' rows [B, M R, D] over a copy of the cache."""
    cache = DynamicCache()
    for i, layer in enumerate(past.layers):
      cache.update(layer.keys, layer.values, i)
    return model(
      inputs_embeds=x.flatten(1, 2),
      position_ids=rows["positions"].flatten(1),
      attention_mask=self.masks(rows, past.get_seq_length()),
      use_cache=True,
      **{CACHE: cache},
    ).last_hidden_state

  def masks(self, rows: Laid, s: int) -> Any:
    """For all layers; windows are longer than S here."""
    return self.for_layers(self.mask(rows, s))

  def for_layers(self, mask: Tensor) -> Any:
    """By kind of layer, where the decoder has kinds."""
    if not getattr(self.decoder.config, "layer_types", None):
      return mask
    return {"full_attention": mask, "sliding_attention": mask}

  def run_extended(self, tokens: Tensor, x: Tensor, rows: Laid) -> Tensor:
    """Context and all traces' rows [B, M R, D] as one sequence."""
    s = tokens.shape[1]
    context = self.decoder.model.embed_tokens(tokens)
    at = torch.arange(s).expand(len(tokens), -1)
    traces_see = self.mask(rows, s)
    context_sees = torch.full((len(tokens), 1, s, traces_see.shape[-1]), HIDDEN)
    context_sees[..., :s] = torch.triu(torch.full((s, s), HIDDEN), 1)
    mask = torch.cat([context_sees, traces_see], 2)
    return self.decoder.model(
      inputs_embeds=torch.cat([context, x.flatten(1, 2)], 1),
      position_ids=torch.cat([at, rows["positions"].flatten(1)], 1),
      attention_mask=self.for_layers(mask),
      use_cache=False,
    ).last_hidden_state

  @staticmethod
  def mask(rows: Laid, s: int) -> Tensor:
    """Additive [B, 1, M R, S + M R]."""
    b, m, r = rows["positions"].shape
    limits = rows["limits"].expand(b, m, r).flatten(1)
    context = torch.arange(s) <= limits[..., None]
    index = torch.arange(m * r)
    same = index[:, None] // r == index // r
    own = (same & (index[:, None] >= index)).expand(b, -1, -1)
    seen = torch.cat([context, own], -1)[:, None]
    return torch.where(seen, 0.0, HIDDEN)


def to_torch(tree: Any) -> Any:
  """A tree of arrays as tensors; whole numbers as PyTorch wants them."""
  if isinstance(tree, dict):
    return {key: to_torch(value) for key, value in tree.items()}
  x = np.array(tree)
  return torch.tensor(x.astype(np.int64) if x.dtype.kind == "i" else x)


def laid_out(config: Any, batch: dict[str, Any]) -> Laid:
  """The step's traces, as the peer takes them."""
  key = jax.random.key(config.seed)
  points = stepping.add_points(config, batch, key, 0)["points"]
  laid = traces.layout_traces(
    batch["tokens"], batch["documents"], points, configs.layout_of(config)
  )

  def rows(x):
    return {"positions": x.positions, "limits": x.context_limit}

  return to_torch(
    {
      "rows": rows(laid.rows),
      "latent_rows": rows(laid.latent_rows),
      "copied": laid.input_tokens,
      "ahead": laid.ahead,
      "targets": laid.targets,
      "weights": laid.weights,
    }
  )


def first_batch(config: Any, model: Any, mesh: Any) -> dict[str, Any]:
  """The first batch of a run of this config; random for a random decoder."""
  if not config.decoder.path:
    return benchmark.random_batch(config, model, mesh)
  _, tokenizer = build.open_model(config, mesh)
  batches = opening.open_batches(
    config.data,
    tokenizer,
    split="train",
    seed=config.seed,
    process_index=0,
    process_count=1,
  )
  batch = next(batches.iterate(0, retries=0))
  return sharding.put_global(batch, sharding.batch_sharding(mesh))


class Products:
  """The matrix products of one layer and of the head alone, in float32."""

  def __init__(self, config: ModelConfig, rows: int, heads_rows: int) -> None:
    c, kv = config, config.kv_heads * config.head_dim
    q = c.heads * c.head_dim
    shapes = [(rows, c.width, q), (rows, q, c.width)]
    shapes += 2 * [(rows, c.width, kv)] + 2 * [(rows, c.width, c.mlp_width)]
    shapes += [(rows, c.mlp_width, c.width)]
    # As many as one head's are worth beside all layers'.
    self.shapes = c.layers * shapes + [(heads_rows, c.width, c.vocab_size)]
    draw = np.random.default_rng(0)
    self.arrays = {
      shape: tuple(
        jnp.asarray(draw.standard_normal(size, np.float32))
        for size in (shape[:2], shape[1:])
      )
      for shape in set(self.shapes)
    }
    self.product = jax.jit(jnp.matmul)

  def speed(self) -> float:
    """FLOP a second of all of them, once."""
    began = time.perf_counter()
    for shape in self.shapes:
      jax.block_until_ready(self.product(*self.arrays[shape]))
    seconds = time.perf_counter() - began
    return sum(2 * a * b * c for a, b, c in self.shapes) / seconds


def main() -> None:
  """Measures all in turns and prints the ratios."""
  config = configs.resolve(
    _CONFIG.value,
    given=config_flags.get_override_values(flags.FLAGS["config"]),
  )
  mesh = sharding.make_mesh(config.mesh)
  config.optimizer.learning_rate = 1e-12  # all go on from one state
  made = benchmark.prepare(config, mesh)
  shape = made.model.config
  batch = first_batch(config, made.model, mesh)
  key, reset = jax.random.key(config.seed), np.bool_(False)
  step = stepping.make_step(
    config, made.model, made.optimizer, mesh, made.shardings
  )
  state = made.state
  with tempfile.TemporaryDirectory() as directory:
    huggingface.save(directory, shape, made.decoder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    # Gemma 2 has a soft cap, which transformers' other kernels do not take.
    kernel = "eager" if shape.family == "gemma2" else "sdpa"
    decoder = load(directory, attn_implementation=kernel, dtype=torch.float32)
    layout = configs.layout_of(config)
    peer = Peer(decoder, state.params, layout, 1e-12)
  laid = laid_out(config, batch)
  tokens = to_torch(batch["tokens"])
  traces_, latents = config.data.batch * config.traces.count, layout.latents
  products = Products(
    shape,
    rows=traces_ * (latents + layout.ahead - 1),
    heads_rows=traces_ * layout.ahead,
  )
  products.speed()
  times = {"cacheaug": [], "torch cached": [], "torch extended": []}
  alone = []
  for turn in range(_REPEATS.value):
    alone += [products.speed() for _ in range(benchmark.STEPS)]
    for i in range(1 + benchmark.STEPS):
      began = time.perf_counter()
      state, metrics = step(state, made.decoder, batch, key, reset)
      jax.block_until_ready((state, metrics))
      if i:
        times["cacheaug"].append(time.perf_counter() - began)
      if not turn and not i:
        ours = float(metrics["loss"])
      zero = jax.device_put(jnp.int32(0), made.shardings.step)
      state = state.replace(step=zero)
    for extended, name in enumerate(list(times)[1:]):
      for i in range(1 + benchmark.STEPS):
        began = time.perf_counter()
        theirs = peer.step(tokens, laid, extended)
        if i:
          times[name].append(time.perf_counter() - began)
        elif not turn:
          assert abs(ours - theirs) < 1e-3, f"{ours} and {theirs} differ"
          print(f"loss: cacheaug {ours:.5f}, {name} {theirs:.5f}", flush=True)
  median = {name: statistics.median(x) for name, x in times.items()}
  gflop = flops.of_step(config, shape).total / 1e9
  speed = statistics.median(alone) / 1e9
  print(
    f"torch {torch.__version__}, {torch.get_num_threads()} threads, attention "
    f"{kernel}; matrix products alone {speed:.1f} GFLOP/s"
  )
  for name, seconds in median.items():
    print(
      f"{name:15} {1e3 * seconds:8.1f} ms a step, "
      f"{gflop / seconds:6.1f} useful GFLOP/s "
      f"({100 * gflop / seconds / speed:3.0f} % of the products'), "
      f"{seconds / median['cacheaug']:5.2f} x"
    )


if __name__ == "__main__":
  command.run(main, __doc__)
