"""What a sweep file says, and the runs that come of it.

A sweep file is a config file (`get_config`, the base experiment) that has
`get_sweep` as well. A row is that experiment with some keys changed; it is run
once a seed.
"""

import dataclasses
import re
import runpy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from cacheaug import config as configs
from cacheaug import flops, sharding, validate
from cacheaug.build import abstract_arguments, described_model, parameters
from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.run import command, workdir

# What the report compares must be on the same tokens.
SAME_KEYS = ("eval.sequences", "eval.ahead", "eval.problems", "data.sequence")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a sweep: the base experiment with some keys changed.

  Attributes:
    name: of its runs' directories, NAME-seedK.
    overrides: config key -> value.
    seeds: one run each.
    flop_of: another row, whose training FLOP this one's steps are to need:
      optimizer.steps is computed. '' leaves the steps alone.
  """

  name: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: tuple[int, ...] = (0,)
  flop_of: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What `get_sweep` returns.

  Attributes:
    rows: in the order of running and of the report.
    reference: the row that others are compared with besides the frozen
      decoder, or ''.
    axis: a key whose values become the x axis of the scaling plot; rows that
      differ in it alone make a curve. decoder.path stands for the decoder's
      size. '' for no such plot.
  """

  rows: tuple[Row, ...]
  reference: str = ""
  axis: str = ""


@dataclasses.dataclass(frozen=True)
class Built:
  """A row's config, checked, and what it costs.

  Attributes:
    row: as the file has it.
    flags: of `python -m cacheaug.main` for it, but for seed and workdir.
    config: resolved; its seed is the first.
    model: the decoder's shape.
    trained: parameters that training changes.
    frozen: parameters that are used beside them, unchanged.
    step: useful FLOP of a training step.
  """

  row: Row
  flags: tuple[str, ...]
  config: ConfigDict
  model: ModelConfig
  trained: int
  frozen: int
  step: float

  @property
  def flop(self) -> float:
    """Of the whole training."""
    return self.step * self.config.optimizer.steps

  @property
  def augmentation(self) -> float | None:
    """FLOP that an augmentation adds to decoding; None: it has no latents."""
    if self.config.objective == "language_model":
      return None
    return flops.augmentation(self.model, flops.sizes_of(self.config)).total

  @property
  def token(self) -> float:
    """FLOP of a token decoded after data.sequence others and the latents."""
    sizes = flops.sizes_of(self.config)
    if self.config.objective == "language_model":
      sizes = dataclasses.replace(sizes, latents=0)
    return flops.token(self.model, sizes).total


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a row."""

  built: Built
  seed: int
  workdir: Path

  @property
  def name(self) -> str:
    """Of its directory."""
    return self.workdir.name

  @property
  def config(self) -> ConfigDict:
    """The row's, with this seed."""
    config = ConfigDict(self.built.config.copy_and_resolve_references())
    config.seed = self.seed
    return config

  @property
  def flags(self) -> tuple[str, ...]:
    """All of `python -m cacheaug.main`."""
    seed, directory = f"--config.seed={self.seed}", f"--workdir={self.workdir}"
    return (*self.built.flags, seed, directory)


def base_of(sweep_file: str, base: str) -> ConfigDict:
  """The experiment of another config file, named from the sweep file's own."""
  path = Path(sweep_file).resolve().parent / base
  return runpy.run_path(str(path))["get_config"]()


def load(config_file: str) -> Sweep:
  """`get_sweep` of 'FILE' or 'FILE:ARGUMENT', its names checked.

  Raises:
    UserError: a file without one, no rows, names that clash.
  """
  path, colon, argument = config_file.partition(":")
  found = runpy.run_path(path)
  if "get_sweep" not in found:
    raise UserError(
      f"--config={config_file} is one experiment, it has no get_sweep(): give "
      "one of configs/sweeps/, or run it with python -m cacheaug.main"
    )
  sweep = found["get_sweep"](*([argument] if colon else []))
  try:
    _check_names(sweep)
  except UserError as e:
    raise UserError(f"{config_file}: {e}") from e
  return sweep


def only(sweep: Sweep, pattern: str) -> Sweep:
  """The rows and seeds whose NAME-seedK the regular expression finds.

  Raises:
    UserError: a pattern that is none, or finds nothing.
  """
  try:
    found = re.compile(pattern)
  except re.error as e:
    raise UserError(f"--only={pattern!r} is no regular expression: {e}") from e
  rows = []
  for row in sweep.rows:
    seeds = tuple(s for s in row.seeds if found.search(f"{row.name}-seed{s}"))
    if seeds:
      rows.append(dataclasses.replace(row, seeds=seeds))
  if not rows:
    names = ", ".join(row.name for row in sweep.rows)
    raise UserError(f"--only={pattern!r} finds none of the rows {names}")
  return dataclasses.replace(sweep, rows=tuple(rows))


