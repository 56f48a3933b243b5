"""lm_eval's own tasks over local documents; imports lm_eval."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from cacheaug.errors import UserError, one_line
from cacheaug.projects.lm_eval import benchmark_data, programs
from cacheaug.projects.lm_eval.benchmark_data import Record, Records
from cacheaug.projects.lm_eval.benchmark_tasks import BENCHMARKS, Benchmark

# lm_eval's own seed of drawn examples.
_EXAMPLES_SEED = 1234
# Where documents come from is ours; the rest of a task file is lm_eval's.
_REPLACED = (
  "dataset_path",
  "dataset_name",
  "dataset_kwargs",
  "training_split",
  "validation_split",
  "fewshot_split",
  "should_decontaminate",
  "doc_to_decontamination_query",
  "tag",
  "group",
  "task_alias",
)
_TASKS = pathlib.Path(lm_eval.evaluator.__file__).parent / "tasks"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A benchmark ready to be run; attributes as of `benchmarks.Score`."""

  name: str
  tasks: list[ConfigurableTask]
  shots: int
  shown: tuple[str, str]
  subsets: tuple[str, ...]
  known_subsets: int
  files: tuple[str, ...]
  cot: str


@dataclasses.dataclass(frozen=True)
class _Subset:
  name: str
  records: Records
  examples: list[Record] | None  # None: the file's first documents are


def prepare(
  name: str,
  *,
  data: str | pathlib.Path,
  limit: int,
  cot: str,
  max_gen_toks: int,
  execute: bool,
) -> Prepared:
  """Reads a benchmark's files and makes its tasks; as `run_tasks`."""
  benchmark, data = BENCHMARKS[name], pathlib.Path(data).expanduser()
  known, found, files = _subsets(name, benchmark, data)
  shots, tasks, docs = 0, [], []
  for subset in found:
    count = 3 if subset.name in benchmark.passages else benchmark.shots
    shots = max(shots, 0 if cot else count)
    docs.append(_documents(benchmark, subset, 0 if cot else count))
  for subset, (test, examples), most in zip(
    found, docs, _spread(limit, [len(test) for test, _ in docs]), strict=True
  ):
    if not most:
      continue
    config = _config(benchmark, subset.name, name)
    config |= {
      "task": f"{name}/{subset.name}" if subset.name else name,
      "dataset_path": "local",
      "test_split": "test",
      "num_fewshot": _shots(benchmark, subset, cot),
      "custom_dataset": _dataset(test[:most], examples),
    }
    if examples is not None:
      config["fewshot_split"] = "examples"
      config["fewshot_config"] = _shown_as(config, subset, examples)
    if subset.records.processed:
      config["process_docs"] = None
    if name == "mbpp":
      config["fewshot_config"] = _mbpp_examples(subset.records)
    if cot:
      config["doc_to_text"] = _thinking(config["doc_to_text"], cot)
    if max_gen_toks and config["output_type"] == "generate_until":
      kwargs = dict(config.get("generation_kwargs") or {})
      config["generation_kwargs"] = kwargs | {"max_gen_toks": max_gen_toks}
    tasks.append(ConfigurableTask(config=config))
  shown = benchmark.thought_filter if cot else benchmark.filter
  return Prepared(
    name=name,
    tasks=tasks,
    shots=shots,
    shown=(benchmark.metric, shown),
    subsets=tuple(
      task.config.task.removeprefix(f"{name}/")
      for task in tasks
      if "/" in task.config.task
    ),
    known_subsets=len(known),
    files=tuple(str(path.relative_to(data)) for path in files),
    cot=cot,
  )


def evaluate(model: LM, tasks: list[ConfigurableTask]) -> list[dict[str, Any]]:
  """Every document's answers and metrics, in order, by task and filter."""
  for task in tasks:
    task.set_fewshot_seed(seed=_EXAMPLES_SEED)
  results = lm_eval.evaluator.evaluate(
    lm=model,
    task_dict={"tasks": {t.config.task: t for t in tasks}, "groups": {}},
    bootstrap_iters=0,
    confirm_run_unsafe_code=True,  # asked for before
  )
  return [s for t in tasks for s in results["samples"][t.config.task]]


