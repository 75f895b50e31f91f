"""Measurements that no test makes: `python -m benchmarks.chain`, `python -m benchmarks.overhead`."""
