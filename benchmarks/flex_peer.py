"""The training step in PyTorch, with FlexAttention's block masks.

A part of benchmarks/on_gpu.py. The peer is torch_peer.py's with a cache, but
attends through compiled FlexAttention, which skips the blocks that no row
sees; makes logits of the predicting rows alone, in chunks that are computed
again in the backward pass; and keeps bfloat16 products of float32 weights, as
the JAX step does. On a CPU, where FlexAttention has no backward pass, the same
mask is a dense one.
"""

import functools
import pathlib
import runpy
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import torch
import torch_peer
import transformers
from torch import Tensor
from torch.nn.attention import flex_attention
from torch_peer import Laid, Peer

from cacheaug import benchmark, flops, sharding
from cacheaug import config as configs
from cacheaug import step as steps
from cacheaug.weights import config_json, huggingface

_CHUNKS = 8  # of logits
_CLOSE = 5e-3  # nats; a GPU's float32 products are TF32's


class FlexPeer(Peer):
  """The coprocessor, trained through block masks."""

  def loss(self, tokens: Tensor, laid: Laid, extended: bool) -> Tensor:
    """Mean nll of the ahead tokens; products in the decoder's dtype."""
    device, dtype = self.decoder.device.type, self.decoder.dtype
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      return super().loss(tokens, laid, extended)

  def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
    """As Peer's, a chunk of traces at a time."""
    rows = hidden[:, :, -targets.shape[2] :]
    run = functools.partial(
      torch.utils.checkpoint.checkpoint, super().nll, use_reentrant=False
    )
    count = min(_CHUNKS, rows.shape[1])
    parts = zip(rows.chunk(count, 1), targets.chunk(count, 1), strict=True)
    return torch.cat([run(*part) for part in parts], 1)

  def masks(self, rows: Laid, s: int) -> dict[str, Any]:
    """Block masks; additive dense ones on a CPU."""
    window = getattr(self.decoder.config, "sliding_window", None)
    dense = self.decoder.device.type == "cpu"

    def make(window):
      return mask(rows, s, window, dense=dense)

    full = make(None)
    narrow = make(window) if window and window < s + 1 else full
    return {"full_attention": full, "sliding_attention": narrow}


def mask(rows: Laid, s: int, window: int | None, *, dense: bool) -> Any:
  """Which of S context slots and M R own rows each of M R rows sees.

  Args:
    rows: positions [B, M, R] and limits of the traces' rows.
    s: S.
    window: positions that a row sees back to, itself included; None: all.
    dense: an additive mask in place of a block mask.
  """
  b, m, r = rows["positions"].shape
  limits = rows["limits"].expand(b, m, r).flatten(1).contiguous()
  positions = rows["positions"].flatten(1).contiguous()

  def visible(b, h, q, k):
    context = (k < s) & (k <= limits[b, q])
    if window is not None:
      context &= positions[b, q] - k < window
    own = k - s
    return context | ((own >= 0) & (own // r == q // r) & (own <= q))

  sizes = b, None, m * r, s + m * r
  device = str(positions.device)
  if not dense:
    return flex_attention.create_block_mask(visible, *sizes, device=device)
  seen = flex_attention.create_mask(visible, b, 1, *sizes[2:], device=device)
  return torch.where(seen, 0.0, torch_peer.HIDDEN)


def compare() -> dict[str, Any]:
  """The loss of one step at small shapes and weights, there and here.

  With a window shorter than the context and both soft caps.

  Raises:
    AssertionError: they differ.
  """
  root = pathlib.Path(__file__).resolve().parent.parent
  config = runpy.run_path(str(root / "configs/benchmark.py"))["get_config"]()
  config.decoder.shape.update(
    vocab_size=512, width=64, layers=2, mlp_width=128, window=24
  )
  config.coprocessor.latents, config.traces.count = 4, 8
  config.data.sequence, config.data.batch = 96, jax.device_count()
  config.precision.compute = config.precision.decoder = "float32"
  config = configs.resolve(config, given=())
  mesh = sharding.make_mesh(config.mesh)
  made = benchmark.prepare(config, mesh)
  batch = benchmark.random_batch(config, made.model, mesh)
  step = steps.make_step(
    config, made.model, made.optimizer, mesh, made.shardings
  )
  params = jax.device_get(made.state.params)
  key = jax.random.key(config.seed)
  _, metrics = step(made.state, made.decoder, batch, key, np.bool_(False))
  ours = float(metrics["loss"])
  with tempfile.TemporaryDirectory() as directory:
    huggingface.save(directory, made.model.config, made.decoder)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(
      directory, attn_implementation=_implementation(), dtype=torch.float32
    ).to(_device())
  peer = FlexPeer(decoder, params, configs.layout_of(config), 1e-3)
  laid = _move(torch_peer.laid_out(config, batch))
  tokens = _move(torch_peer.to_torch(batch["tokens"]))
  losses = [peer.step(tokens, laid, extended=False) for _ in range(3)]
  assert abs(losses[0] - ours) < _CLOSE, f"{losses[0]} here, {ours} in JAX"
  assert losses[2] < losses[0], f"no descent: {losses}"
  return {"loss": losses[0], "jax": ours}


def measure(config: Any) -> dict[str, Any]:
  """Time and memory of steps at a config's shapes, with random weights."""
  model_config = configs.model_of(config)
  entries = config_json.config_entries(model_config)
  dtype = getattr(torch, config.precision.decoder)
  with torch.device(_device()):
    decoder = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**entries),
      attn_implementation=_implementation(),
      dtype=dtype,
    )
  layout, width = configs.layout_of(config), model_config.width
  params = {
    "soft_tokens": np.zeros((layout.latents, width), np.float32),
    "latent_projection": np.zeros((width, width), np.float32),
  }
  peer = FlexPeer(decoder, params, layout, 1e-6)
  shape = config.data.batch, config.data.sequence
  draw = np.random.default_rng(config.seed)
  batch = {
    "tokens": draw.integers(0, model_config.vocab_size, shape, np.int32),
    "documents": np.zeros(shape, np.int32),
  }
  laid = _move(torch_peer.laid_out(config, batch))
  tokens = _move(torch_peer.to_torch(batch["tokens"]))
  times = []
  for _ in range(5):
    began = time.perf_counter()
    loss = peer.step(tokens, laid, extended=False)  # waits for it
    times.append(time.perf_counter() - began)
  seconds = statistics.median(times[2:])
  useful = flops.of_step(config, model_config).total
  found = {
    "ms": 1e3 * seconds,
    "loss": loss,
    "first_ms": 1e3 * times[0],
    "useful_tflops": useful / seconds / 1e12,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  if torch.cuda.is_available():
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
  return found


def _device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def _implementation() -> str:
  return "flex_attention" if torch.cuda.is_available() else "eager"


def _move(tree):
  if isinstance(tree, dict):
    return {key: _move(value) for key, value in tree.items()}
  return tree.to(_device())
