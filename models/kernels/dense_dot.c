/* Row times output as VW partial sums along K: whatever the rows and outputs beside it, each sum
 * is the same chain of fused multiply-adds and the same tree at its end. */
#include "dense.h"

#define OUTPUTS 4
#define ROWS (VW == 16 ? 6 : 2) /* as many as the registers hold */
#define ROUND_UP(n, m) (((n) + (m)-1) / (m) * (m))

size_t dot_packed_bytes(i64 rows, i64 width)
{
    return (size_t)(rows * ROUND_UP(width, VW)) * sizeof(float);
}

void dot_pack(struct block *x, enum type type, const void *values, i64 group)
{
    i64 padded = ROUND_UP(x->width, VW), full = x->width / VW * VW;
    i64 end = (group + 1) * GROUP_ROWS < x->rows ? (group + 1) * GROUP_ROWS : x->rows;
    for (i64 row = group * GROUP_ROWS; row < end; row++) {
        const char *from = (const char *)values + row * x->width * type_size(type);
        float *to = (float *)x->packed + row * padded;
        for (i64 k = 0; k < full; k += VW)
            v_store(to + k, v_read(type, from + k * type_size(type)));
        if (full < x->width)
            v_store(to + full, v_read_part(type, from + full * type_size(type), x->width - full));
    }
}

static inline __attribute__((always_inline)) void products(enum type type, int rows,
                                                           const char *const weight[OUTPUTS],
                                                           const float *x, i64 padded, i64 width,
                                                           float *sums)
{
    vec total[ROWS][OUTPUTS];
    i64 size = type_size(type), full = width / VW * VW;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < OUTPUTS; j++)
            total[r][j] = v_zero();
    for (i64 k = 0; k < padded; k += VW) {
        vec w[OUTPUTS];
        for (int j = 0; j < OUTPUTS; j++)
            w[j] = k < full ? v_read(type, weight[j] + k * size)
                            : v_read_part(type, weight[j] + k * size, width - full);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < OUTPUTS; j++)
                total[r][j] = v_fma(w[j], v_load(x + r * padded + k), total[r][j]);
    }
    for (int r = 0; r < rows; r++)
        _mm_storeu_ps(sums + r * PANEL, v_sum4(total[r][0], total[r][1], total[r][2], total[r][3]));
}

static inline __attribute__((always_inline)) void panel(enum type type, const struct block *x,
                                                        const struct matrix *w, i64 first,
                                                        i64 outputs, float *sums)
{
    i64 padded = ROUND_UP(x->width, VW), row_bytes = w->width * type_size(type);
    for (i64 j = 0; j < outputs; j += OUTPUTS) {
        const char *weight[OUTPUTS];
        for (i64 i = 0; i < OUTPUTS; i++) /* past the end, the last output again */
            weight[i] = (const char *)w->values +
                        (first + (j + i < outputs ? j + i : outputs - 1)) * row_bytes;
        i64 r = 0;
        for (; r + ROWS <= x->rows; r += ROWS)
            products(type, ROWS, weight, (const float *)x->packed + r * padded, padded, w->width,
                     sums + r * PANEL + j);
        for (; r < x->rows; r++)
            products(type, 1, weight, (const float *)x->packed + r * padded, padded, w->width,
                     sums + r * PANEL + j);
    }
}

void dot_panel(const struct block *x, const struct matrix *w, i64 first, i64 outputs, float *sums)
{
    switch (w->type) {
    case F32: panel(F32, x, w, first, outputs, sums); break;
    case BF16: panel(BF16, x, w, first, outputs, sums); break;
    case F16: panel(F16, x, w, first, outputs, sums); break;
    default: panel(I8, x, w, first, outputs, sums); break;
    }
}
