"""One module for each question: `python -m experiments.studies.NAME` measures it and writes
experiments/results/NAME.json.

`NAME_cells` holds measurements, `NAME_report` the record, the tables and the figures, where one module would
be too long. No study imports another.
"""
