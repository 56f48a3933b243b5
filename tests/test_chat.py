"""Chat templates: rendered and encoded as `transformers` does."""

import json
import shutil
from unittest import mock

import jax
import pytest

import cacheaug
from cacheaug.data import chat, tokenizers
from cacheaug.errors import UserError
from cacheaug.weights import pretrained

NANO = pretrained.resolve("shipped:nano")

# As published, or cut to what they are known for.
TEMPLATES = {
  "smollm2": (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != "
    "'system' %}{{ '<bos>system\nYou are a helpful AI assistant named SmolLM"
    "<eos>\n' }}{% endif %}{{'<bos>' + message['role'] + '\n' + "
    "message['content'] + '<eos>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
  ),
  "gemma": (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
    "alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
  ),
  "blocks, loops and a generation tag": (
    "{%- set ns = namespace(found=false) %}\n"
    "{% for message in messages %}\n"
    "  {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
    "    {% generation %}\n"
    "    [{{ message.role|upper }}] {{ message.content }}{{ eos_token }}\n"
    "    {% endgeneration %}\n"
    "  {% set ns.found = true %}\n"
    "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if ns.found and add_generation_prompt %}[A]{% endif %}\n"
  ),
  "tools and dates": (
    "{{ strftime_now('%Y') }}{% if tools is not none %}{{ tools | tojson }}"
    "{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}"
    "{{ m | tojson }}{% if m.thinking is defined %}T{{ m.thinking }}{% endif %}"
    "{{ m.content }}{% endfor %}{{ pad_token }}{{ unk_token }}{{ documents }}"
  ),
}
CONVERSATIONS = [
  [{"role": "user", "content": "Hi"}],
  [
    {"role": "user", "content": " What is <eos>? "},
    {"role": "assistant", "content": "é & <b>\n", "tool_calls": None},
    {"role": "user", "content": "漢\r\n🙂"},
  ],
  [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi", "reasoning": "so"},
  ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "x": "ü<"}}]


def with_template(directory, template, place="file"):
  """The shipped byte tokenizer with a chat template."""
  shutil.copytree(NANO, directory)
  config = directory / "tokenizer_config.json"
  entries = json.loads(config.read_text())
  if place == "file":
    (directory / "chat_template.jinja").write_text(template)
  elif place == "entry":
    entries["chat_template"] = template
  else:
    entries["chat_template"] = [
      {"name": "default", "template": template},
      {"name": "tool_use", "template": "tools:" + template},
    ]
  config.write_text(json.dumps(entries))
  return directory


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "entry", "list"])
def test_as_transformers_renders_and_encodes(tmp_path, name, place):
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'parity'"
  )
  directory = with_template(tmp_path / "d", TEMPLATES[name], place)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  ours = tokenizers.load(str(directory))
  ours.save(tmp_path / "again")
  again = tokenizers.load(str(tmp_path / "again"))
  assert again.chat_templates == ours.chat_templates
  assert ours.special_tokens == theirs.special_tokens_map
  for messages in CONVERSATIONS:
    for options in (
      {"add_generation_prompt": True},
      {"add_generation_prompt": False},
      {"add_generation_prompt": False, "continue_final_message": True},
      {"add_generation_prompt": True, "tools": TOOLS},
    ):
      try:
        want = theirs.apply_chat_template(messages, tokenize=False, **options)
      except Exception:
        with pytest.raises(UserError, match="chat: the model's template"):
          chat.render(
            ours.chat_templates,
            messages,
            special_tokens=ours.special_tokens,
            **options,
          )
        continue
      for tokenizer in (ours, again):
        text = chat.render(
          tokenizer.chat_templates,
          messages,
          special_tokens=tokenizer.special_tokens,
          **options,
        )
        assert text == want
      ids = theirs.apply_chat_template(messages, **options)["input_ids"]
      assert tokenizers.with_special(ours, text) == ids


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
  directory = tmp_path_factory.mktemp("chat") / "nano"
  return cacheaug.load(with_template(directory, TEMPLATES["smollm2"]))


def test_an_answer_is_the_rendered_prompts_continuation(lm):
  messages = CONVERSATIONS[0]
  prompt = lm.render(messages)
  ids = lm.encode(prompt)
  assert ids[0] == 2  # <bos> of the template, and no second one
  assert ids.count(2) == 3
  assert lm.encode(str(prompt)).count(2) == 1  # A plain text stays text.
  answer = lm.chat(messages, 8, latents=False)
  context = lm.prefill([ids])
  assert answer == lm.tokenizer.decode(lm.decode(context, 8)[0].tolist())
  assert lm.generate([prompt, "x"], 8, latents=False)[0] == answer


@pytest.mark.parametrize(
  "messages, words",
  [
    ([], "give a list of messages"),
    ("Hi", "give a list of messages"),
    ({"role": "user", "content": "Hi"}, "give a list of messages"),
    (["Hi"], "is no message"),
    ([{"content": "Hi"}], "is no message"),
    ([{"role": "user"}], "template"),
    ([{"role": "user", "content": None}], "template"),
  ],
)
def test_refusals_are_one_line(lm, messages, words):
  with pytest.raises(UserError, match=words) as raised:
    lm.chat(messages)
  assert "\n" not in str(raised.value)


