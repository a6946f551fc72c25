"""Evaluation: benchmarks in their official formats, the runner, statistics, and what compares results.

The interface of a benchmark is `mmkv.eval.task.Task`; `mmkv.eval.runner.run` runs methods over one and writes a result folder.
"""
