/* Splits are taken in one after the other within segments, and segments are added up from the first
 * one that is seen: one order for every query, whoever computes which segment. */
#include <math.h>

#include "attention_head.h"

i64 first_segment(const struct attention *a, const struct chunk *c)
{
    return first_key(a, c->start) / SEGMENT;
}

i64 last_segment(const struct chunk *c) { return last_key(c) / SEGMENT; }

static i64 most_rows(const struct attention *a)
{
    return ROUND_UP(larger(MOST_ROWS, group_size(a)), TILE);
}

i64 sums_floats(const struct attention *a, const struct arithmetic *arithmetic, i64 rows)
{
    return ROUND_UP(rows, TILE) * (arithmetic->width(a->head_dim) + VW + 1);
}

struct sums make_sums(const struct attention *a, const struct arithmetic *arithmetic, i64 rows,
                      float *memory)
{
    i64 padded = ROUND_UP(rows, TILE);
    struct sums sums = {.values = memory};
    sums.mass = sums.values + padded * arithmetic->width(a->head_dim);
    sums.most = sums.mass + padded * VW;
    return sums;
}

i64 workspace_bytes(const struct attention *a, const struct arithmetic *arithmetic)
{
    i64 row = arithmetic->row_bytes(a->head_dim);
    i64 floats = 2 * sums_floats(a, arithmetic, most_rows(a)) + TILE * SPLIT;
    return most_rows(a) * row + 2 * SPLIT * row + floats * (i64)sizeof(float) +
           2 * ROUND_UP(SPLIT * row_size(a), 64);
}

struct workspace make_workspace(const struct attention *a, const struct arithmetic *arithmetic,
                                char *memory)
{
    i64 row = arithmetic->row_bytes(a->head_dim), rows = most_rows(a);
    struct workspace w = {.keys = memory};
    w.values = w.keys + SPLIT * row;
    w.queries = w.values + SPLIT * row;
    w.scores = (float *)(w.queries + rows * row);
    float *sums = w.scores + TILE * SPLIT;
    w.all = make_sums(a, arithmetic, rows, sums);
    w.segment = make_sums(a, arithmetic, rows, sums + sums_floats(a, arithmetic, rows));
    w.copies = (char *)(sums + 2 * sums_floats(a, arithmetic, rows));
    return w;
}

/* Where a key (or value) of one head is. */
static const char *find(const struct attention *a, const struct chunk *c, const char *cache,
                        i64 head, i64 key)
{
    i64 block = c->table[key / a->block_size] * a->kv_heads + head;
    return cache + (block * a->block_size + key % a->block_size) * row_size(a);
}

static const char unseen[TILE * MOST_HEAD_DIM * sizeof(float)];

/* TILE rows from `key` on, where the chunk sees them all and they lie together; else a copy of
 * those that it sees: what it does not see may be anything, but counts as 0. */
static const char *find_rows(const struct attention *a, const struct chunk *c, const char *cache,
                             i64 head, i64 key, char *copy)
{
    i64 size = row_size(a), first = first_key(a, c->start);
    int together = a->block_size % TILE == 0;
    if (key > last_key(c) || key + TILE <= first)
        return unseen;
    if (together && key >= first && key + TILE <= last_key(c) + 1)
        return find(a, c, cache, head, key);
    for (i64 i = key; i < key + TILE; i++, copy += size)
        if (i >= first && i <= last_key(c))
            memcpy(copy, find(a, c, cache, head, i), (size_t)size);
        else
            memset(copy, 0, (size_t)size);
    return copy - TILE * size;
}

static void find_split(const struct attention *a, const struct chunk *c, const char *cache,
                       i64 head, i64 key, char *copies, struct split *split)
{
    for (i64 part = 0; part < PARTS; part++, key += TILE, copies += TILE * row_size(a)) {
        split->rows[part] = find_rows(a, c, cache, head, key, copies);
        split->next[part] = cache;
        if (key + SPLIT <= last_key(c))
            split->next[part] = find(a, c, cache, head, key + SPLIT);
    }
}

/* Whether this chunk's keys are multiplied as they lie. */
static int is_few(const struct attention *a, const struct arithmetic *arithmetic,
                  const struct chunk *c)
{
    return c->rows <= TILE && arithmetic->reads_keys(a->head_dim);
}

static void clear_sums(const struct attention *a, const struct arithmetic *arithmetic, i64 rows,
                       const struct sums *sums)
{
    i64 padded = ROUND_UP(rows, TILE), width = arithmetic->width(a->head_dim);
    memset(sums->values, 0, (size_t)(padded * width) * sizeof(float));
    memset(sums->mass, 0, (size_t)(padded * VW) * sizeof(float));
    for (i64 row = 0; row < padded; row++)
        sums->most[row] = -INFINITY;
}

static void begin_head(const struct attention *a, const struct arithmetic *arithmetic,
                       const struct chunk *c, i64 head, const struct workspace *w)
{
    i64 size = arithmetic->row_bytes(a->head_dim), group = group_size(a);
    i64 padded = c->rows < TILE ? c->rows : ROUND_UP(c->rows, TILE);
    for (i64 row = 0; row < padded; row++) {
        i64 offset = (c->first_row + row / group) * a->q_stride;
        offset += (head * group + row % group) * a->head_dim;
        const char *from = row < c->rows ? a->q + offset * type_size(type_of(a)) : NULL;
        arithmetic->pack_query(type_of(a), from, a->head_dim, w->queries + row * size);
    }
    int few = is_few(a, arithmetic, c);
    if (few)
        arithmetic->turn_queries(w->queries, a->head_dim, c->rows);
    arithmetic->begin(c->rows, few);
}

