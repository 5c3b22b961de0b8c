/* Calls of a gate and of the routed experts of a layer. */
#ifndef CONCLAVE_ROUTED_H
#define CONCLAVE_ROUTED_H

#include "experts.h"

#define UNKNOWN_EXPERT 2

/* The layout is that of gates.py. */
struct gate {
    const char *logits; /* [tokens, experts] */
    i64 *ids;           /* [tokens, top_k] */
    char *weights;      /* [tokens, top_k] */
    i64 tokens, experts, top_k, type, threads;
    i64 norm;    /* softmax: 0, or the p-norm that the weights are divided by: 1 or 2 */
    double band; /* SparseMixer: how far below the best, relative */
};

/* The layout is that of routed.py. */
struct routed {
    const char *x;               /* [tokens, width] */
    const i64 *ids;              /* [tokens, top_k] */
    const char *weights;         /* [tokens, top_k] of x's type */
    const struct expert *experts; /* of the layer, without rows */
    char *out;                   /* [tokens, width] */
    i64 tokens, width, hidden, top_k, num_experts, type, w_type, threads;
};

void conclave_softmax_gate(struct gate *g);
void conclave_mixer_gate(struct gate *g);
int conclave_routed(const struct routed *r);

#endif
