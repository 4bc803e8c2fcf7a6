"""What GCPO adds to a rollout: colliders, contexts, causal weights, and the step that puts them together."""
