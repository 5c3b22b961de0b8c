/* Attention's products in float32: every score is one chain of fused multiply-adds along the head,
 * every sum one chain along the keys, whatever is computed beside it. */
#include "attention.h"

#define ROWS 4
#define VECTORS (VW == 16 ? 4 : 2) /* as many as the registers hold beside ROWS */
#define WIDTH (VECTORS * VW)
#define INLINE static inline __attribute__((always_inline))

static i64 width_of(i64 head_dim) { return ROUND_UP(head_dim, WIDTH); }
static i64 row_bytes(i64 head_dim) { return width_of(head_dim) * (i64)sizeof(float); }

/* Fetches the row `next` while it reads the row `from`. */
INLINE void read_row(enum type type, const char *from, const char *next, i64 head_dim, float *to)
{
    i64 d = 0, size = type_size(type);
    for (; from && d + VW <= head_dim; d += VW) {
        v_store(to + d, v_read(type, from + d * size));
        _mm_prefetch(next + d * size, FETCH);
    }
    if (from && d < head_dim) {
        v_store(to + d, v_read_part(type, from + d * size, head_dim - d));
        d += VW;
    }
    for (; d < width_of(head_dim); d += VW)
        v_store(to + d, v_zero());
}

static void read_any_row(enum type type, const char *from, const char *next, i64 head_dim,
                         float *to)
{
    switch (type) {
    case F32: read_row(F32, from, next, head_dim, to); break;
    case BF16: read_row(BF16, from, next, head_dim, to); break;
    default: read_row(F16, from, next, head_dim, to); break;
    }
}

static void read_key(enum type type, const struct split *from, i64 key, i64 head_dim, float *to)
{
    i64 row = key % TILE * head_dim * type_size(type);
    read_any_row(type, from->rows[key / TILE] + row, from->next[key / TILE] + row, head_dim, to);
}

static void pack_query(enum type type, const char *from, i64 head_dim, void *to)
{
    read_any_row(type, from, from, head_dim, to);
}

/* → [SPLIT][width] */
static void pack_values(enum type type, const struct split *from, i64 head_dim, void *to)
{
    for (i64 key = 0; key < SPLIT; key++)
        read_key(type, from, key, head_dim, (float *)to + key * width_of(head_dim));
}

/* → [head_dim][SPLIT], four by four */
static void pack_keys(enum type type, const struct split *from, i64 head_dim, void *to)
{
    float rows[4][MOST_HEAD_DIM], *columns = to;
    for (i64 key = 0; key < SPLIT; key += 4) {
        for (i64 i = 0; i < 4; i++)
            read_key(type, from, key + i, head_dim, rows[i]);
        for (i64 d = 0; d < head_dim; d += 4) {
            __m128 a = _mm_loadu_ps(rows[0] + d), b = _mm_loadu_ps(rows[1] + d);
            __m128 c = _mm_loadu_ps(rows[2] + d), e = _mm_loadu_ps(rows[3] + d);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            _mm_storeu_ps(columns + d * SPLIT + key, a);
            _mm_storeu_ps(columns + (d + 1) * SPLIT + key, b);
            _mm_storeu_ps(columns + (d + 2) * SPLIT + key, c);
            _mm_storeu_ps(columns + (d + 3) * SPLIT + key, e);
        }
    }
}

/* to[r][column] (+)= Σ_k left[r][k] · right[k][column], for WIDTH columns. */
INLINE void multiply(int rows, const float *left, i64 left_stride, const float *right,
                     i64 right_stride, i64 depth, int from_zero, float *to, i64 to_stride)
{
    vec total[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++)
            total[r][j] = from_zero ? v_zero() : v_load(to + r * to_stride + j * VW);
    for (i64 k = 0; k < depth; k++)
        for (int j = 0; j < VECTORS; j++) {
            vec column = v_load(right + k * right_stride + j * VW);
            for (int r = 0; r < rows; r++)
                total[r][j] = v_fma(v_set(left[r * left_stride + k]), column, total[r][j]);
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < VECTORS; j++)
            v_store(to + r * to_stride + j * VW, total[r][j]);
}

static void scores(const void *queries, const void *keys, i64 head_dim, i64 rows, float *to)
{
    i64 width = width_of(head_dim), row = 0;
    const float *q = queries, *k = keys;
    for (i64 key = 0; key < SPLIT; key += WIDTH) {
        for (row = 0; row + ROWS <= rows; row += ROWS)
            multiply(ROWS, q + row * width, width, k + key, SPLIT, head_dim, 1,
                     to + row * SPLIT + key, SPLIT);
        for (; row < rows; row++)
            multiply(1, q + row * width, width, k + key, SPLIT, head_dim, 1,
                     to + row * SPLIT + key, SPLIT);
    }
}

static void add(const float *weights, const void *values, i64 head_dim, i64 rows, float *sums)
{
    i64 width = width_of(head_dim), row = 0;
    const float *v = values;
    for (i64 d = 0; d < width; d += WIDTH) {
        for (row = 0; row + ROWS <= rows; row += ROWS)
            multiply(ROWS, weights + row * SPLIT, SPLIT, v + d, width, SPLIT, 0,
                     sums + row * width + d, width);
        for (; row < rows; row++)
            multiply(1, weights + row * SPLIT, SPLIT, v + d, width, SPLIT, 0,
                     sums + row * width + d, width);
    }
}

static void begin(i64 rows, int few)
{
    (void)rows;
    (void)few;
}
static void end(void) {}
static int reads_keys(i64 head_dim)
{
    (void)head_dim;
    return 0;
}

const struct arithmetic dot_arithmetic = {row_bytes,  width_of, pack_query, pack_keys,
                                          pack_values, begin,   end,        scores,
                                          add,         reads_keys, NULL,    NULL};
