"""Metrics of the paper's section 3, and the benchmarks they are measured on."""
