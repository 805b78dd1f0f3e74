"""Whether a model fits on GPUs, on which layouts, and how fast it will be: `python -m jaxinfer.plan`."""
