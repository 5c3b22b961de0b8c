/* What is done to each row by itself: RMSNorm and rotary embedding. Every row is one chain of
 * operations, whatever the rows beside it and the threads. */
#include "parallel.h"
#include "rowops.h"
#include "rows.h"

#define CHAINS 4

static inline __attribute__((always_inline)) void norm_part(enum type type, const struct rms_norm *n,
                                                            const char *x, char *out, i64 first,
                                                            i64 width)
{
    const char *weight = n->weight + first * type_size(type);
    vec sums[CHAINS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    for (i64 at = 0; at < width; at += CHAINS * VW)
        for (i64 i = 0; i < CHAINS && at + i * VW < width; i++) {
            vec v = read_some(type, x, at + i * VW, width);
            sums[i] = v_fma(v, v, sums[i]);
        }
    float four[4];
    _mm_storeu_ps(four, v_sum4(sums[0], sums[1], sums[2], sums[3]));
    float mean = ((four[0] + four[1]) + (four[2] + four[3])) / (float)width;
    __m128 root = _mm_sqrt_ss(_mm_set_ss(mean + (float)n->eps));
    vec divisor = v_set(_mm_cvtss_f32(root));
    for (i64 at = 0; at < width; at += VW) {
        vec v = rounded(type, read_some(type, x, at, width) / divisor);
        write_some(type, out, at, width, v * read_some(type, weight, at, width));
    }
}

static inline __attribute__((always_inline)) void norm_row(enum type type, const struct rms_norm *n,
                                                           i64 row)
{
    i64 size = type_size(type), at = row * n->width * size;
    const char *x = n->x + row * n->stride * size;
    if (n->added) {
        const char *added = n->added + at;
        for (i64 i = 0; i < n->width; i += VW)
            write_some(type, n->sum + at, i, n->width,
                       read_some(type, x, i, n->width) + read_some(type, added, i, n->width));
        x = n->sum + at;
    }
    for (i64 part = 0, first = 0; part < n->num_parts; first += n->parts[part++])
        norm_part(type, n, x + first * size, n->out + at + first * size, first, n->parts[part]);
}

ROWS_TASK(norm_share, rms_norm, norm_row)

/* (a, b) → (a cos - b sin, b cos + a sin), a and b the halves of a head. */
static inline __attribute__((always_inline)) void rotate_row(enum type type,
                                                             const struct rotation *r, i64 row)
{
    i64 half = r->head_dim / 2, size = type_size(type), head_size = r->head_dim * size;
    const char *x = r->x + row * r->stride * size;
    const char *cos = r->cos + row * half * size, *sin = r->sin + row * half * size;
    char *out = r->out + row * r->heads * head_size;
    vec most = rounded(type, v_set((float)r->limit)), least = v_zero() - most;
    for (i64 head = 0; head < r->heads; head++, x += head_size, out += head_size)
        for (i64 at = 0; at < half; at += VW) {
            vec a = read_some(type, x, at, half), b = read_some(type, x + half * size, at, half);
            a = v_max(least, v_min(most, a)); /* NaN stays NaN */
            b = v_max(least, v_min(most, b));
            if (head < r->rotated) {
                vec c = read_some(type, cos, at, half), s = read_some(type, sin, at, half);
                vec turned = v_fma(v_zero() - b, s, a * c);
                b = v_fma(a, s, b * c);
                a = turned;
            }
            write_some(type, out, at, half, a);
            write_some(type, out + half * size, at, half, b);
        }
}

ROWS_TASK(rotate_share, rotation, rotate_row)

EXPORT void conclave_rms_norm(struct rms_norm *n)
{
    in_parallel(norm_share, n, n->rows * n->width < SERIAL_ELEMENTS ? 1 : (int)n->threads);
}

EXPORT void conclave_rotate(struct rotation *r)
{
    i64 elements = r->rows * r->heads * r->head_dim;
    in_parallel(rotate_share, r, elements < SERIAL_ELEMENTS ? 1 : (int)r->threads);
}

static inline __attribute__((always_inline)) void add_row(enum type type, const struct sum *s,
                                                          i64 row)
{
    i64 first = row * s->width * type_size(type);
    for (i64 at = 0; at < s->width; at += VW)
        write_some(type, s->out + first, at, s->width,
                   read_some(type, s->x + first, at, s->width) +
                       read_some(type, s->added + first, at, s->width));
}

ROWS_TASK(add_share, sum, add_row)

void add_rows(struct sum *s)
{
    in_parallel(add_share, s, s->rows * s->width < SERIAL_ELEMENTS ? 1 : (int)s->threads);
}