/* All tiles against the split that begins at `key`. */
static void attend_split(const struct attention *a, const struct arithmetic *arithmetic,
                         const struct chunk *c, const struct workspace *w, i64 key,
                         const struct split *keys, const struct sums *sums)
{
    i64 width = arithmetic->width(a->head_dim), size = arithmetic->row_bytes(a->head_dim);
    for (i64 first = 0; first < c->rows; first += TILE) {
        i64 from[TILE], to[TILE], rows = smaller(c->rows - first, TILE), seen = 0;
        for (i64 i = 0; i < rows; i++) {
            i64 position = c->start + (first + i) / group_size(a);
            from[i] = larger(first_key(a, position) - key, 0);
            to[i] = smaller(position + 1 - key, SPLIT);
            seen |= from[i] < to[i];
        }
        struct sums part = {sums->most + first, sums->mass + first * VW,
                            sums->values + first * width};
        struct tile tile = {w->queries + first * size, rows, part, from, to, w->scores};
        if (seen && is_few(a, arithmetic, c))
            attend_few(arithmetic, &tile, keys, w->values, a->head_dim);
        else if (seen)
            attend(arithmetic, &tile, w->keys, w->values, a->head_dim);
    }
}

static void attend_segment(const struct attention *a, const struct arithmetic *arithmetic,
                           const struct chunk *c, i64 head, const struct workspace *w, i64 segment,
                           const struct sums *sums)
{
    i64 key = larger(first_key(a, c->start) / SPLIT * SPLIT, segment * SEGMENT);
    i64 last = smaller(last_key(c), (segment + 1) * SEGMENT - 1);
    struct split keys, values;
    clear_sums(a, arithmetic, c->rows, sums);
    for (; key <= last; key += SPLIT) {
        find_split(a, c, a->keys, head, key, w->copies, &keys);
        find_split(a, c, a->values, head, key, w->copies + SPLIT * row_size(a), &values);
        if (!is_few(a, arithmetic, c))
            arithmetic->pack_keys(type_of(a), &keys, a->head_dim, w->keys);
        arithmetic->pack_values(type_of(a), &values, a->head_dim, w->values);
        attend_split(a, arithmetic, c, w, key, &keys, sums);
    }
}

static void merge(const struct attention *a, const struct arithmetic *arithmetic,
                  const struct chunk *c, i64 segment, struct sums *all, const struct sums *more)
{
    i64 begin = segment * SEGMENT, end = begin + SEGMENT;
    for (i64 row = 0; row < c->rows; row++) {
        i64 position = c->start + row / group_size(a);
        if (position >= begin && first_key(a, position) < end)
            merge_row(all, more, row, arithmetic->width(a->head_dim));
    }
}

static void write_head(const struct attention *a, const struct arithmetic *arithmetic,
                       const struct chunk *c, i64 head, const struct sums *sums)
{
    enum type type = type_of(a);
    i64 width = arithmetic->width(a->head_dim), group = group_size(a);
    for (i64 i = 0; i < c->rows; i++) {
        const float *values = sums->values + i * width;
        vec mass = v_set(total_mass(sums->mass + i * VW));
        i64 offset = (c->first_row + i / group) * a->heads + head * group + i % group;
        char *out = a->out + offset * row_size(a);
        for (i64 d = 0; d < a->head_dim; d += VW) {
            vec v = v_load(values + d) / mass + v_zero(); /* no negative zero */
            if (d + VW <= a->head_dim)
                v_write(type, out + d * type_size(type), v);
            else
                v_write_part(type, out + d * type_size(type), v, a->head_dim - d);
        }
    }
}

void attend_head(const struct attention *a, const struct arithmetic *arithmetic,
                 const struct chunk *c, i64 head, const struct workspace *w)
{
    struct sums all = w->all;
    i64 first = first_segment(a, c);
    begin_head(a, arithmetic, c, head, w);
    attend_segment(a, arithmetic, c, head, w, first, &all);
    for (i64 segment = first + 1; segment <= last_segment(c); segment++) {
        attend_segment(a, arithmetic, c, head, w, segment, &w->segment);
        merge(a, arithmetic, c, segment, &all, &w->segment);
    }
    arithmetic->end();
    write_head(a, arithmetic, c, head, &all);
}

static struct sums segment_sums(const struct attention *a, const struct arithmetic *arithmetic,
                                const struct chunk *c, i64 segment, float *memory)
{
    memory += (segment - first_segment(a, c)) * sums_floats(a, arithmetic, c->rows);
    return make_sums(a, arithmetic, c->rows, memory);
}

void attend_segments(const struct attention *a, const struct arithmetic *arithmetic,
                     const struct chunk *c, i64 head, const struct workspace *w, i64 first,
                     i64 end, float *memory)
{
    begin_head(a, arithmetic, c, head, w);
    for (i64 segment = first; segment < end; segment++) {
        struct sums sums = segment_sums(a, arithmetic, c, segment, memory);
        attend_segment(a, arithmetic, c, head, w, segment, &sums);
    }
    arithmetic->end();
}

void merge_segments(const struct attention *a, const struct arithmetic *arithmetic,
                    const struct chunk *c, i64 head, float *memory)
{
    i64 first = first_segment(a, c);
    struct sums all = segment_sums(a, arithmetic, c, first, memory);
    for (i64 segment = first + 1; segment <= last_segment(c); segment++) {
        struct sums more = segment_sums(a, arithmetic, c, segment, memory);
        merge(a, arithmetic, c, segment, &all, &more);
    }
    write_head(a, arithmetic, c, head, &all);
}
