"""Scores and the anatomy of a model become keep-lists, and keep-lists a plan."""
