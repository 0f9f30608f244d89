"""The networks of Sabour, Frosst, Hinton (2017), their data sets and their training.

`python -m model.train`, `model.evaluate`, `model.predict`, `model.figures` are the commands.
"""
