"""The benchmark: prompts through several methods, in turns, in one process. See docs/bench.md.

contestants.py has the methods that run, measure.py the turns they take, report.py tables and
pictures. The prompts are in texts/suites.py, the command `s3d bench` in commands/bench.py.
"""
