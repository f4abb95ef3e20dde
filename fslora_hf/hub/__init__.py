"""Rounds on the Hugging Face Hub: the queue on disk, the uploads, the model card, and what is read back.

Importing the package imports none of its modules: the client of the Hub is not needed by a run that pushes nothing.
"""
