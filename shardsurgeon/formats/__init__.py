"""Bytes to values and back: every file format read or written. Knows no files and no experts."""
