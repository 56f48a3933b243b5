"""The masks of whole sequences, written from the definition.

The reference that tests hold the fast path to, and what drawings show; nothing
in training forms them.
"""

import numpy as np

from cacheaug.augment.traces import Layout


def dense_mask(
  documents: np.ndarray,  # [S]
  points: np.ndarray,  # [M]
  layout: Layout,
) -> np.ndarray:  # [S + M R, S + M R] bool
  """The reference mask of one sequence, written from the definition.

  Windows are not in it: they compare positions and are the model's business.
  """
  s, r = len(documents), layout.rows
  real = documents >= 0  # padding sees and is seen by nothing
  segments = documents if layout.mask_documents else np.zeros(s, int)
  mask = np.zeros((s + len(points) * r,) * 2, bool)
  for q in range(s):
    for k in range(q + 1):
      mask[q, k] = real[q] and real[k] and segments[q] == segments[k]
  for m, p in enumerate(points):
    first = s + m * r
    seen = p - layout.latents if layout.positions == "replace" else p
    begin = max(p - layout.window + 1, 0) if layout.window else 0
    for i in range(r):
      for k in range(begin, seen + 1):
        mask[first + i, k] = real[k] and segments[k] == segments[p]
      mask[first + i, first : first + i + 1] = True
    if layout.reruns:  # the second x[p] is only a query
      mask[:, first + layout.latents] = False
  return mask


def dense_latent_mask(
  documents: np.ndarray,  # [S]
  points: np.ndarray,  # [M]
  layout: Layout,
  late: np.ndarray | None = None,  # [M]
) -> np.ndarray:  # [M N, S + M N] bool
  """The reference mask of the coprocessor's rows, from the definition.

  Whatever the scheme, they see the whole context that has been read; but of
  `handover`, where they start as the hidden entries, what those have seen.
  """
  s, n = len(documents), layout.latents
  segments = documents if layout.mask_documents else np.zeros(s, int)
  mask = np.zeros((len(points) * n, s + len(points) * n), bool)
  for m, p in enumerate(points):
    last = p if late is None else p - late[m]
    last -= layout.latents if layout.stands_in else 0
    for i in range(m * n, m * n + n):
      for k in range(last + 1):
        mask[i, k] = documents[k] >= 0 and segments[k] == segments[p]
      mask[i, s + m * n : s + i + 1] = True
  return mask