def is_empty(sample: dict[str, Any]) -> bool:
  """Whether a document was answered by text, and by none."""
  answers = sample["resps"][0]
  return isinstance(answers[0], str) and not answers[0].strip()


def _shots(benchmark: Benchmark, subset: _Subset, cot: str) -> int:
  if cot:
    return 0
  return 3 if subset.name in benchmark.passages else benchmark.shots


def _subsets(
  name: str, benchmark: Benchmark, data: pathlib.Path
) -> tuple[list[str], list[_Subset], list[pathlib.Path]]:
  """(names that there are, those whose documents are there, files read)."""
  known = [""]
  if "{subset}" in benchmark.yaml:
    before, after = (_TASKS / benchmark.yaml).name.split("{subset}")
    paths = (_TASKS / benchmark.yaml).parent.glob(f"{before}*{after}")
    names = (p.name.removeprefix(before).removesuffix(after) for p in paths)
    known = sorted(n for n in names if _is_subset(name, n))
  found, files = [], []
  if benchmark.by:
    path = _needed(name, benchmark, data, "")
    records = benchmark_data.read(path, benchmark.forms, (benchmark.by,))
    shown = _examples(benchmark, data, "")
    files += [path, *([shown.path] if shown else [])]
    for subset in known:
      mine = _only(records.rows, benchmark.by, subset)
      theirs = _only(shown.rows, benchmark.by, subset) if shown else None
      if mine:
        part = dataclasses.replace(records, rows=mine)
        found.append(_Subset(subset, part, theirs))
    strange = {row[benchmark.by] for row in records.rows} - set(known)
    if strange:
      raise UserError(
        f"{path}: {benchmark.by} {sorted(strange)[0]!r} is none of the "
        f"{len(known)} that {name} has"
      )
    return known, found, files
  for subset in known:
    path = benchmark_data.find(data, _paths(benchmark.files, subset))
    if path is None:
      continue
    shown = _examples(benchmark, data, subset)
    files += [path, *([shown.path] if shown else [])]
    records = benchmark_data.read(path, benchmark.forms)
    found.append(_Subset(subset, records, shown.rows if shown else None))
  if not found:
    _needed(name, benchmark, data, known[0])
  return known, found, files


def _is_subset(name: str, subset: str) -> bool:
  """Whether a task file that a pattern finds is of the benchmark."""
  if name == "agieval":  # The English ones, as the Gemma reports.
    chinese = ("gaokao", "jec", "logiqa-zh", "agieval")
    return not subset.startswith(chinese)
  return not subset.startswith("_")


def _paths(names: tuple[str, ...], subset: str) -> tuple[str, ...]:
  return tuple(name.format(subset=subset) for name in names)


def _needed(
  name: str, benchmark: Benchmark, data: pathlib.Path, subset: str
) -> pathlib.Path:
  paths = _paths(benchmark.files, subset)
  path = benchmark_data.find(data, paths)
  if path is None:
    raise UserError(
      f"task {name!r}: {' or '.join(str(data / p) for p in paths)} is missing: "
      "put the published file there, or leave the task out"
    )
  return path


def _examples(
  benchmark: Benchmark, data: pathlib.Path, subset: str
) -> Records | None:
  path = benchmark_data.find(data, _paths(benchmark.examples, subset))
  keep = (benchmark.by,) if benchmark.by else ()
  return benchmark_data.read(path, benchmark.forms, keep) if path else None


def _only(rows: list[Record], key: str, value: str) -> list[Record]:
  return [row for row in rows if row[key] == value]


