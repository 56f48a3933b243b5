"""The paper's benchmarks through lm_eval, on files written here."""

import dataclasses
import gzip
import json
import runpy
from pathlib import Path

import pytest
import tolerances

import cacheaug
from cacheaug.augment.traces import Layout
from cacheaug.data.tokenizers import ByteTokenizer
from cacheaug.errors import UserError
from cacheaug.lm import LM, Coprocessor
from cacheaug.projects.lm_eval import benchmark_data, benchmarks, programs
from cacheaug.projects.lm_eval.answering import AUGMENTED, FROZEN
from cacheaug.projects.lm_eval.benchmark_tasks import BENCHMARKS

WHY = "needs lm_eval: pip install 'cacheaug[eval]'"
_ROOT = Path(__file__).resolve().parent.parent

# A record of each, as published.
RECORDS = {
  "mmlu": dict(
    subject="anatomy", question="Which?", choices=["a", "b", "c", "d"], answer=2
  ),
  "gsm8k": dict(question="2 and 2?", answer="2 + 2 = <<2+2=4>>4\n#### 4"),
  "drop": dict(
    section_id="s",
    query_id="q",
    passage="He ran 3 miles.",
    question="How many?",
    answer=dict(
      number="3", date=dict(day="", month="", year=""), spans=[], hit_id="h"
    ),
    validated_answers=dict(
      number=[""],
      date=[dict(day="", month="", year="")],
      spans=[["3 miles"]],
    ),
  ),
  "arc_easy": dict(
    id="i",
    question="Which?",
    choices=dict(text=["x", "y"], label=["A", "B"]),
    answerKey="B",
  ),
  "math": dict(problem="1+1?", solution=r"It is $\boxed{2}$.", level="1"),
  "winogrande": dict(
    sentence="A saw B, so _ ran.", option1="A", option2="B", answer="1"
  ),
  "piqa": dict(goal="Sit", sol1="a chair", sol2="a fire", label=0),
  "siqa": dict(
    context="He fell.",
    question="Why?",
    answerA="ice",
    answerB="joy",
    answerC="sun",
    label="1",
  ),
  "hellaswag": dict(
    activity_label="Run",
    ctx_a="He ran.",
    ctx_b="then",
    endings=["he stopped", "it ate"],
    label="0",
  ),
  "boolq": dict(passage="It is red.", question="is it red", label=1),
  "mbpp": dict(
    task_id=11, text="Add.", code="f = 1", test_list=["assert 1"] * 3
  ),
  "agieval": dict(
    passage=None, question="Which?", options=["(A)1", "(B)2"], label="B"
  ),
  "triviaqa": dict(question="Who", answer=dict(aliases=["he", "him"])),
  "nq": dict(question="who did it", answer=["he"]),
  "humaneval": dict(
    task_id="t/0",
    prompt="def f():\n",
    test="def check(f):\n  assert f() == 1",
    entry_point="f",
  ),
  "bbh": dict(input="not True is", target="False"),
}
RECORDS["arc_challenge"] = RECORDS["arc_easy"]
SUBSETS = {"agieval": "sat-math", "bbh": "boolean_expressions"}
OPTIONS = dict(limit=0, cot="", max_gen_toks=4, execute=False)


def write(directory, name, rows):
  """The rows as the file that the benchmark looks for first."""
  file = BENCHMARKS[name].files[0].format(subset=SUBSETS.get(name, ""))
  path = directory / file
  path.parent.mkdir(exist_ok=True, parents=True)
  text = "".join(json.dumps(row) + "\n" for row in rows).encode()
  if path.suffix == ".json":
    text = json.dumps({"examples": rows}).encode()
  path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
  return path


def fill(directory, name, count=9):
  rows = [dict(RECORDS[name]) for _ in range(count)]
  if name == "mbpp":
    rows = [row | {"task_id": i} for i, row in enumerate(rows, 2)] + rows[:1]
  return write(directory, name, rows)


@pytest.fixture(scope="module")
def tiny():
  model = tolerances.make_model(vocab_size=260, max_positions=96)
  spec = Layout(3, 4, "replace")
  return LM(
    model,
    tolerances.make_params(model),
    ByteTokenizer(),
    "tiny",
    coprocessor=Coprocessor(tolerances.make_coprocessor(model, spec), spec),
  )


