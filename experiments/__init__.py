"""The tables and figures of the papers as programs, one file each; `python -m experiments --help`.

scale.py says how much, texts.py of what, models.py with which language models; lab.py computes once what all of them
mix; verdicts.py decides; records.py keeps and page.py shows what came out. table.py lists the experiments.
"""
