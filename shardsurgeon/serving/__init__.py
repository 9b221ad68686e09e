"""Pruned models that no one wrote: views, and plans of a model, loaded by engines as they are."""
