"""The life of one process of a run, whatever command it runs: its start, its peers, its model, its exit status."""
