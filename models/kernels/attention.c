/* Causal grouped-query attention over a paged cache, for a packed batch of prefill chunks and
 * decodes.
 *
 * Keys are cut into splits and segments at absolute positions, and a query takes those that it sees
 * in one order. What it does not see has weight 0, and a split of which it sees nothing changes none
 * of its numbers; so the result is a function of the query and of the keys and values that it sees,
 * in their order, and neither the batch nor the chunk nor the threads can change a bit.
 */
#include <stdlib.h>

#include "attention_head.h"
#include "dense.h"
#include "parallel.h"

#define OUT_OF_MEMORY 1
#define PACK_COST 3    /* of rearranging a split, in tiles of rows computed against it */
#define SERIAL_COST 48 /* below, waking other threads costs more than it brings */
#define SERIAL_TOKENS 16
#define MOST_SHARES 256

/* One key/value head of one chunk, and where its cost begins among all; zeros: before the first. */
struct unit {
    struct chunk chunk;
    i64 head, at, cost, seq, done;
};

/* A unit that several threads compute, each some segments; sums_floats for each segment. */
struct shared {
    struct unit unit;
    float *memory;
};

struct call {
    const struct attention *a;
    const struct arithmetic *arithmetic;
    i64 total_cost;
    int shares, num_shared, failed;
    struct shared shared[MOST_SHARES];
};

/* Memory of the calling thread that is kept from call to call. */
struct kept {
    char *memory;
    i64 size;
};

static char *keep(struct kept *kept, i64 size)
{
    if (size > kept->size) {
        free(kept->memory);
        kept->size = ROUND_UP(size, 4096);
        kept->memory = aligned_alloc(4096, (size_t)kept->size);
        if (!kept->memory)
            kept->size = 0;
    }
    return kept->memory;
}

static struct chunk make_chunk(const struct attention *a, i64 seq, i64 done)
{
    i64 left = a->query_starts[seq + 1] - a->query_starts[seq] - done;
    struct chunk c = {.table = a->tables + seq * a->table_width,
                      .first_row = a->query_starts[seq] + done,
                      .tokens = smaller(left, larger(MOST_ROWS / group_size(a), 1)),
                      .start = a->starts[seq] + done};
    c.rows = c.tokens * group_size(a);
    return c;
}

static i64 split_cost(const struct chunk *c) { return PACK_COST + (c->rows + TILE - 1) / TILE; }

static int next_unit(const struct attention *a, struct unit *u)
{
    u->at += u->cost;
    if (u->chunk.tokens && ++u->head < a->kv_heads)
        return 1;
    u->done += u->chunk.tokens;
    u->head = 0;
    for (; u->seq < a->num_seqs; u->seq++, u->done = 0)
        if (u->done < a->query_starts[u->seq + 1] - a->query_starts[u->seq]) {
            struct chunk c = u->chunk = make_chunk(a, u->seq, u->done);
            u->cost = split_cost(&c) * (last_key(&c) / SPLIT - first_key(a, c.start) / SPLIT + 1);
            return 1;
        }
    return 0;
}

/* The first segment whose cost begins `offset` or more behind that of its unit. Only units of few
 * rows are cut: the sums of others are large, and there are many of them. */
static i64 segment_at(const struct attention *a, const struct unit *u, i64 offset)
{
    const struct chunk *c = &u->chunk;
    i64 first = first_segment(a, c), end = last_segment(c) + 1;
    if (offset <= 0 || offset >= u->cost || c->rows > TILE)
        return offset <= 0 ? first : end;
    i64 split = (offset + split_cost(c) - 1) / split_cost(c) + first_key(a, c->start) / SPLIT;
    return smaller((split * SPLIT + SEGMENT - 1) / SEGMENT, end);
}

/* Finds the units that some share begins within. → how many floats they need */
static i64 find_shared(struct call *call)
{
    const struct attention *a = call->a;
    struct unit u = {0};
    i64 floats = 0, begin, end;
    for (int index = 1; index < call->shares && next_unit(a, &u);) {
        int cut = 0;
        i64 first = first_segment(a, &u.chunk), segments = last_segment(&u.chunk) + 1 - first;
        for (; index < call->shares; index++) {
            share(call->total_cost, index, call->shares, &begin, &end);
            if (begin >= u.at + u.cost)
                break;
            i64 segment = segment_at(a, &u, begin - u.at);
            cut |= segment > first && segment < first + segments;
        }
        if (cut) {
            call->shared[call->num_shared++].unit = u;
            floats += segments * sums_floats(a, call->arithmetic, u.chunk.rows);
        }
    }
    return floats;
}

