"""``python -m jaxinfer.doctor``: can this machine, or this job, run jaxinfer, and what is to be done if not."""
