"""Paged attention in C: what a batch and a layer tell it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.interface import BatchMeta, KVCache
from models.kernels.functions import ELEMENT_TYPES, address, function, together

MAX_HEAD_DIM = 512

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class AttentionCall(ctypes.Structure):
    """`struct attention` of attention.c; what a batch decides is filled in once per batch."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "keys", "values", "out")),
        *((name, _I64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, _POINTER) for name in ("query_starts", "starts", "slots", "tables")),
        *((name, _I64) for name in ("num_seqs", "num_tokens", "num_rows", "table_width")),
        *((name, _I64) for name in ("block_size", "heads", "kv_heads", "head_dim", "window")),
        *((name, _I64) for name in ("type", "threads")),
    )


class PagedBatch:
    """A batch in the form that the kernel reads: the same for all layers of a stage."""

    def __init__(self, meta: BatchMeta, block_size: int) -> None:
        starts = torch.tensor(meta.starts, dtype=torch.int64)
        query_starts = torch.tensor(meta.query_starts, dtype=torch.int64)
        tables, slots = meta.block_tables.contiguous(), meta.slot_mapping.contiguous()
        # The call holds addresses: what they point to must live as long.
        self._kept = (starts, query_starts, tables, slots)
        self.num_rows = meta.num_rows
        self.block_size = block_size
        self._call = AttentionCall(
            query_starts=query_starts.data_ptr(),
            starts=starts.data_ptr(),
            slots=slots.data_ptr(),
            tables=tables.data_ptr(),
            num_seqs=len(meta.starts),
            num_tokens=meta.num_tokens,
            num_rows=meta.num_rows,
            table_width=tables.shape[1],
            block_size=block_size,
        )
        self.address = ctypes.addressof(self._call)
        """Of what a batch decides, for `conclave_attention_mixer`."""

    def attend(
        self, kernels: str, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, window: int | None
    ) -> Tensor:
        """[R, H, h] queries, [R, G, h] keys and values → [R, H * h]; writes the cache first.

        `kernels` names the variant. All tensors are on the CPU and of one dtype.
        """
        (num_rows, heads, head_dim), (_, kv_heads, _), dtype = q.shape, k.shape, q.dtype
        assert num_rows == self.num_rows, (num_rows, self.num_rows)
        assert k.shape == v.shape == (num_rows, kv_heads, head_dim), (q.shape, k.shape, v.shape)
        assert k.dtype == v.dtype == dtype, (q.dtype, k.dtype, v.dtype)
        assert heads % kv_heads == 0, (heads, kv_heads)
        assert head_dim <= MAX_HEAD_DIM, head_dim
        q, k, v = together(q), together(k), together(v)
        out = torch.empty(num_rows, heads * head_dim, dtype=dtype)
        call = self._call
        cached = (len(cache.key), kv_heads, self.block_size, head_dim)
        call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        call.keys = address(cache.key, cached, dtype)
        call.values = address(cache.value, cached, dtype)
        call.out = out.data_ptr()
        call.q_stride, call.k_stride, call.v_stride = q.stride(0), k.stride(0), v.stride(0)
        call.heads, call.kv_heads, call.head_dim = heads, kv_heads, head_dim
        call.window = window or 0
        call.type, call.threads = ELEMENT_TYPES[dtype], torch.get_num_threads()
        if function(kernels, "conclave_attention")(ctypes.addressof(call)):
            raise MemoryError(f"no memory for attention with {heads} heads of {head_dim}")
        return out
