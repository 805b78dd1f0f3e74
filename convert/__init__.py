"""Hugging Face folder in, jaxinfer checkpoint out: ``python -m convert --help``."""

VERSION = "2"  # of what is written: raised when the same source would give other leaves
