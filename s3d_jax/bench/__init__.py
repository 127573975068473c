"""The benchmark: prompts through several methods, in turns, in one process. See docs/benchmarks.md.

suites.py has the prompts, contestants.py those who run, measure.py the turns they take, report.py
tables and pictures, command.py the command `s3d bench`.
"""
