/* Causal grouped-query attention over a paged cache, for a packed batch of prefill chunks and
 * decodes.
 *
 * Keys are cut into splits at absolute positions, and a query takes those that it sees one after
 * the other. What it does not see has weight 0, and a split of which it sees nothing changes none
 * of its numbers; so the result is a function of the query and of the keys and values that it sees,
 * in their order, and neither the batch nor the chunk nor the threads can change a bit.
 */
#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "dense.h"
#include "parallel.h"

#define EXPORT __attribute__((visibility("default")))

#define OUT_OF_MEMORY 1
#define MOST_ROWS 512 /* query rows that share the work of rearranging keys and values */
#define PACK_COST 3   /* of rearranging a split, in tiles of rows computed against it */
#define SERIAL_COST 48 /* below, waking other threads costs more than it brings */
#define SERIAL_TOKENS 16

/* One call; strides in elements. The layout is that of attention.py. */
struct attention {
    const char *q, *k, *v;   /* [num_rows, H, h], [num_rows, G, h] twice */
    char *keys, *values;     /* [blocks * block_size, G, h] */
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

struct call {
    const struct attention *a;
    const struct arithmetic *arithmetic;
    i64 total_cost;
    int failed;
};

/* Some tokens of one sequence. */
struct chunk {
    const i64 *table;
    i64 first_row, tokens, start; /* row in the batch; absolute position of the first one */
    i64 rows, padded_rows;        /* query rows per key/value head */
};

/* What a thread computes with: room for all query rows of a chunk, for some heads. */
struct workspace {
    char *queries, *keys, *values;
    float *sums, *most, *mass, *scores;
};

static enum type type_of(const struct attention *a) { return (enum type)a->type; }
static i64 row_size(const struct attention *a) { return a->head_dim * type_size(type_of(a)); }
static i64 group_size(const struct attention *a) { return a->heads / a->kv_heads; }
static i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static i64 larger(i64 a, i64 b) { return a > b ? a : b; }

/* The first key that the query at `position` sees. */
static i64 first_key(const struct attention *a, i64 position)
{
    return a->window ? larger(position - a->window + 1, 0) : 0;
}

static struct chunk make_chunk(const struct attention *a, i64 seq, i64 done)
{
    i64 left = a->query_starts[seq + 1] - a->query_starts[seq] - done;
    struct chunk c = {.table = a->tables + seq * a->table_width,
                      .first_row = a->query_starts[seq] + done,
                      .tokens = smaller(left, larger(MOST_ROWS / group_size(a), 1)),
                      .start = a->starts[seq] + done};
    c.rows = c.tokens * group_size(a);
    c.padded_rows = c.rows < TILE ? c.rows : ROUND_UP(c.rows, TILE);
    return c;
}

/* Of one key/value head. */
static i64 chunk_cost(const struct attention *a, const struct chunk *c)
{
    i64 splits = (c->start + c->tokens - 1) / SPLIT - first_key(a, c->start) / SPLIT + 1;
    return splits * (PACK_COST + (c->rows + TILE - 1) / TILE);
}

/* Where keys split.. are in the cache, in rows of all heads; -1 where the chunk does not look. */
static void find_keys(const struct attention *a, const struct chunk *c, i64 split, i64 *slots)
{
    i64 first = larger(first_key(a, c->start), split), last = c->start + c->tokens - 1;
    for (i64 key = split; key < split + SPLIT;) {
        if (key < first || key > last) {
            slots[key++ - split] = -1;
            continue;
        }
        i64 block = key / a->block_size, slot = (c->table[block] - block) * a->block_size;
        i64 end = smaller(smaller((block + 1) * a->block_size, last + 1), split + SPLIT);
        for (; key < end; key++)
            slots[key - split] = slot + key;
    }
}

/* Rows of one head, and of the next one to come. */
static void find_rows(const struct attention *a, const char *cache, const i64 *slots, i64 head,
                      const i64 *next_slots, i64 next_head, struct split *split)
{
    i64 size = row_size(a), stride = size * a->kv_heads;
    for (i64 i = 0; i < SPLIT; i++) {
        split->rows[i] = slots[i] < 0 ? NULL : cache + slots[i] * stride + head * size;
        split->next[i] = cache;
        if (next_slots[i] >= 0)
            split->next[i] += next_slots[i] * stride + next_head * size;
    }
}

/* All tiles of one head against the split that is packed; its rows begin at `at`. */
static void attend_all(const struct call *call, const struct chunk *c, const struct workspace *w,
                       i64 split, i64 at)
{
    const struct attention *a = call->a;
    i64 width = call->arithmetic->width(a->head_dim);
    i64 size = call->arithmetic->row_bytes(a->head_dim);
    for (i64 first = 0; first < c->rows; first += TILE) {
        i64 from[TILE], to[TILE], rows = smaller(c->rows - first, TILE), seen = 0;
        for (i64 i = 0; i < rows; i++) {
            i64 position = c->start + (first + i) / group_size(a);
            from[i] = larger(first_key(a, position) - split, 0);
            to[i] = smaller(position + 1 - split, SPLIT);
            seen |= from[i] < to[i];
        }
        struct tile tile = {w->queries + (at + first) * size, rows,
                            w->sums + (at + first) * width,   w->most + at + first,
                            w->mass + (at + first) * VW,      from, to, w->scores};
        if (seen)
            attend(call->arithmetic, &tile, w->keys, w->values, a->head_dim);
    }
}

static void begin_heads(const struct call *call, const struct chunk *c, const struct workspace *w,
                        i64 head, i64 end)
{
    const struct attention *a = call->a;
    i64 width = call->arithmetic->width(a->head_dim);
    i64 size = call->arithmetic->row_bytes(a->head_dim);
    i64 group = group_size(a), rows = (end - head) * c->padded_rows;
    for (i64 row = 0; row < rows; row++) {
        i64 i = row % c->padded_rows, kv_head = head + row / c->padded_rows;
        i64 offset = (c->first_row + i / group) * a->q_stride;
        offset += (kv_head * group + i % group) * a->head_dim;
        const char *from = i < c->rows ? a->q + offset * type_size(type_of(a)) : NULL;
        call->arithmetic->pack_query(type_of(a), from, a->head_dim, w->queries + row * size);
        w->most[row] = -INFINITY;
    }
    memset(w->sums, 0, (size_t)(rows * width) * sizeof(float));
    memset(w->mass, 0, (size_t)(rows * VW) * sizeof(float));
}

static void finish_heads(const struct call *call, const struct chunk *c, const struct workspace *w,
                         i64 head, i64 end)
{
    const struct attention *a = call->a;
    enum type type = type_of(a);
    i64 width = call->arithmetic->width(a->head_dim), group = group_size(a);
    for (i64 at = 0; head < end; head++, at += c->padded_rows)
        for (i64 i = 0; i < c->rows; i++) {
            const float *sums = w->sums + (at + i) * width;
            vec mass = v_set(total_mass(w->mass + (at + i) * VW));
            i64 offset = (c->first_row + i / group) * a->heads + head * group + i % group;
            char *out = a->out + offset * row_size(a);
            for (i64 d = 0; d < a->head_dim; d += VW) {
                vec v = v_load(sums + d) / mass + v_zero(); /* no negative zero */
                if (d + VW <= a->head_dim)
                    v_write(type, out + d * type_size(type), v);
                else
                    v_write_part(type, out + d * type_size(type), v, a->head_dim - d);
            }
        }
}

static void run_heads(const struct call *call, const struct chunk *c, const struct workspace *w,
                      i64 head, i64 end)
{
    const struct attention *a = call->a;
    const struct arithmetic *arithmetic = call->arithmetic;
    begin_heads(call, c, w, head, end);
    arithmetic->begin(c->rows);
    i64 last = c->start + c->tokens - 1;
    i64 slots[2][SPLIT], first = first_key(a, c->start) / SPLIT * SPLIT;
    struct split split;
    find_keys(a, c, first, slots[0]);
    for (i64 key = first, now = 0; key <= last; key += SPLIT, now = !now) {
        find_keys(a, c, key + SPLIT, slots[!now]);
        for (i64 g = head; g < end; g++) {
            i64 then = g + 1 < end ? now : !now, next = g + 1 < end ? g + 1 : head;
            find_rows(a, a->keys, slots[now], g, slots[then], next, &split);
            arithmetic->pack_keys(type_of(a), &split, a->head_dim, w->keys);
            find_rows(a, a->values, slots[now], g, slots[then], next, &split);
            arithmetic->pack_values(type_of(a), &split, a->head_dim, w->values);
            attend_all(call, c, w, key, (g - head) * c->padded_rows);
        }
    }
    arithmetic->end();
    finish_heads(call, c, w, head, end);
}

/* Memory of the calling thread that is kept from call to call. */
static int make_workspace(const struct call *call, struct workspace *w)
{
    static __thread char *memory;
    static __thread i64 size;
    const struct arithmetic *arithmetic = call->arithmetic;
    i64 room = larger(MOST_ROWS, ROUND_UP(group_size(call->a), TILE)) + TILE;
    i64 row = arithmetic->row_bytes(call->a->head_dim);
    i64 floats = arithmetic->width(call->a->head_dim) + 1 + VW;
    i64 needed = room * row + 2 * SPLIT * row + (room * floats + TILE * SPLIT) * (i64)sizeof(float);
    if (needed > size) {
        free(memory);
        size = ROUND_UP(needed, 4096);
        memory = aligned_alloc(4096, (size_t)size);
        if (!memory) {
            size = 0;
            return OUT_OF_MEMORY;
        }
    }
    w->keys = memory;
    w->values = w->keys + SPLIT * row;
    w->queries = w->values + SPLIT * row;
    w->scores = (float *)(w->queries + room * row);
    w->mass = w->scores + TILE * SPLIT;
    w->sums = w->mass + room * VW;
    w->most = w->sums + room * arithmetic->width(call->a->head_dim);
    return 0;
}

/* The heads of each chunk whose cost begins in this thread's share of all. */
static void attend_share(void *context, int index, int count)
{
    struct call *call = context;
    const struct attention *a = call->a;
    struct workspace w;
    i64 begin, end, at = 0;
    share(call->total_cost, index, count, &begin, &end);
    if (make_workspace(call, &w)) {
        __atomic_store_n(&call->failed, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (i64 seq = 0; seq < a->num_seqs; seq++)
        for (i64 done = 0; done < a->query_starts[seq + 1] - a->query_starts[seq];) {
            struct chunk c = make_chunk(a, seq, done);
            i64 cost = chunk_cost(a, &c), heads = larger(MOST_ROWS / c.padded_rows, 1);
            i64 head = begin <= at ? 0 : smaller((begin - at + cost - 1) / cost, a->kv_heads);
            i64 stop = end <= at ? 0 : smaller((end - at + cost - 1) / cost, a->kv_heads);
            for (; head < stop; head += heads)
                run_heads(call, &c, &w, head, smaller(head + heads, stop));
            at += cost * a->kv_heads;
            done += c.tokens;
        }
}

static void write_share(void *context, int index, int count)
{
    const struct attention *a = ((const struct call *)context)->a;
    i64 token, end, size = a->kv_heads * row_size(a), element = type_size(type_of(a));
    share(a->num_tokens, index, count, &token, &end);
    for (; token < end; token++) {
        i64 to = a->slots[token] * size;
        memcpy(a->keys + to, a->k + token * a->k_stride * element, (size_t)size);
        memcpy(a->values + to, a->v + token * a->v_stride * element, (size_t)size);
    }
}

/* Writes the batch's keys and values into the cache and attends; rows behind the tokens are 0. */
EXPORT int conclave_attention(const struct attention *a)
{
    int tiled = a->type == BF16 && amx_available(), threads = (int)a->threads;
    struct call call = {a, tiled ? &amx_arithmetic : &dot_arithmetic, 0, 0};
    for (i64 seq = 0; seq < a->num_seqs; seq++)
        for (i64 done = 0; done < a->query_starts[seq + 1] - a->query_starts[seq];) {
            struct chunk c = make_chunk(a, seq, done);
            call.total_cost += chunk_cost(a, &c) * a->kv_heads;
            done += c.tokens;
        }
    in_parallel(write_share, &call, a->num_tokens < SERIAL_TOKENS ? 1 : threads);
    in_parallel(attend_share, &call, call.total_cost < SERIAL_COST ? 1 : threads);
    i64 row = a->heads * row_size(a);
    memset(a->out + a->num_tokens * row, 0, (size_t)((a->num_rows - a->num_tokens) * row));
    return call.failed;
}
