"""What a step will cost, before anything runs."""
