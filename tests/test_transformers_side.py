"""An exported coprocessor in transformers' generate, beside JAX."""

import inspect
import pathlib
import re
import runpy

import make_golden
import numpy as np
import oracle
import pytest
import tolerances
from oracle import WHY_TORCH

import cacheaug
from cacheaug import export as exports
from cacheaug import lm as lms
from cacheaug.augment.traces import STARTS, Layout
from cacheaug.evals import torch_parity
from cacheaug.weights import coprocessor_files, transformers_files

pytest.importorskip("torch", reason=WHY_TORCH)
pytest.importorskip("transformers", reason=WHY_TORCH)

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)  # tiny models: threads only wait for each other

COMPARE = runpy.run_path(
  str(transformers_files.GENERATE.with_name("compare.py"))
)["compare"]
FAMILIES = (
  *("gemma", "gemma2", "gemma3", "llama", "mistral", "olmo2", "qwen2"),
  *("qwen2_tied_sliding", "qwen3", "qwen3_sliding", "smollm3"),
)
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "troubleshooting.md"
PAGE = " ".join(PAGE.read_text().split())
LINES = 360  # of generate.py, without empty ones
SPEC = Layout(latents=3, ahead=4, positions="replace")


@pytest.fixture(autouse=True, scope="module")
def quick():
  """Compiles this module's programs without optimisation."""
  patch = pytest.MonkeyPatch()
  static = {"model", "spec", "layout", "last", "keep_states", "max_new_tokens"}
  static |= {"stop_ids"}
  names = ("_read", "_augment", "_decode", "_nll")
  for module, name in (
    *((lms, name) for name in names),
    (torch_parity, "_compute_latents"),
  ):
    function = getattr(module, name).__wrapped__
    here = [x for x in inspect.signature(function).parameters if x in static]
    compiled = tolerances.jit(function, static_argnames=here)
    patch.setattr(module, name, compiled)
  yield
  patch.undo()


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
  """By name: (directory, LM, torch's model) of a tiny random decoder."""
  made = {}

  def get(case):
    if case not in made:
      directory = tmp_path_factory.mktemp(case)
      reference = make_golden.build(case, max_position_embeddings=128)
      reference.save_pretrained(directory)
      lm = cacheaug.load(directory, dtype="float32")
      made[case] = directory, lm, reference
    return made[case]

  return get


def export(directory, lm, spec=SPEC, **changes):
  """A random exported coprocessor, and the LM that has it."""
  options = dict(
    model_config=lm.model.config,
    spec=spec,
    params=oracle.random_params(lm.model, spec),
    decoder_fingerprint=lm.fingerprint,
    source="tiny",
  )
  coprocessor_files.save_coprocessor(directory, **options | changes)
  return lm.with_coprocessor(directory)


@pytest.mark.parametrize(
  "case",
  [
    "llama",
    *(
      pytest.param(c, marks=pytest.mark.slow) for c in FAMILIES if c != "llama"
    ),
  ],
)
def test_families(case, decoders, tmp_path):
  """Contexts of 20 tokens exceed the windows of 8."""
  directory, lm, _ = decoders(case)
  lm = export(tmp_path, lm)
  want = torch_parity.expected(lm, torch_parity.prompts_of(lm), ahead=4)
  rows = COMPARE(tmp_path, directory, want)
  assert len(rows) == 5
  assert {name: text for name, (text, good) in rows.items() if not good} == {}


# Latents are computed, moved and hidden in another way by each of these.
LAYOUTS = tuple(
  (kind, positions, start)
  for kind in ("coprocessor", "activations", "pause", "handover", "prefix")
  for positions in ("replace", "insert")
  for start in STARTS
)


@pytest.mark.slow
@pytest.mark.parametrize("kind, positions, start", LAYOUTS)
def test_layouts(kind, positions, start, decoders, tmp_path):
  """Every kind, on layers of which some slide."""
  directory, lm, _ = decoders("qwen3_sliding")
  spec = Layout(3, 4, kind=kind, positions=positions, start=start)
  lm = export(tmp_path, lm, spec)
  want = torch_parity.expected(lm, torch_parity.prompts_of(lm), ahead=4)
  assert ("z" in want) == (kind not in ("handover", "prefix"))
  rows = COMPARE(tmp_path, directory, want)
  assert {name: text for name, (text, good) in rows.items() if not good} == {}


