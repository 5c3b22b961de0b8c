"""Conclave beside its peers on the same cores: a process and an environment per engine."""
