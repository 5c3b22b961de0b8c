/* What is done to each row by itself: RMSNorm and rotary embedding. Every row is one chain of
 * operations, whatever the rows beside it and the threads. */
#include "parallel.h"
#include "vector.h"

#define EXPORT __attribute__((visibility("default")))

#define CHAINS 4
#define SERIAL_ELEMENTS (1 << 15) /* below, waking other threads costs more than it brings */

/* Strides in elements; the layout of both structures is that of rowops.py. */
struct rms_norm {
    const char *x, *weight; /* [rows, width], [width] */
    char *out;              /* [rows, width] */
    i64 rows, width, stride, type, threads;
    double eps;
};

struct rotation {
    const char *x, *cos, *sin; /* [rows, heads, h], [rows, h / 2] twice */
    char *out;                 /* [rows, heads, h] */
    i64 rows, heads, head_dim, stride, type, threads;
};

static inline vec read_some(enum type type, const char *from, i64 at, i64 width)
{
    from += at * type_size(type);
    return width - at >= VW ? v_read(type, from) : v_read_part(type, from, width - at);
}

static inline void write_some(enum type type, char *to, i64 at, i64 width, vec v)
{
    to += at * type_size(type);
    if (width - at >= VW)
        v_write(type, to, v);
    else
        v_write_part(type, to, v, width - at);
}

/* As the model dtype would hold it. */
static inline vec rounded(enum type type, vec v)
{
    char memory[4 * VW];
    v_write(type, memory, v);
    return v_read(type, memory);
}

static inline __attribute__((always_inline)) void norm_row(enum type type, const struct rms_norm *n,
                                                           const char *x, char *out)
{
    vec sums[CHAINS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    for (i64 at = 0; at < n->width; at += CHAINS * VW)
        for (i64 i = 0; i < CHAINS && at + i * VW < n->width; i++) {
            vec v = read_some(type, x, at + i * VW, n->width);
            sums[i] = v_fma(v, v, sums[i]);
        }
    float four[4];
    _mm_storeu_ps(four, v_sum4(sums[0], sums[1], sums[2], sums[3]));
    float mean = ((four[0] + four[1]) + (four[2] + four[3])) / (float)n->width;
    __m128 root = _mm_sqrt_ss(_mm_set_ss(mean + (float)n->eps));
    vec divisor = v_set(_mm_cvtss_f32(root));
    for (i64 at = 0; at < n->width; at += VW) {
        vec v = rounded(type, read_some(type, x, at, n->width) / divisor);
        write_some(type, out, at, n->width, v * read_some(type, n->weight, at, n->width));
    }
}

static void norm_share(void *context, int index, int count)
{
    const struct rms_norm *n = context;
    enum type type = (enum type)n->type;
    i64 row, end, size = type_size(type);
    share(n->rows, index, count, &row, &end);
    for (; row < end; row++) {
        const char *x = n->x + row * n->stride * size;
        char *out = n->out + row * n->width * size;
        switch (type) {
        case F32: norm_row(F32, n, x, out); break;
        case BF16: norm_row(BF16, n, x, out); break;
        default: norm_row(F16, n, x, out); break;
        }
    }
}

/* (a, b) → (a cos - b sin, b cos + a sin), a and b the halves of a head. */
static inline __attribute__((always_inline)) void rotate_row(enum type type,
                                                             const struct rotation *r, i64 row)
{
    i64 half = r->head_dim / 2, size = type_size(type), head_size = r->head_dim * size;
    const char *x = r->x + row * r->stride * size;
    const char *cos = r->cos + row * half * size, *sin = r->sin + row * half * size;
    char *out = r->out + row * r->heads * head_size;
    for (i64 head = 0; head < r->heads; head++, x += head_size, out += head_size)
        for (i64 at = 0; at < half; at += VW) {
            vec c = read_some(type, cos, at, half), s = read_some(type, sin, at, half);
            vec a = read_some(type, x, at, half), b = read_some(type, x + half * size, at, half);
            write_some(type, out, at, half, v_fma(v_zero() - b, s, a * c));
            write_some(type, out + half * size, at, half, v_fma(a, s, b * c));
        }
}

static void rotate_share(void *context, int index, int count)
{
    const struct rotation *r = context;
    i64 row, end;
    share(r->rows, index, count, &row, &end);
    for (; row < end; row++)
        switch (r->type) {
        case F32: rotate_row(F32, r, row); break;
        case BF16: rotate_row(BF16, r, row); break;
        default: rotate_row(F16, r, row); break;
        }
}

EXPORT void conclave_rms_norm(struct rms_norm *n)
{
    in_parallel(norm_share, n, n->rows * n->width < SERIAL_ELEMENTS ? 1 : (int)n->threads);
}

EXPORT void conclave_rotate(struct rotation *r)
{
    i64 elements = r->rows * r->heads * r->head_dim;
    in_parallel(rotate_share, r, elements < SERIAL_ELEMENTS ? 1 : (int)r->threads);
}
