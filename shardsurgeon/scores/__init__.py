"""Expert scores: the files that hold them, tables of them, and baselines to compare with."""
