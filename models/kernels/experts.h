/* Expert FFNs, as linear.c computes them for whoever has grouped the rows. */
#ifndef CONCLAVE_EXPERTS_H
#define CONCLAVE_EXPERTS_H

#include "vector.h"

#define OUT_OF_MEMORY 1

/* The layout is that of native.py: seven numbers. */
struct expert {
    const void *gate, *up, *down; /* [F, D], [F, D], [D, F] */
    const float *gate_scale, *up_scale, *down_scale;
    i64 rows;
};

/* silu(x · gateᵀ) ⊙ (x · upᵀ) · downᵀ: the first experts[0].rows rows of x [n, width] belong to
 * the first expert, and so on; out has the shape of x. */
int conclave_experts(const void *x, i64 width, i64 hidden, int x_type, int w_type,
                     const struct expert *experts, i64 num_experts, void *out, int threads);

#endif
