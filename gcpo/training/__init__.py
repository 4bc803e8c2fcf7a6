"""A run around the trainer: the command, checkpoints, records, time and tokens, and what guards it."""
