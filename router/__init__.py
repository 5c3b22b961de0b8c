"""What goes where: sequences, scheduling, KV blocks, placement, token dispatch and transport.

Nothing here imports Ray; only `router.dispatcher` and `router.transport` may import torch.
"""
