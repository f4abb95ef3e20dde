"""Trainers of transformers and TRL that run a federation, and what they are made of."""
