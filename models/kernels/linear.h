/* Matrix products of all rows of a batch. */
#ifndef CONCLAVE_LINEAR_H
#define CONCLAVE_LINEAR_H

#include "vector.h"

/* out [rows, outputs] = x [rows, width] · valuesᵀ · scale + bias; scale and bias may be NULL. Not 0:
 * there is no memory. */
int conclave_linear(const void *x, i64 rows, i64 width, int x_type, const void *values,
                    const float *scale, const void *bias, int w_type, i64 outputs, void *out,
                    int threads);

/* A weight [outputs, width] of a layer; the layout is that of whole.py. */
struct weight {
    const void *values;
    const float *scale; /* [outputs], of int8 values, or NULL */
    const void *bias;   /* [outputs] or NULL */
    i64 type, outputs, width;
};

static inline int multiply(const struct weight *w, const void *x, i64 rows, i64 type, void *out,
                           i64 threads)
{
    return conclave_linear(x, rows, w->width, (int)type, w->values, w->scale, w->bias, (int)w->type,
                           w->outputs, out, (int)threads);
}

#endif
