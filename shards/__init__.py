"""Where it lives: workers, their Ray actor shells, executors and the group that heals them."""
