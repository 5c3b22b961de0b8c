"""What is computed: DBRX, PhiMoE and Jamba as pure PyTorch on packed variable-length batches.

One file per family; `layers/` holds what is truly identical. Nothing here imports Ray.
"""
