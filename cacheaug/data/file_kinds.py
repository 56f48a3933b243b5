"""What a file is that is not text, by its first bytes."""

import codecs

# First bytes -> what it is, and what to do. Only files that are not text are
# looked up: a text may well begin with "PAR1".
_KINDS = {
  b"\x28\xb5\x2f\xfd": ("zstd", "unpack it first, `zstd -d`"),
  b"\x1f\x8b": ("gzip", "let its name end in .gz"),
  b"\xfd7zXZ\0": ("xz", "unpack it first, `xz -d`"),
  b"BZh": ("bzip2", "unpack it first, `bunzip2`"),
  b"\x04\x22\x4d\x18": ("lz4", "unpack it first, `lz4 -d`"),
  b"\xff\x06\0\0sNaPpY": ("snappy", "unpack it first"),
  b"PK\x03\x04": ("zip", "unpack it first, `unzip`"),
  b"7z\xbc\xaf\x27\x1c": ("7z", "unpack it first, `7z x`"),
  b"Rar!": ("rar", "unpack it first"),
  b"PAR1": ("Parquet", "write its rows as JSON lines first"),
  b"ARROW1": ("Arrow", "write its rows as JSON lines first"),
  b"\xff\xff\xff\xff": (
    "an Arrow stream",
    "write its rows as JSON lines first",
  ),
  b"ORC": ("ORC", "write its rows as JSON lines first"),
  b"Obj\x01": ("Avro", "write its rows as JSON lines first"),
  b"SQLite format 3\0": ("SQLite", "write its rows as JSON lines first"),
  b"\x89HDF\r\n": ("HDF5", "write its texts as JSON lines first"),
  b"\x93NUMPY": ("NumPy", "write its texts as JSON lines first"),
  b"\x80\x02": ("pickle", "write its texts as JSON lines first"),
  b"\x80\x03": ("pickle", "write its texts as JSON lines first"),
  b"\x80\x04": ("pickle", "write its texts as JSON lines first"),
  b"\x80\x05": ("pickle", "write its texts as JSON lines first"),
  b"%PDF-": ("PDF", "extract its text first"),
  b"\xff\xfe": ("UTF-16", "convert it, `iconv -f UTF-16 -t UTF-8`"),
  b"\xfe\xff": ("UTF-16", "convert it, `iconv -f UTF-16 -t UTF-8`"),
}
_TAR = (257, b"ustar")
HEAD = 512  # bytes that are enough


def explain(head: bytes) -> str:
  """'it is KIND: REMEDY' for bytes that no text begins with; else ''."""
  if _is_text(head):
    return ""
  kinds = dict(_KINDS)
  at, mark = _TAR
  if head[at : at + len(mark)] == mark:
    kinds = {b"": ("a tar archive", "unpack it first, `tar xf`")}
  for start, (kind, remedy) in kinds.items():
    if head.startswith(start):
      return f"it is {kind}: {remedy}"
  return ""


def _is_text(head: bytes) -> bool:
  try:
    # The last character may be cut.
    codecs.getincrementaldecoder("utf-8")().decode(head, len(head) < HEAD)
  except UnicodeDecodeError:
    return False
  return b"\0" not in head
