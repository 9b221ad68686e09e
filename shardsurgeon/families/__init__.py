"""Model families, as data: one TOML file each, read and checked by `schema`."""
