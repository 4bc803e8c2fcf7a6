"""Tasks, benchmarks and their verifiers; pass@1 and pass@k."""
