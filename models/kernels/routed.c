/* Tokens to their experts and back: rows grouped by expert, computed, summed in routing order. */
#include "experts.h"
#include "parallel.h"
#include "routed.h"
#include "rows.h"
#include "scratch.h"

#include <string.h>

struct grouped {
    const struct routed *routed;
    i64 *places; /* [tokens, top_k] the row of each pair */
    char *rows, *outputs;
};

/* Rows of each expert, in token order, experts ascending; returns how many experts have any. */
static i64 group(const struct grouped *g, i64 *next, struct expert *present)
{
    const struct routed *r = g->routed;
    i64 count = 0, first = 0, pairs = r->tokens * r->top_k;
    for (i64 pair = 0; pair < pairs; pair++)
        next[r->ids[pair]]++;
    for (i64 expert = 0; expert < r->num_experts; expert++) {
        i64 rows = next[expert];
        next[expert] = first;
        first += rows;
        if (rows) {
            present[count] = r->experts[expert];
            present[count++].rows = rows;
        }
    }
    for (i64 pair = 0; pair < pairs; pair++)
        g->places[pair] = next[r->ids[pair]]++;
    return count;
}

static void scatter_share(void *context, int index, int count)
{
    const struct grouped *g = context;
    const struct routed *r = g->routed;
    size_t bytes = (size_t)(r->width * type_size((enum type)r->type));
    i64 pair, end;
    share(r->tokens * r->top_k, index, count, &pair, &end);
    for (; pair < end; pair++)
        memcpy(g->rows + (size_t)g->places[pair] * bytes,
               r->x + (size_t)(pair / r->top_k) * bytes, bytes);
}

/* Multiply, then add, as two operations: wherever experts are combined it is done so. */
static inline __attribute__((always_inline)) void combine_token(enum type type,
                                                                const struct grouped *g, i64 token)
{
    const struct routed *r = g->routed;
    i64 bytes = r->width * type_size(type), first = token * r->top_k;
    float weights[r->top_k];
    for (i64 slot = 0; slot < r->top_k; slot++)
        weights[slot] = v_read_part(type, r->weights + (first + slot) * type_size(type), 1)[0];
    for (i64 at = 0; at < r->width; at += VW) {
        vec sum = v_zero();
        for (i64 slot = 0; slot < r->top_k; slot++) {
            vec row = read_some(type, g->outputs + g->places[first + slot] * bytes, at, r->width);
            sum += row * v_set(weights[slot]);
        }
        write_some(type, r->out + token * bytes, at, r->width, sum);
    }
}

static void combine_share(void *context, int index, int count)
{
    const struct grouped *g = context;
    i64 token, end;
    share(g->routed->tokens, index, count, &token, &end);
    for (; token < end; token++)
        switch (g->routed->type) {
        case F32: combine_token(F32, g, token); break;
        case BF16: combine_token(BF16, g, token); break;
        default: combine_token(F16, g, token); break;
        }
}

/* The layout is that of token_rows.py: a layer whose experts are elsewhere. */
struct apart {
    struct routed routed;
    char *rows;           /* [tokens * top_k, width], grouped by expert */
    i64 *places;          /* [tokens, top_k] the row of each pair */
    const i64 *order;     /* [num_experts] the experts as their rows lie */
    i64 *counts, *starts; /* [num_experts] rows of each expert, and the first of them */
};

static int row_threads(const struct routed *r)
{
    return r->tokens * r->top_k * r->width < SERIAL_ELEMENTS ? 1 : (int)r->threads;
}

/* Tokens to rows: experts in `order`, an expert's rows in token order. */
EXPORT int conclave_spread_rows(struct apart *a)
{
    const struct routed *r = &a->routed;
    struct grouped g = {r, a->places, a->rows, NULL};
    i64 first = 0, pairs = r->tokens * r->top_k;
    memset(a->counts, 0, (size_t)r->num_experts * sizeof *a->counts);
    for (i64 pair = 0; pair < pairs; pair++) {
        if (r->ids[pair] < 0 || r->ids[pair] >= r->num_experts)
            return UNKNOWN_EXPERT;
        a->places[pair] = a->counts[r->ids[pair]]++;
    }
    for (i64 at = 0; at < r->num_experts; at++) {
        a->starts[a->order[at]] = first;
        first += a->counts[a->order[at]];
    }
    for (i64 pair = 0; pair < pairs; pair++)
        a->places[pair] += a->starts[r->ids[pair]];
    in_parallel(scatter_share, &g, row_threads(r));
    return 0;
}

/* Rows to tokens: the outputs are in `rows`. */
EXPORT int conclave_combine_rows(struct apart *a)
{
    struct grouped g = {&a->routed, a->places, NULL, a->rows};
    in_parallel(combine_share, &g, row_threads(&a->routed));
    return 0;
}

/* Σ over the slots of a token, in their order: weight · expert(x), rounded once. */
EXPORT int conclave_routed(const struct routed *r)
{
    i64 pairs = r->tokens * r->top_k;
    for (i64 pair = 0; pair < pairs; pair++)
        if (r->ids[pair] < 0 || r->ids[pair] >= r->num_experts)
            return UNKNOWN_EXPERT;
    size_t bytes = (size_t)((pairs * r->width * type_size((enum type)r->type) + 63) / 64 * 64);
    static __thread struct scratch kept;
    char *memory = reserve(&kept, 2 * bytes + (size_t)pairs * sizeof(i64));
    i64 *next = calloc((size_t)r->num_experts, sizeof(i64));
    struct expert *present = malloc((size_t)r->num_experts * sizeof *present);
    int failed = OUT_OF_MEMORY;
    if (memory && next && present) {
        struct grouped g = {r, (i64 *)(void *)(memory + 2 * bytes), memory, memory + bytes};
        i64 count = group(&g, next, present);
        int threads = pairs * r->width < SERIAL_ELEMENTS ? 1 : (int)r->threads;
        in_parallel(scatter_share, &g, threads);
        failed = conclave_experts(g.rows, r->width, r->hidden, (int)r->type, (int)r->w_type,
                                  present, count, g.outputs, (int)r->threads);
        if (!failed)
            in_parallel(combine_share, &g, threads);
    }
    free(next);
    free(present);
    return failed;
}
