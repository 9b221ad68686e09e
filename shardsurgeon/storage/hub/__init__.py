"""The Hugging Face Hub: reading a commit by ranges, and pushing to a repository."""
