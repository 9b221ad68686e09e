"""A plan becomes bytes, in a folder or uploaded. Knows byte ranges and no experts."""
