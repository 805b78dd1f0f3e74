"""Declared experiments, measured by commands that anyone can paste: `python -m jaxinfer.study`."""