@pytest.mark.slow
def test_rounds(decoders, tmp_path):
  directory, lm, _ = decoders("llama")
  lm = export(tmp_path, lm, Layout(3, 4, positions="replace", rounds=2))
  want = torch_parity.expected(lm, torch_parity.prompts_of(lm), ahead=4)
  # What decode says after LM.augment is one round; the nll is of both.
  del want["tokens"]
  assert COMPARE(tmp_path, directory, want)["nll"][1]


@pytest.fixture(scope="module")
def tiny(decoders, tmp_path_factory):
  """(exported directory, torch's model, two prompts, their mask)."""
  _, lm, reference = decoders("llama")
  directory = tmp_path_factory.mktemp("export")
  export(directory, lm)
  rng = np.random.default_rng(0)
  ids = torch.tensor(rng.integers(3, lm.model.config.vocab_size, (2, 12)))
  mask = torch.ones_like(ids)
  mask[1, :5] = 0
  return directory, reference, ids, mask


def say(tiny, tokens=8, **options):
  """New tokens [B, up to `tokens`] of torch's generate with latents."""
  directory, model, ids, mask = tiny
  options = dict(input_ids=ids, attention_mask=mask) | options
  out = model.generate(
    custom_generate=str(directory),
    trust_remote_code=True,
    max_new_tokens=tokens,
    **dict(do_sample=False, pad_token_id=0) | options,
  )
  return out[:, options["input_ids"].shape[1] :]


def test_a_batch_is_its_rows(tiny):
  """Left padding changes nothing; latents do."""
  _, model, ids, mask = tiny
  both = say(tiny)
  for i in range(2):
    alone = ids[i : i + 1, int((mask[i] == 0).sum()) :]
    got = say(tiny, input_ids=alone, attention_mask=torch.ones_like(alone))
    assert got[0].tolist() == both[i].tolist()
  plain = say(tiny, latents=False)
  want = model.generate(
    ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
  )
  assert plain.tolist() == want[:, ids.shape[1] :].tolist()
  assert plain.tolist() != both.tolist()


def test_eos_ends_a_sequence_and_pads_it(tiny):
  free = say(tiny)
  eos = int(free[0, 2])
  got = say(tiny, eos_token_id=eos, pad_token_id=1)
  first = free[0].tolist().index(eos)
  assert got[0, : first + 1].tolist() == free[0, : first + 1].tolist()
  assert set(got[0, first + 1 :].tolist()) <= {1}


def test_sampling_is_reproducible_and_of_the_law(tiny):
  def sample(seed, **options):
    torch.manual_seed(seed)
    return say(tiny, do_sample=True, **options).tolist()

  assert sample(0) == sample(0) != sample(1)
  assert sample(3, top_k=1) == say(tiny).tolist()
  # Logits processors act: a token that is forbidden is not said.
  gone = int(say(tiny)[0, 0])
  assert gone not in say(tiny, suppress_tokens=[gone])[0].tolist()


