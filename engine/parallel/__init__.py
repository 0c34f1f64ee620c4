"""Process groups (before the model), wrapping (after it), and the adaptor for machines without a GPU."""