def test_all_seventeen_with_the_papers_shots():
  shots = {name: b.shots for name, b in BENCHMARKS.items() if b.shots}
  assert len(BENCHMARKS) == 17 and BENCHMARKS["drop"].metric == "f1"
  assert shots == dict(
    mmlu=5, gsm8k=8, drop=3, math=4, mbpp=3, agieval=5, triviaqa=5, nq=5, bbh=3
  )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_is_prepared_from_its_published_file(name, tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  if name == "math":
    pytest.importorskip(
      "math_verify", reason="needs what compares formulas: 'lm_eval[math]'"
    )
  fill(tmp_path, name)
  options = OPTIONS | {"execute": True, "data": tmp_path}
  (found,) = benchmarks.prepare([name], **options)
  (task,) = found.tasks
  benchmark = BENCHMARKS[name]
  assert found.shots == benchmark.shots and found.known_subsets in (
    1,
    9,
    27,
    57,
  )
  task.set_fewshot_seed(seed=0)
  task.build_all_requests()
  request = task.instances[0]
  # As many prompts' last words as there are examples, and its own.
  marks = dict(
    gsm8k="\nA:",
    math="Solution:",
    bbh="A: Let's think",
    nq="A:",
    triviaqa="Answer:",
    mbpp="[BEGIN]",
    drop="How many?",
    mmlu="Answer:",
    agieval="the answer is",
  )
  if name in marks:
    assert request.args[0].count(marks[name]) == benchmark.shots + 1
  # No document is an example of its own.
  own = benchmark.own_examples or benchmark.ids or not benchmark.shots
  assert len(task.eval_docs) == (9 if own else 9 - benchmark.shots) - (
    8 if name == "mbpp" else 0
  )


def test_both_columns_of_the_same_documents(tiny, tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  fill(tmp_path, "piqa")
  rows = [dict(RECORDS["nq"], question=f"who did {i}") for i in range(8)]
  write(tmp_path, "nq", rows)
  said = []
  piqa, nq = benchmarks.run_tasks(
    tiny,
    ["piqa", "nq"],
    data=tmp_path,
    limit=2,
    max_gen_toks=4,
    say=said.append,
  )
  assert [line.split(":")[0] for line in said] == ["PIQA", "NQ"]
  for score in (piqa, nq):
    assert {len(v) for v in score.main.column.values()} == {2}
    assert set(score.main.column) == {FROZEN, AUGMENTED}
  assert piqa.values.keys() == {("acc", "none"), ("acc_norm", "none")}
  assert piqa.met["requests"] == 4 and nq.met["truncated"] == 2
  table = benchmarks.format_scores([piqa, nq])
  assert "| PIQA | 0-shot acc | 2 |" in table
  files = benchmarks.contents([piqa, nq])
  assert files["benchmarks.md"].decode() == table
  assert json.loads(files["benchmarks.json"])[1]["task"] == "nq"


def test_empty_answers_are_wrong(tiny, tmp_path):
  """A decoder that ends at once, where the right answer is nothing."""
  pytest.importorskip("lm_eval", reason=WHY)
  rows = [dict(RECORDS["nq"], answer=[""]) for _ in range(7)]
  write(tmp_path, "nq", rows)
  silent = dataclasses.replace(tiny, stop_ids=tuple(range(260)))
  (score,) = benchmarks.run_tasks(
    silent, ["nq"], data=tmp_path, max_gen_toks=4, latents=False
  )
  assert score.estimate(FROZEN).mean == 0
  assert score.met["frozen empty answers"] == 2
  assert "2 empty answers of the frozen decoder, wrong" in (
    benchmarks.format_scores([score])
  )


def test_differences_are_paired():
  values = benchmarks.Values(
    {FROZEN: (0.0, 1.0, 1.0, 0.0), AUGMENTED: (1.0, 1.0, 0.0, 1.0)}
  )
  assert values.changed == (2, 1)
  difference = values.difference
  assert difference.mean == 0.25
  assert difference.stderr == pytest.approx(0.47871, abs=1e-5)
  low, high = difference.interval
  assert (low + high) / 2 == pytest.approx(0.25) and low < 0 < high


def test_chain_of_thought_replaces_the_examples(tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  fill(tmp_path, "gsm8k")
  options = OPTIONS | {"data": tmp_path, "cot": benchmarks.THOUGHT}
  (found,) = benchmarks.prepare(["gsm8k"], **options)
  (task,) = found.tasks
  task.build_all_requests(limit=1)
  assert task.instances[0].args[0] == (
    "Q: 2 and 2?\nA: Let's think step by step."
  )
  assert found.shots == 0 and found.shown == ("exact_match", "flexible-extract")


def test_limit_is_spread_over_subsets(tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  row = RECORDS["mmlu"]
  subjects = ["anatomy"] * 9 + ["virology"] * 7
  write(tmp_path, "mmlu", [dict(row, subject=s) for s in subjects])
  options = OPTIONS | {"data": tmp_path, "limit": 5}
  (found,) = benchmarks.prepare(["mmlu"], **options)
  assert found.subsets == ("anatomy", "virology")
  assert [len(task.eval_docs) for task in found.tasks] == [3, 2]


@pytest.mark.parametrize(
  ("tasks", "options", "said"),
  [
    (["gsm8"], {}, "task 'gsm8' does not exist; did you mean gsm8k"),
    (["mbpp"], {}, "'mbpp' runs programs .* consent with .*execute=True"),
    (["piqa"], {"cot": "Think."}, "'piqa' has no zero-shot chain of thought"),
    (["gsm8k"], {}, "gsm8k/test.jsonl is missing: put the published file"),
    (["gsm8k"], {"limit": -1}, "limit=-1 must be 0"),
    ([], {}, "no task is named"),
    (["all"], {}, "holds no benchmark's file"),
  ],
)
def test_what_cannot_be_run(tasks, options, said, tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  with pytest.raises(UserError, match=said):
    benchmarks.prepare(tasks, **(OPTIONS | {"data": tmp_path} | options))
  with pytest.raises(UserError, match="nowhere: no such directory"):
    benchmarks.prepare(tasks or ["piqa"], **OPTIONS, data=tmp_path / "nowhere")


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('{"question": "a", "answer": "b"}\n{"question": 1, "answer": "b"}\n',
     r"test.jsonl:2: key 'question' is 1, not a text"),
    ('{"question": "a"}\n', r"test.jsonl:1: key 'answer' is missing"),
    ('{"question": "a",\n', r"test.jsonl:1: not JSON"),
    ("[1]\n", r"test.jsonl:1: not an object"),
    ("\n", r"test.jsonl: holds no record"),
  ],
)  # fmt: skip
def test_files_of_another_form(text, said, tmp_path):
  path = tmp_path / "test.jsonl"
  path.write_text(text)
  with pytest.raises(UserError, match=said):
    benchmark_data.read(path, BENCHMARKS["gsm8k"].forms)


@pytest.mark.parametrize(
  ("name", "change", "said"),
  [
    ("mmlu", {"answer": 4}, ":2: key 'answer' is 4, of 4 choices"),
    ("mmlu", {"answer": True}, ":2: key 'answer' is True, not a whole number"),
    ("arc_easy", {"answerKey": "Z"}, ":2: key 'answerKey' is 'Z', no label"),
    ("winogrande", {"sentence": "A ran."}, ":2: key 'sentence' has no _"),
  ],
)
def test_values_out_of_range(name, change, said, tmp_path):
  path = write(tmp_path, name, [RECORDS[name], RECORDS[name] | change])
  with pytest.raises(UserError, match=said):
    benchmark_data.read(path, BENCHMARKS[name].forms)


def test_programs_pass_or_not():
  right, tests = "def f():\n  return 1\n", "assert f() == 1"
  assert programs.pass_at_1([tests], [[right]]) == 1
  assert (
    programs.pass_at_1([tests] * 2, [right, right.replace("1", "2")]) == 0.5
  )
  # Neither an early exit, nor a loop, nor a flood passes.
  assert not programs.passes("import sys; sys.exit(0)", tests)
  assert not programs.passes("while True: pass", tests, seconds=0.5)
  assert not programs.passes("x = bytearray(1 << 31)\n" + right, tests)
  assert not programs.passes("\0", tests)


def test_scores_equal_lm_evals_own_class(shared_data):
  """Few documents; benchmarks/lm_eval_parity.py prints the table of many."""
  pytest.importorskip("lm_eval", reason=WHY)
  for module in ("torch", "transformers", "accelerate"):
    pytest.importorskip(module, reason="needs pip install 'cacheaug[parity]'")
  parity = runpy.run_path(str(_ROOT / "benchmarks" / "lm_eval_parity.py"))
  decoder = shared_data("tinystories656K")
  answerer = parity["Answerer"](
    cacheaug.load(decoder, dtype="float32"), latents=False, batch=4
  )
  theirs = parity["peer"](str(decoder), answerer, 4)
  ours = parity["AugmentedLM"](answerer=answerer, latents=False)
  data = shared_data("gsm8k", "test.jsonl").parent.parent
  shared_data("winogrande")
  options = OPTIONS | {"limit": 4, "max_gen_toks": 12, "data": data}
  for task in benchmarks.prepare(["winogrande", "gsm8k"], **options):
    found = parity["compare"](ours, theirs, task)
    assert found.same_answers == found.same_metrics == found.documents == 4
    assert found.ours == found.theirs
    assert found.worst <= 1e-6 * max(found.largest, 1)
