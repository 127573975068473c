"""Chooses γ and the layers to skip by measured costs and acceptance. See docs/tuning.md.

acceptance.py counts the correct draft tokens on the model's own texts, costs.py times the passes,
search.py looks for sets of layers, plan.py combines them, and report.py has tables and pictures.
The command is in commands/tune.py, and storage/tuning.py keeps the choice.
"""
