"""Benchmarks: `rlhf bench`, or `python -m rlhf_engine.bench`.

case.py says what a benchmark is, clock.py how it is timed, suite.py that its answer comes first; ops_cases.py,
head_cases.py and engine_bench.py hold what is measured, peers/ and engine_trl.py with whom it is compared, records.py
what comes out. learning.py measures no time: it shows whether PPO learns.
"""
