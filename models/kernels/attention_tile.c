/* A tile of query rows takes in a split: maximum so far, weights against it, sums rescaled where it
 * grew. A row that sees nothing of the split keeps every number that it has. */
#include <math.h>

#include "attention.h"
#include "exponential.h"

static inline float fold_max(vec m)
{
#if VW == 16
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256(m), _mm512_extractf32x8_ps(m, 1));
#else
    __m256 half = m;
#endif
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static float max_between(const float *scores, i64 from, i64 to)
{
    float most = -INFINITY;
    for (i64 key = from; key < to; key++)
        most = scores[key] > most ? scores[key] : most;
    return most;
}

static inline float max_of_all(const float *scores)
{
    vec m = v_set(-INFINITY);
    for (i64 key = 0; key < SPLIT; key += VW)
        m = v_max(v_load(scores + key), m); /* keeps m where the score is NaN */
    return fold_max(m);
}

/* Scores become weights, 0 outside of [from, to): → their sum, lane by lane. */
static inline vec weigh(float *scores, i64 from, i64 to, float factor, float most)
{
    vec sum = v_zero();
    for (i64 key = 0; key < SPLIT; key += VW) {
        vec w = v_exp2(v_fma(v_load(scores + key), v_set(factor), v_set(-most)));
        v_store(scores + key, w);
        sum += w;
    }
    if (from == 0 && to == SPLIT)
        return sum;
    memset(scores, 0, (size_t)from * sizeof(float));
    memset(scores + to, 0, (size_t)(SPLIT - to) * sizeof(float));
    sum = v_zero();
    for (i64 key = 0; key < SPLIT; key += VW)
        sum += v_load(scores + key);
    return sum;
}

static void rescale(float *sums, i64 width, float scale)
{
    for (i64 d = 0; d < width; d += VW)
        v_store(sums + d, v_load(sums + d) * v_set(scale));
}

/* Scores are products times this, to be raised from base 2. */
static float score_factor(i64 head_dim)
{
    __m128d one = _mm_set_sd((double)head_dim);
    return (float)(LOG2_E / _mm_cvtsd_f64(_mm_sqrt_sd(one, one)));
}

/* `tile->scores` are there. */
static void take_in(const struct arithmetic *arithmetic, const struct tile *tile,
                    const void *values, i64 head_dim)
{
    const float factor = score_factor(head_dim);
    float most[TILE] = {0}, scale[TILE];
    const struct sums *sums = &tile->sums;
    i64 width = arithmetic->width(head_dim);
    for (i64 i = 0; i < tile->rows; i++) {
        const float *scores = tile->scores + i * SPLIT;
        int all = tile->from[i] == 0 && tile->to[i] == SPLIT;
        float now = all ? max_of_all(scores) : max_between(scores, tile->from[i], tile->to[i]);
        most[i] = now * factor > sums->most[i] ? now * factor : sums->most[i];
    }
    for (i64 i = 0; i < TILE; i += VW) /* 1 where the maximum stays */
        v_store(scale + i, v_exp2(v_load(sums->most + i) - v_load(most + i)));
    for (i64 i = 0; i < tile->rows; i++) {
        float *scores = tile->scores + i * SPLIT;
        if (tile->from[i] >= tile->to[i]) {
            memset(scores, 0, SPLIT * sizeof(float));
            continue;
        }
        vec sum = weigh(scores, tile->from[i], tile->to[i], factor, most[i]);
        v_store(sums->mass + i * VW, v_fma(v_load(sums->mass + i * VW), v_set(scale[i]), sum));
        if (scale[i] != 1.0f)
            rescale(sums->values + i * width, width, scale[i]);
        sums->most[i] = most[i];
    }
    arithmetic->add(tile->scores, values, head_dim, tile->rows, sums->values);
}

void attend(const struct arithmetic *arithmetic, const struct tile *tile, const void *keys,
            const void *values, i64 head_dim)
{
    arithmetic->scores(tile->queries, keys, head_dim, tile->rows, tile->scores);
    take_in(arithmetic, tile, values, head_dim);
}

void attend_few(const struct arithmetic *arithmetic, const struct tile *tile,
                const struct split *keys, const void *values, i64 head_dim)
{
    arithmetic->scores_of_few(tile->queries, keys, head_dim, tile->rows, tile->scores);
    take_in(arithmetic, tile, values, head_dim);
}

/* to = to · scale + more · more_scale */
static void add_scaled(float *to, float scale, const float *more, float more_scale, i64 width)
{
    for (i64 d = 0; d < width; d += VW)
        v_store(to + d, v_fma(v_load(more + d), v_set(more_scale), v_load(to + d) * v_set(scale)));
}

void merge_row(struct sums *all, const struct sums *more, i64 row, i64 width)
{
    float before = all->most[row], other = more->most[row], scales[VW] = {0};
    float most = other > before ? other : before;
    scales[0] = before - most;
    scales[1] = other - most;
    v_store(scales, v_exp2(v_load(scales)));
    add_scaled(all->mass + row * VW, scales[0], more->mass + row * VW, scales[1], VW);
    add_scaled(all->values + row * width, scales[0], more->values + row * width, scales[1], width);
    all->most[row] = most;
}

float total_mass(const float *mass)
{
    float lanes[VW];
    memcpy(lanes, mass, sizeof lanes);
    for (i64 half = VW / 2; half; half /= 2)
        for (i64 i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}
