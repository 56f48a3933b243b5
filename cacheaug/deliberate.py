"""Fills a store: reads and deliberates on documents ahead of time.

  python -m cacheaug.deliberate --documents=docs.jsonl --store=contexts
  python -m cacheaug.generate --store=contexts --prompt="<a document> And so"

Each document is read by the decoder and augmented once, at its end; a prompt
that begins with one is read on from there (projects/context_store/lm.py).
Without --workdir and --decoder it is the tiny decoder that ships in the
package, with its coprocessor.

Documents that the store holds are skipped: after a kill, run it again. A file
that is not JSON lines with --field in each ends it before anything is stored.
A document that is empty, too short for the latents, too long for the decoder,
or too large for --max_bytes is reported and left out; the others are stored,
and the exit status is 1.
"""

from absl import flags, logging

from cacheaug.build import latents_of, open_lm
from cacheaug.data import sources
from cacheaug.data.sources import Documents
from cacheaug.errors import UserError
from cacheaug.inference import padding
from cacheaug.projects.context_store.lm import StoredLM, with_store
from cacheaug.projects.context_store.store import Store
from cacheaug.run import command
from cacheaug.run.metrics import Progress

flags.DEFINE_string("documents", "", "JSON lines, plain or .gz; may be a glob")
flags.DEFINE_string("field", "text", "key of the text in each object")
flags.DEFINE_string("store", "", "directory; made where there is none")
flags.DEFINE_integer(
  "max_bytes", 0, "those used longest ago go beyond this size; 0: no limit"
)
flags.DEFINE_string("workdir", "", "a run: its coprocessor and its decoder")
flags.DEFINE_string(
  "decoder", "", "a directory, FILE.gguf, hub name or shipped:NAME"
)
flags.DEFINE_string(
  "coprocessor", "", "an exported coprocessor, a run, or shipped:NAME"
)
flags.DEFINE_enum(
  "latents",
  None,
  ["on", "off"],
  "off: contexts as the decoder leaves them; unset: latents where there is a "
  "coprocessor",
)
flags.DEFINE_integer("batch", 8, "documents at a time")


def open_documents(path: str, field: str) -> Documents:
  """The documents that the flags name.

  Raises:
    UserError: no such file, or none in it.
  """
  if not path:
    raise UserError("--documents is missing: give a file of JSON lines")
  source = sources.source_defaults()
  source.kind, source.path, source.field = "jsonl", path, field
  documents = sources.open_documents(source, label="documents")
  len(documents)  # Finds where they are, before anything is stored.
  return documents


def sort_out(
  lm: StoredLM, documents: Documents, latents: bool
) -> tuple[list[tuple[int, int]], int, int]:
  """What is to be done.

  Returns:
    (padded length, document) of those to compute, by length; how many are
    stored already; how many cannot be, each reported in a line.

  Raises:
    UserError: text that cannot be read, whichever document's it is.
  """
  todo, stored, refused = [], 0, 0
  for i in range(len(documents)):
    text = documents[i]
    tokens = lm.encode(text)
    try:
      if not text:
        raise UserError("it is empty")
      lm.check(tokens, latents)
    except UserError as e:
      logging.warning("document %d is left out: %s", i + 1, e)
      refused += 1
      continue
    if lm.has(tokens, latents):
      stored += 1
    else:
      todo.append((padding.round_up(len(tokens), padding.PROMPT), i))
  return sorted(todo), stored, refused


def batches(todo: list[tuple[int, int]], size: int) -> list[list[int]]:
  """Documents of one padded length together, at most `size` of them."""
  found: list[list[int]] = []
  last = 0
  for length, i in todo:
    if length != last or len(found[-1]) == size:
      found.append([])
    found[-1].append(i)
    last = length
  return found


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  documents = open_documents(values.documents, values.field)
  if not values.store:
    raise UserError("--store is missing: give a directory")
  if values.batch < 1:
    raise UserError(f"--batch={values.batch} must be at least 1")
  store = Store(values.store, values.max_bytes)
  lm = open_lm(
    values.workdir,
    values.decoder,
    values.coprocessor,
    latents_of(values.latents),
  )
  lm, latents = with_store(lm, store), lm.coprocessor is not None
  todo, before, refused = sort_out(lm, documents, latents)
  total, done = before + len(todo), before
  with Progress(total, before, "documents") as progress:
    for some in batches(todo, values.batch):
      rows = [lm.encode(documents[i]) for i in some]
      for i, kept in zip(
        some, lm.fill(rows, latents, values.batch), strict=True
      ):
        if not kept:
          logging.warning("document %d is left out: --max_bytes", i + 1)
          refused += 1
      done += len(some)
      progress.update(done)
  files = store.files()
  print(
    f"{len(documents)} documents: {before} were stored before, "
    f"{len(documents) - before - refused} are now, {refused} left out; "
    f"{values.store} holds {len(files)} entries of "
    f"{sum(size for _, _, size in files) / 2**20:.1f} MiB"
  )
  if store.evicted:
    logging.warning(
      "%d entries had to go for --max_bytes=%d, those used longest ago",
      store.evicted,
      values.max_bytes,
    )
  if refused:
    raise UserError(
      f"{refused} of {len(documents)} documents were left out, for the reasons "
      "above; the others are stored"
    )


if __name__ == "__main__":
  command.run(main, __doc__)