def _check_names(sweep: Sweep) -> None:
  if not sweep.rows:
    raise UserError("a sweep needs at least one row")
  names = [row.name for row in sweep.rows]
  for name in names:
    if not _NAME.fullmatch(name):
      raise UserError(
        f"row {name!r}: a name is letters, digits, '_', '-' and '.'"
      )
  directories = [f"{r.name}-seed{s}" for r in sweep.rows for s in r.seeds]
  for each in (names, directories):
    twice = sorted({name for name in each if each.count(name) > 1})
    if twice:
      raise UserError(f"{', '.join(twice)} comes twice: rows and seeds differ")
  for row in sweep.rows:
    if not row.seeds:
      raise UserError(f"row {row.name} has no seeds: give at least one")
    if "seed" in row.overrides:
      raise UserError(f"row {row.name} overrides seed: write it in its seeds")
    if row.overrides.get("export") and len(row.seeds) > 1:
      raise UserError(
        f"row {row.name}: its {len(row.seeds)} seeds would write to one export"
      )
    # One that takes its own from a third could go in a circle.
    others = [other.name for other in sweep.rows if not other.flop_of]
    if row.flop_of and row.flop_of not in others:
      raise UserError(
        f"row {row.name}: flop_of={row.flop_of!r} is no row with steps of its "
        f"own{configs.nearest(row.flop_of, others)}"
      )
  if sweep.reference and sweep.reference not in names:
    raise UserError(
      f"reference={sweep.reference!r} is no row"
      f"{configs.nearest(sweep.reference, names)}"
    )


def build(
  sweep: Sweep, config_file: str, given: Mapping[str, Any], *, pattern: str = ""
) -> list[Built]:
  """Every row's config, built as the run itself will build it, and checked.

  Args:
    sweep: of `load`.
    config_file: the sweep's own.
    given: keys set on the command line, for all rows.
    pattern: of `only`; rows that it leaves out are not looked at.

  Raises:
    UserError: naming the row.
  """
  rows = {row.name: row for row in sweep.rows}
  found = []
  for row in only(sweep, pattern).rows:
    try:
      found.append(_build(row, rows, config_file, given))
    except UserError as e:
      raise UserError(f"{config_file}: row {row.name}: {e}") from e
  _check_same(config_file, found)
  known = list(keys(found[0].config))
  if sweep.axis and sweep.axis not in known:
    raise UserError(
      f"{config_file}: axis={sweep.axis!r} is no config key"
      f"{configs.nearest(sweep.axis, known)}"
    )
  return found


def _build(
  row: Row, rows: Mapping[str, Row], config_file: str, given: Mapping[str, Any]
) -> Built:
  for key in ("seed", *row.overrides):
    if key in given:
      raise UserError(
        f"--config.{key}={given[key]!r} cannot be given: the sweep sets it"
      )
  changes = {**given, **row.overrides}
  built = _checked(row, config_file, changes)
  if not row.flop_of:
    return built
  flop = _build(rows[row.flop_of], rows, config_file, given).flop
  steps = max(1, round(flop / built.step))
  return _checked(row, config_file, {**changes, "optimizer.steps": steps})


def _checked(row: Row, config_file: str, changes: Mapping[str, Any]) -> Built:
  argv = [f"--config={config_file}"]
  argv += [f"--config.{key}={value}" for key, value in changes.items()]
  config = parse(argv)
  config.seed = row.seeds[0]
  mesh = config.mesh
  # The fewest that it can run on; a run looks at its own machine again.
  devices = mesh.fsdp * mesh.tensor * mesh.slices * max(mesh.data, 1)
  validate.check_config(config, devices)
  model = described_model(config)
  state, decoder, _ = abstract_arguments(
    config, model, sharding.abstract_mesh(config, devices)
  )
  trained, frozen = parameters(state.params), parameters(decoder)
  if config.objective == "language_model" and trained >= frozen:
    frozen = 0  # The decoder that it starts from is replaced.
  return Built(
    row=row,
    flags=tuple(argv),
    config=config,
    model=model,
    trained=trained,
    frozen=frozen,
    step=flops.of_step(config, model).total,
  )


def parse(argv: list[str]) -> ConfigDict:
  """The config that `python -m cacheaug.main` makes of these flags.

  Raises:
    UserError: an unknown key, a value of the wrong type.
  """
  values = flags.FlagValues()
  argv = ["main", *argv]
  config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=argv
  )
  try:
    with warnings.catch_warnings():
      # ml_collections loads a file by a call that Python means to drop.
      warnings.simplefilter("ignore", DeprecationWarning)
      values(argv)
    config = values["config"].value
    list(config)
  except Exception as e:  # A config file is code and may raise anything.
    raise UserError(command.explain(argv, e)) from e
  given = config_flags.get_override_values(values["config"])
  return configs.resolve(config, given=given)


def keys(config: ConfigDict) -> dict[str, Any]:
  """Every key that is not a dictionary, `a.b.c` -> value."""
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def _check_same(config_file: str, found: list[Built]) -> None:
  first = keys(found[0].config)
  for built in found[1:]:
    here = keys(built.config)
    for key in SAME_KEYS:
      if first[key] != here[key]:
        raise UserError(
          f"{config_file}: row {built.row.name} has {key}={here[key]}, row "
          f"{found[0].row.name} {first[key]}: rows are compared on the same "
          "tokens, let it be the same in all"
        )


def runs_of(built: list[Built], directory: Path) -> list[Run]:
  """All runs in order: every row's first seed, then the second ones, ...

  So that a sweep that is cut short has something of every row.

  Raises:
    UserError: a directory that holds a run of another config.
  """
  most = max(len(b.row.seeds) for b in built)
  runs = [
    Run(b, b.row.seeds[i], directory / f"{b.row.name}-seed{b.row.seeds[i]}")
    for i in range(most)
    for b in built
    if i < len(b.row.seeds)
  ]
  for run in runs:
    workdir.check(run.config, str(run.workdir))
  return runs


def quietly() -> None:
  """The parent computes nothing: no accelerator, no logs of models."""
  jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.WARNING)
