"""What `benchmarks/chaos.py` is made of: open-loop load, faults of every kind, and the accounts."""