static int allocate_shared(struct call *call)
{
    static __thread struct kept kept;
    i64 floats = find_shared(call);
    float *memory = floats ? (float *)keep(&kept, floats * (i64)sizeof(float)) : NULL;
    if (floats && !memory)
        return OUT_OF_MEMORY;
    for (int i = 0; i < call->num_shared; i++) {
        const struct chunk *c = &call->shared[i].unit.chunk;
        call->shared[i].memory = memory;
        memory += (last_segment(c) + 1 - first_segment(call->a, c)) *
                  sums_floats(call->a, call->arithmetic, c->rows);
    }
    return 0;
}

static float *shared_memory(const struct call *call, const struct unit *u)
{
    for (int i = 0; i < call->num_shared; i++)
        if (call->shared[i].unit.at == u->at)
            return call->shared[i].memory;
    return NULL;
}

/* The segments of each unit whose cost begins in this share of all. */
static void attend_share(const struct call *call, const struct workspace *w, int index)
{
    const struct attention *a = call->a;
    struct unit u = {0};
    i64 begin, end;
    share(call->total_cost, index, call->shares, &begin, &end);
    while (next_unit(a, &u) && u.at < end) {
        const struct chunk *c = &u.chunk;
        i64 first = segment_at(a, &u, begin - u.at), stop = segment_at(a, &u, end - u.at);
        float *memory = shared_memory(call, &u);
        if (first >= stop)
            continue;
        if (memory)
            attend_segments(a, call->arithmetic, c, u.head, w, first, stop, memory);
        else
            attend_head(a, call->arithmetic, c, u.head, w);
    }
}

static void attend_shares(void *context, int index, int count)
{
    static __thread struct kept kept;
    struct call *call = context;
    char *memory = keep(&kept, workspace_bytes(call->a, call->arithmetic));
    if (!memory) {
        __atomic_store_n(&call->failed, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    struct workspace w = make_workspace(call->a, call->arithmetic, memory);
    for (; index < call->shares; index += count)
        attend_share(call, &w, index);
}

static void write_share(void *context, int index, int count)
{
    const struct attention *a = ((const struct call *)context)->a;
    i64 token, end, size = row_size(a), element = type_size(type_of(a));
    share(a->num_tokens, index, count, &token, &end);
    for (; token < end; token++) {
        i64 block = a->slots[token] / a->block_size, offset = a->slots[token] % a->block_size;
        for (i64 head = 0; head < a->kv_heads; head++) {
            i64 to = ((block * a->kv_heads + head) * a->block_size + offset) * size;
            memcpy(a->keys + to, a->k + token * a->k_stride * element + head * size, (size_t)size);
            memcpy(a->values + to, a->v + token * a->v_stride * element + head * size,
                   (size_t)size);
        }
    }
}

/* Writes the batch's keys and values into the cache and attends; rows behind the tokens are 0. */
EXPORT int conclave_attention(const struct attention *a)
{
    int tiled = a->type == BF16 && amx_available(), threads = (int)smaller(a->threads, MOST_SHARES);
    struct call call;
    call.a = a;
    call.arithmetic = tiled ? &amx_arithmetic : &dot_arithmetic;
    call.num_shared = call.failed = 0;
    struct unit u = {0};
    while (next_unit(a, &u))
        ;
    call.total_cost = u.at;
    call.shares = call.total_cost < SERIAL_COST ? 1 : threads;
    if (allocate_shared(&call))
        return OUT_OF_MEMORY;
    in_parallel(write_share, &call, a->num_tokens < SERIAL_TOKENS ? 1 : threads);
    in_parallel(attend_shares, &call, call.shares);
    for (int i = 0; i < call.num_shared; i++) {
        const struct unit *shared = &call.shared[i].unit;
        merge_segments(a, call.arithmetic, &shared->chunk, shared->head, call.shared[i].memory);
    }
    i64 row = a->heads * row_size(a);
    memset(a->out + a->num_tokens * row, 0, (size_t)((a->num_rows - a->num_tokens) * row));
    return call.failed;
}
