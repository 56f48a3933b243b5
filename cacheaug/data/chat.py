"""Chat templates: a conversation as the text that instruct models know.

A template is a Jinja program beside the tokenizer. It is rendered as
`transformers` renders it (utils/chat_template_utils.py): in a sandbox, as the
program is somebody else's, with the same options, functions and filters.
"""

import datetime
import functools
import json
import pathlib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cacheaug import errors

if typing.TYPE_CHECKING:
  import jinja2
  import jinja2.nodes
  import jinja2.parser

Messages = Sequence[Mapping[str, Any]]

_FILE = "chat_template.jinja"
_FURTHER = "additional_chat_templates"
# Marks the end of a last message that the model continues.
_END = "CONTINUE_FINAL_MESSAGE_TAG "
# Names of a message's reasoning; templates read the first, or `thinking`.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(str):
  """A conversation as text, in which special tokens are spelled out."""


def find_templates(directory: pathlib.Path) -> dict[str, str]:
  """Reads the chat templates that lie beside a tokenizer.

  Args:
    directory: holds chat_template.jinja and additional_chat_templates/, or
      tokenizer_config.json with an entry `chat_template`; files go first.

  Returns:
    Name -> template; 'default' is the usual one. Empty where there is none.

  Raises:
    UserError: a file that cannot be read.
  """
  paths = {"default": directory / _FILE}
  paths |= {path.stem: path for path in (directory / _FURTHER).glob("*.jinja")}
  templates = {
    name: _read(path) for name, path in paths.items() if path.exists()
  }
  config = directory / "tokenizer_config.json"
  if templates or not config.exists():
    return templates
  try:
    return parse_entry(json.loads(_read(config)).get("chat_template"))
  except (ValueError, AttributeError) as error:
    raise errors.UserError(f"{config}: not a JSON object") from error


def parse_entry(entry: Any) -> dict[str, str]:
  """Templates by name of a `chat_template` entry: a text, or a list of them."""
  if isinstance(entry, str):
    return {"default": entry}
  if isinstance(entry, list):
    entry = {t.get("name"): t.get("template") for t in entry if t}
  return dict(entry or {})


def save_templates(directory: pathlib.Path, templates: dict[str, str]) -> None:
  """Writes templates as the files that `find_templates` reads first."""
  for name, template in templates.items():
    if name == "default":
      path = directory / _FILE
    elif re.fullmatch(r"[\w-]+", name):  # The name comes from a foreign file.
      path = directory / _FURTHER / f"{name}.jinja"
      path.parent.mkdir(exist_ok=True)
    else:
      continue
    path.write_text(template, encoding="utf-8", newline="")


def render(
  templates: Mapping[str, str],
  messages: Messages,
  *,
  special_tokens: Mapping[str, str],
  add_generation_prompt: bool = True,
  continue_final_message: bool = False,
  **variables: Any,
) -> Rendered:
  """The text of a conversation.

  Args:
    templates: by name, from `find_templates`; 'default' is taken, or
      'tool_use' where there are `tools`.
    messages: each with at least 'role' and 'content'.
    special_tokens: 'bos_token' and so on; templates spell them.
    add_generation_prompt: end with what opens the model's answer.
    continue_final_message: end within the last message, which the model
      continues; `add_generation_prompt` must be False then.
    **variables: further ones that the template knows: tools, documents, ...

  Returns:
    The text. Nothing is to be put before it: a template spells its BOS.

  Raises:
    UserError: no template, messages that it refuses, or one that is broken.
  """
  import jinja2

  template = _choose(templates, variables.get("tools"))
  messages = _checked(messages)
  if continue_final_message:
    if add_generation_prompt:
      raise errors.UserError(
        "chat: a message is either continued or answered; leave out one of "
        "add_generation_prompt and continue_final_message"
      )
    if not isinstance(messages[-1].get("content"), str):
      raise errors.UserError("chat: the last message has no text to continue")
    messages[-1]["content"] += _END
  names = {"tools": None, "documents": None} | dict(special_tokens) | variables
  try:
    text = _compile(template).render(
      messages=messages, add_generation_prompt=add_generation_prompt, **names
    )
  except jinja2.TemplateError as error:
    raise errors.UserError(
      "chat: the model's template refuses these messages "
      f"({errors.one_line(error, 200)})"
    ) from error
  except Exception as error:  # The template is a program: anything may come.
    raise errors.UserError(
      f"chat: the model's template fails on these messages "
      f"({type(error).__name__}: {errors.one_line(error, 200)})"
    ) from error
  return Rendered(_cut(text) if continue_final_message else text)


def _choose(templates: Mapping[str, str], tools: Any) -> str:
  if tools is not None and "tool_use" in templates:
    return templates["tool_use"]
  if "default" in templates:
    return templates["default"]
  if templates:
    raise errors.UserError(
      f"chat: no default among the chat templates {sorted(templates)}; name "
      f"one of them {_FILE}"
    )
  raise errors.UserError(
    "chat: this decoder has no chat template, as base models have none: give "
    f"plain prompts, or put {_FILE} beside its tokenizer.json"
  )


def _checked(messages: Messages) -> list[dict[str, Any]]:
  """Copies without entries that are None, as templates would print them."""
  if isinstance(messages, str | Mapping) or not messages:
    raise errors.UserError(
      'chat: give a list of messages, [{"role": "user", "content": "..."}]'
    )
  copies = []
  for message in messages:
    if not isinstance(message, Mapping) or "role" not in message:
      raise errors.UserError(
        f"chat: {str(message)[:60]!r} is no message; give "
        '{"role": "user", "content": "..."}'
      )
    # Through JSON: the template sees plain data alone, and its own copy.
    copy = {k: v for k, v in message.items() if v is not None}
    copy = json.loads(json.dumps(copy, default=lambda x: f"<{type(x)}>"))
    reasoning = [copy[key] for key in _REASONING if copy.get(key) is not None]
    if reasoning:
      copy = {"thinking": reasoning[0]} | copy
      copy["reasoning_content"] = reasoning[0]
    copies.append(copy)
  return copies


def _cut(text: str) -> str:
  """The text up to the end of the last message."""
  end = text.rfind(_END.strip())
  if end < 0:
    raise errors.UserError(
      "chat: the model's template leaves the last message out, so that it "
      "cannot be continued"
    )
  # A template that strips messages has taken the mark's space.
  whole = text[end : end + len(_END)] == _END
  return text[:end] if whole else text[:end].rstrip()


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> "jinja2.Template":
  import jinja2.ext
  import jinja2.sandbox

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_generation_tag(), jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise
  environment.globals["strftime_now"] = _now
  return environment.from_string(template)


def _generation_tag() -> type:
  """The extension {% generation %}, whose content is printed as it is."""
  import jinja2.ext
  import jinja2.nodes

  class Generation(jinja2.ext.Extension):
    tags = frozenset({"generation"})

    def parse(self, parser: "jinja2.parser.Parser") -> "jinja2.nodes.Node":
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      call = self.call_method("_content")
      return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
      return caller()

  return Generation


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON without the HTML escapes of Jinja's own filter."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> None:
  import jinja2

  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _read(path: pathlib.Path) -> str:
  try:
    # Line ends as they are: they become tokens.
    return path.read_bytes().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f"{path}: cannot be read ({error})") from error
