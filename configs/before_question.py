"""Latents right after the facts, before any question: offline deliberation.

  python -m cacheaug.main --config=configs/before_question.py \
      --workdir=runs/before_question
  python benchmarks/before_question.py --workdir=runs/before_question

The cycles and the decoder of configs/quickstart.py, but latents stand where the
facts end, and six questions come after, which the coprocessor cannot know and
which are not learned: the answers alone are. Figures:
docs/results/before_question.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import base_of

QUESTIONS = 6
TOKENS = 4  # a question of two, its answer, its line's end


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = base_of(__file__, "quickstart.py")
  c.coprocessor.latents = 8
  c.traces.count = 1
  c.traces.ahead = QUESTIONS * TOKENS
  c.data.sources.hops.questions = QUESTIONS
  c.data.sources.hops.answers_from = "after_facts"
  c.data.sources.hops.validation_sequences = 1024
  c.data.sequence = 25 + QUESTIONS * TOKENS
  c.eval.sequences = 1024
  c.eval.ahead = QUESTIONS * TOKENS
  c.eval.problems = 0
  c.eval.beside = ConfigDict()
  return c
