"""A GPT on Python's own sources, in bf16 and in FP8: ``python examples/gpt``."""
