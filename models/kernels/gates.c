/* Gates: which experts a token goes to, and with what weights. A row is one chain of scalar sums
 * in the order of the experts. */
#include "parallel.h"
#include "routed.h"
#include "rows.h"

#define MAX_EXPERTS 1024
#define SERIAL_TOKENS 256

static void read_row(const struct gate *g, i64 token, float *logits)
{
    const char *row = g->logits + token * g->experts * type_size((enum type)g->type);
    for (i64 at = 0; at < g->experts; at += VW)
        v_store(logits + at, read_some((enum type)g->type, row, at, g->experts));
}

/* The first of the greatest; the first at all where nothing compares. */
static i64 best_of(const float *values, i64 count)
{
    i64 best = 0;
    for (i64 i = 1; i < count; i++)
        if (values[i] > values[best])
            best = i;
    return best;
}

/* exp(value - peak), 0 where that is below the normal numbers; returns the sum in order. */
static float exponentials(const float *values, i64 count, float peak, float *to)
{
    for (i64 at = 0; at < count; at += VW)
        v_store(to + at, v_exp(v_load(values + at) - v_set(peak)));
    float sum = 0.0f;
    for (i64 i = 0; i < count; i++) {
        to[i] = values[i] - peak < -87.0f ? 0.0f : to[i];
        sum += to[i];
    }
    return sum;
}

static void write_choice(const struct gate *g, i64 token, i64 slot, i64 expert, float weight)
{
    i64 at = token * g->top_k + slot;
    g->ids[at] = expert;
    write_some((enum type)g->type, g->weights + token * g->top_k * type_size((enum type)g->type),
               slot, slot + 1, v_set(weight));
}

/* Softmax over all experts, the greatest top_k, lower ids first among equals. */
static void softmax_row(const struct gate *g, i64 token)
{
    float logits[MAX_EXPERTS], shares[MAX_EXPERTS];
    read_row(g, token, logits);
    float sum = exponentials(logits, g->experts, logits[best_of(logits, g->experts)], shares);
    for (i64 i = 0; i < g->experts; i++)
        shares[i] /= sum;
    i64 ids[MAX_EXPERTS];
    float chosen[MAX_EXPERTS], size = 0.0f;
    for (i64 slot = 0; slot < g->top_k; slot++) {
        ids[slot] = -1;
        for (i64 i = 0; i < g->experts; i++)
            if (shares[i] >= 0.0f && (ids[slot] < 0 || shares[i] > shares[ids[slot]]))
                ids[slot] = i;
        if (ids[slot] < 0) /* none compares: every weight is NaN */
            ids[slot] = slot;
        chosen[slot] = shares[ids[slot]];
        shares[ids[slot]] = -1.0f;
        size += g->norm == 2 ? chosen[slot] * chosen[slot] : chosen[slot];
    }
    if (g->norm == 2)
        size = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(size)));
    for (i64 slot = 0; slot < g->top_k; slot++)
        write_choice(g, token, slot, ids[slot], g->norm ? chosen[slot] / size : chosen[slot]);
}

/* The best candidate; its share among those of `logits` that are within the band below it. Every
 * operation rounds to the logits' type, as the definition does. */
static i64 mixer_slot(const struct gate *g, const float *candidates, const float *logits,
                      float *weight)
{
    enum type type = (enum type)g->type;
    float distances[MAX_EXPERTS], kept[MAX_EXPERTS], shares[MAX_EXPERTS];
    i64 best = best_of(candidates, g->experts);
    vec peak = v_set(candidates[best]);
    for (i64 at = 0; at < g->experts; at += VW) {
        vec l = v_load(logits + at), size = v_max(v_max(l, v_zero() - l), peak);
        v_store(distances + at, rounded(type, rounded(type, peak - l) / size));
    }
    float band = rounded(type, v_set((float)g->band))[0];
    for (i64 i = 0; i < g->experts; i++)
        kept[i] = distances[i] > band ? -1.0f / 0.0f : candidates[i];
    float sum = exponentials(kept, g->experts, candidates[best], shares);
    *weight = shares[best] / sum;
    return best;
}

static void mixer_row(const struct gate *g, i64 token)
{
    float logits[MAX_EXPERTS], rest[MAX_EXPERTS], weight;
    read_row(g, token, logits);
    memcpy(rest, logits, (size_t)g->experts * sizeof *rest);
    i64 first = mixer_slot(g, logits, logits, &weight);
    write_choice(g, token, 0, first, weight);
    rest[first] = -1.0f / 0.0f;
    i64 second = mixer_slot(g, rest, logits, &weight);
    write_choice(g, token, 1, second, weight);
}

static void softmax_share(void *context, int index, int count)
{
    const struct gate *g = context;
    i64 token, end;
    share(g->tokens, index, count, &token, &end);
    for (; token < end; token++)
        softmax_row(g, token);
}

static void mixer_share(void *context, int index, int count)
{
    const struct gate *g = context;
    i64 token, end;
    share(g->tokens, index, count, &token, &end);
    for (; token < end; token++)
        mixer_row(g, token);
}

EXPORT void conclave_softmax_gate(struct gate *g)
{
    in_parallel(softmax_share, g, g->tokens < SERIAL_TOKENS ? 1 : (int)g->threads);
}

EXPORT void conclave_mixer_gate(struct gate *g)
{
    in_parallel(mixer_share, g, g->tokens < SERIAL_TOKENS ? 1 : (int)g->threads);
}
