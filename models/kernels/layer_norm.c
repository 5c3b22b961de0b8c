/* LayerNorm by the algorithm of PyTorch's operator, in its order: Welford's (1962) moments in lanes,
 * in runs of vectors that are added pairwise. On rows whose mean is large beside their spread its
 * rounding is larger than what results may differ by: an order of our own would not do, however
 * exact it is. Where it multiplies and adds in one rounding, so does this. */
#include "parallel.h"
#include "rowops.h"
#include "rows.h"

#define LANES 8 /* of PyTorch's operator on every x86 processor */
#define RUN 16  /* vectors in a run */
#define DEPTH 48

/* Of each lane: mean, and sum of squared distances from it, of `count` values. */
struct moments {
    i64 count;
    __m256 mean, squares;
};

static struct moments none(void)
{
    return (struct moments){0, _mm256_setzero_ps(), _mm256_setzero_ps()};
}

static void add_moments(struct moments *to, const struct moments *added)
{
    i64 count = to->count + added->count;
    __m256 share = _mm256_set1_ps((float)added->count / (float)count);
    __m256 delta = added->mean - to->mean;
    to->mean += share * delta;
    to->squares = _mm256_fmadd_ps(delta * share * _mm256_set1_ps((float)to->count), delta,
                                  to->squares + added->squares);
    to->count = count;
}

static struct moments run_moments(const float *values, i64 count)
{
    struct moments m = none();
    for (; m.count < count; values += LANES) {
        __m256 v = _mm256_loadu_ps(values), delta = v - m.mean;
        m.mean = _mm256_fmadd_ps(delta, _mm256_set1_ps(1.0f / (float)++m.count), m.mean);
        m.squares = _mm256_fmadd_ps(delta, v - m.mean, m.squares);
    }
    return m;
}

/* Runs are added like the digits of a binary number: two of a level make one of the next. */
static inline __attribute__((always_inline)) struct moments lane_moments(enum type type,
                                                                         const char *x, i64 vectors)
{
    struct moments levels[DEPTH];
    i64 runs = (vectors + RUN - 1) / RUN;
    int depth = 1;
    while ((1LL << depth) < runs)
        depth++;
    for (int level = 0; level < depth; level++)
        levels[level] = none();
    for (i64 run = 0; run < runs; run++) {
        float values[RUN * LANES + VW];
        i64 first = run * RUN, count = vectors - first < RUN ? vectors - first : RUN;
        for (i64 i = 0; i < count * LANES; i += VW)
            v_store(values + i, read_some(type, x, first * LANES + i, vectors * LANES));
        struct moments m = run_moments(values, count);
        add_moments(levels, &m);
        for (int level = 1; level < depth && !((run + 1) >> (level - 1) & 1); level++) {
            add_moments(levels + level, levels + level - 1);
            levels[level - 1] = none();
        }
    }
    for (int level = 1; level < depth; level++)
        if (levels[level].count)
            add_moments(levels, levels + level);
    return levels[0];
}

/* Mean and variance of all lanes and of what is behind the last whole vector. */
static void fold(const struct moments *lanes, const float *rest, i64 num_rest, float *mean,
                 float *variance)
{
    float means[LANES], squares[LANES], m1 = 0.0f, m2 = 0.0f;
    i64 count = 0;
    while (count < num_rest) {
        float value = rest[count], delta = value - m1;
        m1 += delta / (float)++count;
        m2 += delta * (value - m1);
    }
    _mm256_storeu_ps(means, lanes->mean);
    _mm256_storeu_ps(squares, lanes->squares);
    for (int i = 0; i < LANES && lanes->count; i++) {
        i64 all = count + lanes->count;
        float share = (float)lanes->count / (float)all, delta = means[i] - m1;
        m1 = __builtin_fmaf(share, delta, m1);
        m2 += __builtin_fmaf(delta * delta * share, (float)count, squares[i]);
        count = all;
    }
    *mean = m1;
    *variance = m2 / (float)count;
}

static inline __attribute__((always_inline)) void norm_row(enum type type,
                                                           const struct layer_norm *n, i64 row)
{
    i64 size = type_size(type), vectors = n->width / LANES, whole = vectors * LANES;
    const char *x = n->x + row * n->stride * size;
    char *out = n->out + row * n->width * size;
    float rest[VW], mean, variance;
    struct moments lanes = lane_moments(type, x, vectors);
    if (whole < n->width)
        v_store(rest, read_some(type, x, whole, n->width));
    fold(&lanes, rest, n->width - whole, &mean, &variance);
    __m128 root = _mm_sqrt_ss(_mm_set_ss(variance + (float)n->eps));
    vec scale = v_set(1.0f / _mm_cvtss_f32(root)), shift = v_set(-mean);
    for (i64 at = 0; at < n->width; at += VW) {
        vec v = (read_some(type, x, at, n->width) + shift) * scale;
        vec weight = read_some(type, n->weight, at, n->width);
        if (n->bias)
            v = v_fma(v, weight, read_some(type, n->bias, at, n->width));
        else
            v *= weight;
        write_some(type, out, at, n->width, v);
    }
}

ROWS_TASK(norm_share, layer_norm, norm_row)

EXPORT void conclave_layer_norm(struct layer_norm *n)
{
    in_parallel(norm_share, n, n->rows * n->width < SERIAL_ELEMENTS ? 1 : (int)n->threads);
}
