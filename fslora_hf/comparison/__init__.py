"""Comparisons: methods, seeds, rank laws and settings against each other, from one YAML file to a report.

`arguments` reads the file, `runs` says which runs it means, `folder` keeps what lies on disk, `launching` runs or
resumes each, `results` reads what they left, `summary` computes the numbers, and `tables`, `figures` and `page` show
them.
"""