def test_base_models_have_no_format():
  with pytest.raises(UserError, match="has no chat template"):
    cacheaug.load("shipped:nano").chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
  "template, words",
  [
    ("{% for %}", "template refuses"),
    ("{{ ''.__class__.__mro__ }}", "template"),
    ("{{ raise_exception('two\nlines') }}", "two lines"),
    ("{{ messages[7].content.x }}", "template"),
    ("{{ messages.append(1) }}", "template"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
  ],
)
def test_broken_templates_are_one_line(template, words):
  messages = [{"role": "user", "content": "Hi"}]
  with pytest.raises(UserError, match=words) as raised:
    chat.render({"default": template}, messages, special_tokens={})
  assert "\n" not in str(raised.value)


def test_lm_eval_asks_in_the_models_format(lm):
  pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
  from cacheaug.projects.lm_eval.answering import Answerer
  from cacheaug.projects.lm_eval.model import AugmentedLM

  answerer = Answerer(lm, latents=False, batch=1)
  model = AugmentedLM(latents=False, answerer=answerer)
  messages = CONVERSATIONS[2]
  before = model.tok_encode("<eos>")
  text = model.apply_chat_template(messages)
  assert model.chat_template(True) == TEMPLATES["smollm2"]
  assert text == lm.render(messages)
  assert model.tok_encode(text) == lm.encode(lm.render(messages))
  assert model.tok_encode("<eos>") != before
  assert model.tok_encode("<eos>", add_special_tokens=False) == [1]


def test_lm_eval_leaves_out_a_system_message_that_is_refused(tmp_path):
  pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
  from cacheaug.projects.lm_eval.answering import Answerer
  from cacheaug.projects.lm_eval.model import AugmentedLM

  lm = cacheaug.load(with_template(tmp_path / "d", TEMPLATES["gemma"]))
  model = AugmentedLM(
    latents=False, answerer=Answerer(lm, latents=False, batch=1)
  )
  text = model.apply_chat_template(CONVERSATIONS[2])
  assert text == lm.render(CONVERSATIONS[2][1:])
  assert jax.numpy.asarray(model.tok_encode(text))[0] == 2


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
@pytest.mark.parametrize("template", ["adds a bos", "adds none"])
def test_lm_eval_has_the_tokens_of_its_own_class(tmp_path, name, template):
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'parity'"
  )
  huggingface = pytest.importorskip("lm_eval.models.huggingface")
  from cacheaug.projects.lm_eval.answering import Answerer
  from cacheaug.projects.lm_eval.model import AugmentedLM

  directory = with_template(tmp_path / "d", TEMPLATES[name])
  if template == "adds none":
    path = directory / "tokenizer.json"
    entries = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(entries))
    path = directory / "tokenizer_config.json"
    entries = json.loads(path.read_text()) | {"model_max_length": 512}
    path.write_text(json.dumps(entries))
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  theirs = mock.Mock(
    tokenizer=tokenizer,
    add_bos_token=None,
    prefix_token_id=tokenizer.bos_token_id,
    chat_template_args={},
  )
  lm = cacheaug.load(str(directory))
  answerer = Answerer(lm, latents=False, batch=1)
  ours = AugmentedLM(latents=False, answerer=answerer)
  assert ours.prefix_token_id == theirs.prefix_token_id
  for prompt in ("Hi", " <start> there ", ""):  # before a template: no special
    want = huggingface.HFLM.tok_encode(theirs, prompt)
    assert ours.tok_encode(prompt) == want
  for messages in CONVERSATIONS[:2]:
    for generation in (True, False):
      want = huggingface.HFLM.apply_chat_template(theirs, messages, generation)
      text = ours.apply_chat_template(messages, generation)
      assert text == want
      for whole in (text, text + "an answer<eos>", text.rstrip()):
        ids = huggingface.HFLM.tok_encode(theirs, whole)
        assert ours.tok_encode(whole) == ids


@pytest.mark.slow
def test_lm_eval_runs_with_a_template(lm, tmp_path, monkeypatch):
  lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
  from lm_eval.api.task import ConfigurableTask

  from cacheaug.projects.lm_eval.answering import Answerer
  from cacheaug.projects.lm_eval.model import AugmentedLM

  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  path = tmp_path / "t.jsonl"
  rows = [{"q": f"question {i}", "c": ["yes", "no"]} for i in range(3)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  task = ConfigurableTask(
    config={
      "task": "t",
      "dataset_path": "json",
      "dataset_kwargs": {
        "data_files": {"test": str(path)},
        "cache_dir": str(tmp_path / "cache"),
      },
      "test_split": "test",
      "output_type": "multiple_choice",
      "doc_to_text": "{{q}}",
      "doc_to_choice": "{{c}}",
      "doc_to_target": 0,
      "metric_list": [{"metric": "acc"}],
    }
  )
  answerer = Answerer(lm, latents=False, batch=2)
  model = AugmentedLM(latents=False, answerer=answerer)
  asked = []
  score = answerer.loglikelihoods

  def recorded(pairs):
    asked.extend(pairs)
    return score(pairs)

  monkeypatch.setattr(answerer, "loglikelihoods", recorded)
  lm_eval.simple_evaluate(
    model=model, tasks=[task], apply_chat_template=True, bootstrap_iters=0
  )
  for i, (context, _) in enumerate(asked):
    message = {"role": "user", "content": rows[i // 2]["q"]}
    ids = lm.encode(lm.render([message]))
    assert list(context) == ids[: len(context)]
    assert len(ids) - len(context) <= 1  # A space at the end is scored.
  assert len(asked) == 6
