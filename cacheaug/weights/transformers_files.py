"""What lets transformers use a coprocessor: files beside its weights.

  custom_generate/generate.py   torch alone, without this package
  custom_generate/decoder.json  the decoder's tensors, for its fingerprint
  README.md                     the model card

The first is a copy of transformers_side/generate.py, which nothing imports.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.run.files import expanded
from cacheaug.weights import gguf_io, leaves, pretrained
from cacheaug.weights import safetensors_io as files

GENERATE = pathlib.Path(__file__).parent / "transformers_side" / "generate.py"
COMPARE = GENERATE.with_name("compare.py")
_CARD = GENERATE.with_name("card.md")
_OURS = "<!-- written by cacheaug.export -->"  # in card.md; others are kept
_KINDS = {
  "coprocessor": "a network of the decoder's architecture reads its cache",
  "activations": "a network reads the decoder's last hidden states",
  "pause": "learned embeddings, no network",
  "prefix": "learned keys and values, no network",
  "handover": "a network reads the cache and hands over keys and values",
}


def write(
  directory: str | pathlib.Path,
  model_config: ModelConfig,
  entries: Mapping[str, Any],
  report: str = "",
) -> None:
  """Writes the files of the module's docstring.

  Args:
    directory: of the export.
    model_config: of the decoder.
    entries: the export's config.json.
    report: Markdown of the run's report; the card says that there is none.

  Raises:
    UserError: a directory that cannot be written.
  """
  directory = pathlib.Path(directory)
  table = [
    [leaf.path, leaf.shape, leaf.names[0].replace(".0.", ".{}.")]
    for leaf in leaves.leaves_of(model_config)
  ]
  folder = directory / "custom_generate"
  files.write_json(folder / "decoder.json", table)
  code = GENERATE.read_bytes()
  files.atomically(folder / GENERATE.name, lambda file: file.write(code))
  path = directory / "README.md"
  if path.exists() and _OURS not in path.read_text("utf-8", "replace"):
    return  # somebody's own
  card = model_card(entries, report).encode()
  files.atomically(path, lambda file: file.write(card))


def report_of(workdir: str | epath.Path) -> str:
  """A run's report in Markdown; '' where it has written none."""
  path = expanded(workdir) / "report" / "report.md"
  return path.read_text() if path.exists() else ""


def model_card(entries: Mapping[str, Any], report: str = "") -> str:
  """README.md of an export, with the hub's metadata in front.

  Args:
    entries: the export's config.json.
    report: as of `write`.
  """
  source = entries["source"] or "a random decoder"
  licence = _licence(entries["source"])
  on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", entries["source"])
  text = _CARD.read_text()
  values = {
    "base": f"base_model: {source}\n" if on_hub else "",
    "licence": licence or "other",
    "licence_line": licence or "not stated beside its weights: look it up",
    "source": source,
    "fingerprint": entries["decoder_fingerprint"],
    "family": entries["family"] + _quantised(entries["source"]),
    "kind": f"{entries['kind']} ({_KINDS[entries['kind']]})",
    "latents": entries["latents"],
    "positions": entries["positions"],
    "start": entries["start"],
    "lora": f", a LoRA of rank {entries['lora_rank']}, merged"
    if entries.get("lora_rank")
    else "",
    "report": _demoted(report) or "The run wrote no report.",
  }
  for key, value in values.items():
    text = text.replace("{{" + key + "}}", str(value))
  return text


def _quantised(source: str) -> str:
  """', dequantised from Q4_K' where the decoder's file is there and says so."""
  try:
    kinds = (
      pretrained.quantisation(pretrained.resolve(source)) if source else ""
    )
  except UserError:  # it has moved, or is on the hub
    return ""
  return f", dequantised from {kinds}" if kinds else ""


def _licence(source: str) -> str:
  """The `license` of the README.md beside a decoder's weights; '' without."""
  try:
    directory = pretrained.resolve(source) if source else None
  except UserError:  # it has moved, or is on the hub
    return ""
  if source.startswith(pretrained.SHIPPED):
    return "apache-2.0"
  if gguf_io.is_gguf(source):
    return gguf_io.licence(directory) if directory else ""
  card = pathlib.Path(directory or ".") / "README.md"
  if not directory or not card.is_file():
    return ""
  head = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.S)
  found = head and re.search(r"^license: *(\S+)", head[1], re.M)
  return found[1] if found else ""


def _demoted(report: str) -> str:
  """A report's text under another's heading, without pictures and its title."""
  lines = [line for line in report.splitlines() if not line.startswith("![")]
  text = re.sub(r"\A\s*# .*\n", "", "\n".join(lines))
  return re.sub(r"^(#+ )", r"#\1", text, flags=re.M).strip()
