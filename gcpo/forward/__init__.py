"""Forwards of the policy that read what several sequences share once: generation, scores, representations."""
