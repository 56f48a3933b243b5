"""The paper's benchmarks, with lm_eval's own metrics."""
