"""Faults, each with real processes on loopback; `python -m tests.faults` runs them and writes docs/faults.md."""
