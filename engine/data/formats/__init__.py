"""Formats of raw files: bytes in, rows out. What `prepare` and the sources of examples share."""
