"""`shardsurgeon scores`: one module per kind of command; the group is in `group`."""
