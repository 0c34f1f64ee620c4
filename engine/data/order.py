"""The names of the orders in which loaders give samples, saved with every checkpoint.

A position of a checkpoint means something only in the order it was counted in. Change a name with anything that
changes what a position reads, so that a run never goes on in another order without a word.
"""

from __future__ import annotations

TOKENS = "tokens-2"  # samples.py and blend.py: groups of documents, keyed blocks, a blend in closed form
ROWS = "rows-1"  # packing.py, one source
BLENDED_ROWS = "rows-2"  # packing.py and blend.py
BEFORE_NAMES = "rows-1"  # what the rows of a checkpoint without a name are, which had no other order with one source