def test_streams(tiny):
  class Streamer(transformers.generation.streamers.BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
      self.parts, self.ended = [], False

    def put(self, value):
      """A prompt [1, S], then tokens [1]."""
      self.parts.append(value.flatten().tolist())

    def end(self):
      """The last token has been given."""
      self.ended = True

  _, _, ids, _ = tiny
  streamer, one = Streamer(), ids[:1]
  mask = torch.ones_like(one)
  got = say(tiny, input_ids=one, attention_mask=mask, streamer=streamer)
  prompt, *tokens = streamer.parts
  assert prompt == one[0].tolist() and streamer.ended
  assert [t for (t,) in tokens] == got[0].tolist()


def test_refusals(tiny, decoders, tmp_path):
  """One line each, that says what to do."""
  directory, model, ids, mask = tiny

  def refused(match, at=tiny, error=ValueError, **options):
    with pytest.raises(error, match=match) as e:
      say(at, **options)
    text = str(e.value).replace(str(at[0]), "DIR")
    assert "\n" not in text.strip()
    if error is ValueError:  # in the page, but for what is of this test's own
      page = re.sub("this one is [0-9a-f]{12}", "", PAGE)
      text = re.sub("this one is [0-9a-f]{12}", "", text)
      assert text in page

  refused("padded on the right", attention_mask=mask.flip(1))
  refused("2 tokens is too short", input_ids=ids[:, :2], attention_mask=None)
  refused("beam_search with latents", num_beams=2)
  # Another decoder of the same shape, another width, a file that is gone.
  other = make_golden.build("llama", max_position_embeddings=128)
  with torch.no_grad():
    other.model.norm.weight[3] += 1
  changed = directory, other, ids, mask
  refused("this one is .*load that decoder", changed)
  assert say(changed, check=False).shape == (2, 8)
  wide = make_golden.build("llama", hidden_size=32)
  refused("another decoder: its model.layers", (directory, wide, ids, mask))
  _, lm, _ = decoders("llama")
  export(tmp_path, lm)
  (tmp_path / "coprocessor.safetensors").unlink()
  here = tmp_path, model, ids, mask
  refused("coprocessor.safetensors", here, OSError)
  for spec, match in (
    (Layout(3, 4, positions="overlay"), "positions 'overlay' is not possible"),
    (Layout(3, 4, positions="replace", rounds=2, stride=2), "traces.stride"),
  ):
    export(tmp_path, lm, spec)
    refused(match, here)


def test_prompt_embeds_refuses_keys(decoders, tmp_path):
  _, lm, model = decoders("llama")
  export(tmp_path, lm, Layout(3, 4, positions="insert", kind="prefix"))
  side = runpy.run_path(str(transformers_files.GENERATE))
  with pytest.raises(ValueError, match="'prefix' hands over keys"):
    side["prompt_embeds"](model, torch.ones(1, 5).long(), coprocessor=tmp_path)


def test_gemma_rows_with_and_without_the_multiplier(decoders, tmp_path):
  _, lm, model = decoders("gemma2")
  export(tmp_path, lm)
  side = runpy.run_path(str(transformers_files.GENERATE))
  ids = torch.arange(3, 11)[None]
  rows = [
    side["prompt_embeds"](model, ids, coprocessor=str(tmp_path), scaled=scaled)
    for scaled in (True, False)
  ]
  table = model.get_input_embeddings().weight[ids[0, :5]]
  torch.testing.assert_close(rows[1][0, :5], table)
  torch.testing.assert_close(rows[0], rows[1] * 24**0.5)


def test_card_and_earlier_exports(decoders, tmp_path):
  _, lm, _ = decoders("llama")
  export(
    tmp_path / "a", lm, report="# Report\n\n## Table\n\n| a | b |\n![x](y)"
  )
  card = (tmp_path / "a" / "README.md").read_text()
  for text in (
    "| a | b |",
    "### Table",
    lm.fingerprint,
    "custom_generate",
    "3",
  ):
    assert text in card
  assert "{{" not in card and "![" not in card
  # One's own card is kept, an earlier one of ours is replaced.
  (tmp_path / "a" / "README.md").write_text("mine")
  export(tmp_path / "a", lm)
  assert (tmp_path / "a" / "README.md").read_text() == "mine"
  for path in (tmp_path / "a" / "custom_generate").iterdir():
    path.unlink()
  exports.export_run(tmp_path / "a", tmp_path / "b")
  for name in ("config.json", "coprocessor.safetensors"):
    old, new = (tmp_path / d / name for d in "ab")
    assert old.read_bytes() == new.read_bytes()
  assert (tmp_path / "b" / "custom_generate" / "generate.py").read_bytes() == (
    transformers_files.GENERATE.read_bytes()
  )


def test_generate_stands_alone():
  """No import of this package; short enough to be read before it is trusted."""
  text = transformers_files.GENERATE.read_text()
  assert "import cacheaug" not in text and "from cacheaug" not in text
  code = [x for x in text.splitlines() if x.strip()]
  assert len(code) <= LINES
