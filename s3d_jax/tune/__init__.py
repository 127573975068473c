"""Choosing γ and the layers to skip by what they cost and what they are worth. See docs/tuning.md.

acceptance.py has the model's own texts and what a draft gets right of them, costs.py the times of
the passes, search.py the sets of layers, plan.py all of it together, report.py table and picture,
The command is in s3d_jax/commands/tune.py. What is kept of it is in s3d_jax/storage/tuning.py.
"""
