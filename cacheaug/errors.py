"""The one exception that a user's bad input raises, and errors as one line."""


class UserError(Exception):
  """Bad input: one line that names the key or file and the remedy.

  Commands print it as `error: ...` and exit with status 1; nothing has been
  written or overwritten by then.
  """


def one_line(error: object, limit: int = 160) -> str:
  """The text of an error on one line, cut after `limit` characters.

  An error without text is named by its class.
  """
  text = " ".join(str(error).split())
  return text[:limit] or type(error).__name__
