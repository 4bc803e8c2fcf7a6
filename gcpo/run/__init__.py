"""A run around the trainer: its meter, records, checkpoints, guards, processes and what it is given."""
