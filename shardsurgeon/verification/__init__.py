"""A pruned model checked against its source, sharing nothing with what planned and wrote it."""
