"""What a run did: its diagnosis, its plots, its page."""
