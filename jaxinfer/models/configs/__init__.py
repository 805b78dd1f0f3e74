"""A file per family: what its ``config.json`` says, and the leaves of its layers. No JAX: converting needs none."""
