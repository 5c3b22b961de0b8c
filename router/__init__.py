"""What goes where: sequences, scheduling, KV blocks, placement, token dispatch and transport.

Nothing here imports Ray. Only the dispatcher with its permutation and expert calls, and
`router.transport.tensors`, import torch.
"""
