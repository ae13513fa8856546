"""Benchmarks, run from the repository: `python -m bench ops|tree|step|resources` (also `pact-fast bench`).

main.py: the sub-commands. registry.py: ops x providers x shapes. runner.py: gate, times, memory. rows.py: the
CSV rows.
"""
