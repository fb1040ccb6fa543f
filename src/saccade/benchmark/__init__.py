"""Benchmarks of the operator: the registry of workloads, the peers, the clock."""
