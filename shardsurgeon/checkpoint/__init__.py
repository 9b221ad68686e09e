"""An opened model: its headers, its config, and what each of its tensors is."""
