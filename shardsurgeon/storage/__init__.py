"""Where bytes are and how they are encoded. Knows nothing of what tensors mean."""
