"""The data jobs, each a module with ``UNIT``, ``SIZE``, ``BAR``, ``make``, ``SIDES`` and ``compare``: see bench_data.py."""
