/* Calls of Mamba's convolution and selective scan. */
#ifndef CONCLAVE_SCAN_H
#define CONCLAVE_SCAN_H

#include "vector.h"

/* The sequences of a call; the layout of all three structures is that of scan.py. */
struct batch {
    const i64 *query_starts, *slots; /* [num_seqs + 1] rows, [num_seqs] */
    i64 num_seqs, num_tokens, num_rows;
    i64 channels, type, threads;
};

/* silu(convolution): strides in elements; bias may be NULL. */
struct convolution {
    struct batch batch;
    const char *u;     /* [num_rows, I] */
    const float *taps; /* [K, I] */
    const char *bias;  /* [I] */
    char *history;     /* [slots, I, K - 1] */
    char *out;         /* [num_rows, I] */
    i64 u_stride, num_taps;
};

/* (scan + D · signal) · silu(z), Δ = softplus(step + step_bias); `a` is A · log2(e). */
struct scan {
    struct batch batch;
    const char *signal, *step, *z;  /* [num_rows, I] */
    const char *b, *c;              /* [num_rows, N] */
    const char *step_bias, *d;      /* [I] */
    const float *a;                 /* [N, I] */
    float *states;                  /* [slots, I, N] */
    char *out;                      /* [num_rows, I] */
    i64 signal_stride, step_stride, z_stride, b_stride, c_stride, num_states;
};

void conclave_convolve(const struct convolution *call);
void conclave_scan(const struct scan *call);

#endif
