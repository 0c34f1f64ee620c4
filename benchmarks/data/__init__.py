"""Data jobs: a module each with ``UNIT``, ``SIZE``, ``BAR``, ``make``, ``SIDES``, ``compare``; see bench_data.py."""
