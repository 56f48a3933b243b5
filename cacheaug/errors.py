"""The one exception that a user's bad input raises."""


class UserError(Exception):
  """Bad input: one line that names the key or file and the remedy.

  Commands print it as `error: ...` and exit with status 1; nothing has been
  written or overwritten by then.
  """
