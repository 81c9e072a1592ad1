"""Benchmarks. `python -m tests.bench` compares servers; tests run it, but never judge its numbers."""
