"""Scores from running the model: one decoder layer at a time, straight from the shards.

A wing of its own, and the only one that needs torch; what it gives to the rest is a score file.
Importing it loads nothing heavy.
"""