def _documents(
  benchmark: Benchmark, subset: _Subset, shots: int
) -> tuple[list[Record], list[Record] | None]:
  """(documents to evaluate, worked examples where the task brings none)."""
  rows = subset.records.rows
  if benchmark.ids:
    rows = [row for row in rows if row["task_id"] in benchmark.ids]
  own = benchmark.own_examples or benchmark.ids
  if not shots or own:
    examples = None
  elif subset.examples is not None:
    examples = subset.examples
  else:
    rows, examples = rows[shots:], rows[:shots]
  if not rows or (examples is not None and len(examples) < shots):
    raise UserError(
      f"{subset.records.path}: {len(subset.records.rows)} records are too few "
      f"for {shots} worked examples and one document"
    )
  return rows, examples


def _spread(limit: int, sizes: list[int]) -> list[int]:
  """Documents to take of each subset; `limit` in all, 0 for every one."""
  if not limit:
    return sizes
  taken = [0] * len(sizes)
  left = min(limit, sum(sizes))
  while left:
    for i, size in enumerate(sizes):
      if left and taken[i] < size:
        taken[i] += 1
        left -= 1
  return taken


def _dataset(
  test: list[Record], examples: list[Record] | None
) -> Callable[..., datasets.DatasetDict]:
  splits = {"test": datasets.Dataset.from_list(test)}
  if examples is not None:
    splits["examples"] = datasets.Dataset.from_list(examples)
  return lambda **_: datasets.DatasetDict(splits)


def _config(benchmark: Benchmark, subset: str, name: str) -> dict[str, Any]:
  """lm_eval's task file, without where its documents come from."""
  path = _TASKS / benchmark.yaml.format(subset=subset)
  try:
    # Those that execute would fetch their metric; theirs is ours.
    config = load_yaml(path, resolve_func=not benchmark.executes)
  except (ImportError, AssertionError) as e:
    raise UserError(
      f"task {name!r}: {one_line(e, 1000)}: pip install 'lm_eval[math]'"
    ) from e
  except OSError as e:
    raise UserError(
      f"task {name!r}: this lm_eval has no {path.name}: pip install "
      "'cacheaug[eval]'"
    ) from e
  config = {k: v for k, v in config.items() if k not in _REPLACED}
  if benchmark.executes:
    config["metric_list"] = [
      {
        "metric": programs.pass_at_1,
        "aggregation": "mean",
        "higher_is_better": True,
      }
    ]
  if name == "humaneval":
    complete = {"function": "custom", "filter_fn": _after_prompt}
    config["filter_list"] = [{"name": benchmark.filter, "filter": [complete]}]
  return config | dict(benchmark.set)


def _after_prompt(
  answers: list[list[str]], docs: list[Record]
) -> list[list[str]]:
  """Programs: each prompt is a function's head."""
  return [
    [doc["prompt"] + answer for answer in some]
    for some, doc in zip(answers, docs, strict=True)
  ]


def _shown_as(
  config: dict[str, Any], subset: _Subset, examples: list[Record]
) -> dict[str, Any]:
  """Task keys that choose worked examples and write their answers."""
  shown = dict(config.get("fewshot_config") or {})
  if subset.examples is None:
    shown["sampler"] = "first_n"
  if "gold" in examples[0]:  # Several right choices; an example shows one.
    shown["doc_to_target"] = "{{gold[0]}}"
  return shown


def _mbpp_examples(records: Records) -> dict[str, Any]:
  """Problems 2, 3 and 4, as the published prompt has them."""
  rows = {row["task_id"]: row for row in records.rows}
  missing = [i for i in (2, 3, 4) if i not in rows]
  if missing:
    raise UserError(
      f"{records.path}: task_id {missing[0]} is missing, a worked example of "
      "the prompt: give the whole file"
    )
  samples = [{**rows[i], "is_fewshot": True} for i in (2, 3, 4)]
  return {"sampler": "first_n", "samples": samples}


def _thinking(
  prompt: str | Callable[[Record], str], cot: str
) -> str | Callable[[Record], str]:
  """The prompt, and the words that ask for a chain of thought."""
  if isinstance(prompt, str):
    return f"{prompt} {cot}"
  return lambda doc: f"{prompt(doc)} {cot}"
