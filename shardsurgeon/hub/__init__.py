"""Putting a pruned model on the Hugging Face Hub: its card, its files, one commit."""
