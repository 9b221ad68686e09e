"""File formats, each read and checked from bytes: no files, no network, no models."""
