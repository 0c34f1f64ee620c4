"""Process groups (before the model), wrapping (after it), and the adaptor for machines without a GPU.

Importing this package comes before any import of Megatron: the packages above it do so in their ``__init__``.
"""

from engine.parallel import jit

jit.install()
