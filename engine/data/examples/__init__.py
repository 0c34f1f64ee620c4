"""Examples for supervised and preference learning: tokenized once into a store, packed into rows, read by position."""
