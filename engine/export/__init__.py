"""Models of the engine in the forms of others, and back: Hugging Face directories, GGUF, adapters."""
