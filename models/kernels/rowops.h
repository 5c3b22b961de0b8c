/* What is done to each row by itself. */
#ifndef CONCLAVE_ROWOPS_H
#define CONCLAVE_ROWOPS_H

#include "vector.h"

/* Strides in elements; the layout of the first three structures is that of rowops.py. */
struct rms_norm {
    const char *x, *added, *weight; /* [rows, width] twice, [width]; added may be missing */
    char *sum, *out;                /* [rows, width]; sum = x + added where there is one */
    const i64 *parts;               /* widths of what is normed by itself; they add up to width */
    i64 num_parts, rows, width, stride, type, threads;
    double eps;
};

struct rotation {
    const char *x, *cos, *sin; /* [rows, heads, h], [rows, h / 2] twice */
    char *out;                 /* [rows, heads, h] */
    i64 rows, heads, rotated, head_dim, stride, type, threads;
    double limit; /* everything is clamped to ± limit first */
};

struct layer_norm {
    const char *x, *weight, *bias; /* [rows, width], [width] twice; bias may be missing */
    char *out;                     /* [rows, width] */
    i64 rows, width, stride, type, threads;
    double eps;
};

/* out = x + added, all [rows, width]. */
struct sum {
    const char *x, *added;
    char *out;
    i64 rows, width, type, threads;
};

/* In all of them `out` may be what is read: an element is read before it is written. */
void conclave_rms_norm(struct rms_norm *n);
void conclave_rotate(struct rotation *r);
void conclave_layer_norm(struct layer_norm *n);
void add_rows(struct sum *s);

#endif
