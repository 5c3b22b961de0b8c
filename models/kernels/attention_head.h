/* A call of attention, and one key/value head of some of its tokens. */
#ifndef CONCLAVE_ATTENTION_HEAD_H
#define CONCLAVE_ATTENTION_HEAD_H

#include "attention.h"

#define SEGMENT 1024  /* keys that are summed up before they are added to those in front */
#define MOST_ROWS 512 /* query rows that share the work of rearranging keys and values */

/* One call; strides in elements. The layout is that of attention.py. */
struct attention {
    const char *q, *k, *v;   /* [num_rows, H, h], [num_rows, G, h] twice */
    char *keys, *values;     /* [blocks, G, block_size, h] */
    char *out;               /* [num_rows, H * h] */
    i64 q_stride, k_stride, v_stride;
    const i64 *query_starts; /* [num_seqs + 1] rows */
    const i64 *starts;       /* [num_seqs] absolute positions */
    const i64 *slots;        /* [num_tokens] where each key and value is written */
    const i64 *tables;       /* [num_seqs, table_width] blocks */
    i64 num_seqs, num_tokens, num_rows, table_width, block_size;
    i64 heads, kv_heads, head_dim, window; /* window 0: none */
    i64 type, threads;
};

/* Some tokens of one sequence. */
struct chunk {
    const i64 *table;
    i64 first_row, tokens, start; /* row in the batch; absolute position of the first one */
    i64 rows;                     /* query rows per key/value head */
};

/* What a thread computes with: room for the query rows of one head of a chunk. */
struct workspace {
    char *queries, *keys, *values, *copies;
    float *scores;
    struct sums all, segment;
};

i64 workspace_bytes(const struct attention *a, const struct arithmetic *arithmetic);
struct workspace make_workspace(const struct attention *a, const struct arithmetic *arithmetic,
                                char *memory);

/* Sums of some rows in memory of their own, and how many floats that takes. */
i64 sums_floats(const struct attention *a, const struct arithmetic *arithmetic, i64 rows);
struct sums make_sums(const struct attention *a, const struct arithmetic *arithmetic, i64 rows,
                      float *memory);

/* The segments that a chunk looks at are numbers first_segment .. last_segment. */
i64 first_segment(const struct attention *a, const struct chunk *c);
i64 last_segment(const struct chunk *c);

/* All keys of one head. */
void attend_head(const struct attention *a, const struct arithmetic *arithmetic,
                 const struct chunk *c, i64 head, const struct workspace *w);

/* Some segments of one head, each into sums of its own; then these, together. `memory` is that of
 * all of the chunk's segments, sums_floats each. */
void attend_segments(const struct attention *a, const struct arithmetic *arithmetic,
                     const struct chunk *c, i64 head, const struct workspace *w, i64 first,
                     i64 end, float *memory);
void merge_segments(const struct attention *a, const struct arithmetic *arithmetic,
                    const struct chunk *c, i64 head, float *memory);

static inline enum type type_of(const struct attention *a) { return (enum type)a->type; }
static inline i64 row_size(const struct attention *a)
{
    return a->head_dim * type_size(type_of(a));
}
static inline i64 group_size(const struct attention *a) { return a->heads / a->kv_heads; }
static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

/* The first key that the query at `position` sees. */
static inline i64 first_key(const struct attention *a, i64 position)
{
    return a->window ? larger(position - a->window + 1, 0) : 0;
}
static inline i64 last_key(const struct chunk *c) { return c->start + c->tokens - 1; }

/* Writes the batch's keys and values into the cache and attends. Not 0: there is no memory. */
int conclave_attention(const struct attention *a);

#endif
