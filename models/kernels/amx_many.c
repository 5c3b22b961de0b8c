/* Many rows in AMX tiles, in the order of dense_amx.c.
 *
 * A panel's weights go by in chunks along K that stay in the first-level cache while the block's
 * activations stream past them from the second level; sums wait in memory from chunk to chunk.
 * Tile instructions leave the vector units idle, so between them stands, a little at a time, what
 * else is to be done: the next chunk is copied (int8: converted), gates are taken through silu,
 * the last sums become outputs.
 */
#include "products.h"

#ifdef CONCLAVE_TILES

#include "int8_tiles.h"

#define CHUNK 8 /* tiles along K: 16 KiB of weights and as much of two row tiles; measured */
#define LINE (CHUNK * 64 + 64) /* bytes from output to output: their lines meet in no cache set */
#define UNITS (PANEL * CHUNK / 2) /* of copying: two tiles of an output */
#define PAIR_VECTORS 64           /* registers of sums in a pair of row tiles */
#define MOST_PAIRS (MANY_ROWS / (2 * TILE))

struct place {
    i64 panel, tile;
    int is_weight; /* not the gate */
};

struct copying {
    const char *from;
    const char *soon; /* is asked into the second-level cache in the order of its addresses */
    char *to;
    i64 row_bytes;
    int done, per_step;
};

/* Sums of gates that become silu of what they are. */
struct gating {
    struct terms terms;
    i64 done, end, per_step;
};

/* Sums of a pair of row tiles that become outputs. */
struct finishing {
    struct terms terms;
    i64 first, pair;
    int done; /* of its two tiles */
};

/* What one thread does: panels up to `end`. */
struct work {
    const struct product *p;
    i64 along, pairs, end;
    struct copying copying;
    struct gating gating;
    struct finishing finishing;
    _Alignas(64) char chunks[2][PANEL * LINE];
    _Alignas(64) sum_tiles sums[MOST_PAIRS], gates[MOST_PAIRS];
};

static const struct matrix *matrix_at(const struct work *w, struct place at)
{
    return at.is_weight ? w->p->weight : w->p->gate;
}

static struct place after(const struct work *w, struct place at)
{
    at.tile += CHUNK;
    if (at.tile < w->along)
        return at;
    int was_weight = at.is_weight;
    return (struct place){at.panel + was_weight, 0, was_weight ? !w->p->gate : 1};
}

static inline __attribute__((always_inline)) void copy_unit(struct copying *c, int is_int8)
{
    int row = c->done / (CHUNK / 2), pair = c->done % (CHUNK / 2);
    const char *from = c->from + row * c->row_bytes + pair * PAIR * (is_int8 ? 1 : 2);
    char *to = c->to + row * LINE + pair * PAIR * 2;
    __m512i a = _mm512_loadu_si512(from), b;
    if (is_int8) {
        b = low_bytes(_mm512_srli_epi16(a, 8));
        a = low_bytes(a);
    } else {
        b = _mm512_loadu_si512(from + 64);
    }
    _mm512_store_si512(to, a);
    _mm512_store_si512(to + 64, b);
    for (int line = 0; line < (is_int8 ? 1 : 2); line++, c->soon += 64)
        _mm_prefetch(c->soon, _MM_HINT_T1);
    c->done++;
}

/* A chunk that is not all there, with zeros where there is nothing. */
static void copy_part(const struct matrix *w, i64 first, i64 k, char *to)
{
    for (i64 row = 0; row < PANEL; row++, to += LINE)
        for (i64 tile = 0; tile < CHUNK; tile += 2) {
            i64 n = first + row < w->outputs ? w->width - k - tile * DEPTH : 0;
            i64 at = n > 0 ? (first + row) * w->width + k + tile * DEPTH : 0;
            __m512i a, b;
            if (w->type == I8) {
                __mmask64 mask = n >= PAIR ? ~(__mmask64)0 : n > 0 ? ((__mmask64)1 << n) - 1 : 0;
                a = _mm512_maskz_loadu_epi8(mask, (const int8_t *)w->values + at);
                b = low_bytes(_mm512_srli_epi16(a, 8));
                a = low_bytes(a);
            } else {
                a = read_values((const uint16_t *)w->values + at, n);
                b = read_values((const uint16_t *)w->values + at + DEPTH, n - DEPTH);
            }
            _mm512_store_si512(to + tile * 64, a);
            _mm512_store_si512(to + tile * 64 + 64, b);
        }
}

/* Begins to copy a chunk, in so many steps; ends as well where it is not all there. */
static void begin_copying(struct work *w, struct place at, i64 steps, char *to)
{
    struct copying *c = &w->copying;
    c->done = UNITS;
    if (at.panel >= w->end)
        return;
    const struct matrix *m = matrix_at(w, at);
    i64 first = at.panel * PANEL, k = at.tile * DEPTH, size = type_size(m->type);
    if (m->outputs - first < PANEL || m->width - k < CHUNK * DEPTH) {
        copy_part(m, first, k, to);
        return;
    }
    /* The same matrix's next panel; the last one has nothing better than itself. */
    i64 next = first + 2 * PANEL <= m->outputs ? first + PANEL : first;
    *c = (struct copying){.from = (const char *)m->values + (first * m->width + k) * size,
                          .soon = (const char *)m->values + (next * m->width + k * PANEL) * size,
                          .to = to,
                          .row_bytes = m->width * size,
                          .per_step = (int)((UNITS + steps - 1) / steps)};
}

static inline void gate_some(struct work *w, i64 count)
{
    struct gating *g = &w->gating;
    for (; count && g->done < g->end; count--, g->done++) {
        float *v = (float *)w->gates + g->done * VW;
        i64 output = g->done % PAIR_VECTORS / 32 * TILE + g->done % TILE;
        v_store(v, v_silu(v_load(v) * v_set(g->terms.scale[output])));
    }
}

/* An output of 16 rows. */
static inline vec output_of(const struct work *w, int output)
{
    const struct finishing *f = &w->finishing;
    int tile = output / TILE * 2 + f->done;
    vec v = v_load(w->sums[f->pair][tile][output % TILE]) * v_set(f->terms.scale[output]) +
            v_set(f->terms.bias[output]);
    if (w->p->gate)
        v *= v_load(w->gates[f->pair][tile][output % TILE]);
    return v;
}

/* One row tile: two outputs as bfloat16 are a word, so that a row's words are its outputs. */
static void finish_tile(struct work *w)
{
    static const uint16_t beside[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    struct finishing *f = &w->finishing;
    const struct product *p = w->p;
    i64 row = (f->pair * 2 + f->done) * TILE, outputs = p->weight->outputs, left = outputs - f->first;
    uint16_t *out = (uint16_t *)p->out + row * outputs + f->first;
    __mmask32 mask = left >= PANEL ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
    __m512i words[TILE], order = _mm512_loadu_si512(beside);
    for (int i = 0; i < TILE; i++) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(output_of(w, 2 * i + 1), output_of(w, 2 * i));
        words[i] = _mm512_permutexvar_epi16(order, both);
    }
    transpose_16x16(words);
    /* Whole lines need not be read before they are written; what is gated is read again soon. */
    int is_line = !p->gate && left >= PANEL && (uintptr_t)out % 64 == 0 && outputs % PANEL == 0;
    for (i64 r = 0; r < TILE && row + r < p->x.rows; r++, out += outputs)
        if (is_line)
            _mm512_stream_si512((void *)out, words[r]);
        else
            _mm512_mask_storeu_epi16(out, mask, words[r]);
    f->done++;
}

static void finish_rest(struct work *w)
{
    while (w->finishing.done < 2)
        finish_tile(w);
}

/* Adds a chunk to the sums of a pair of row tiles. */
static inline __attribute__((always_inline)) void multiply_pair(struct work *w, const char *weights,
                                                                struct place at, i64 pair,
                                                                int is_int8)
{
    i64 tiles = w->along - at.tile < CHUNK ? w->along - at.tile : CHUNK;
    i64 apart = tiles_along(w->p->x.width) * 1024;
    const char *x = (const char *)w->p->x.packed + 2 * pair * apart + at.tile * 1024;
    float(*s)[TILE][TILE] = at.is_weight ? w->sums[pair] : w->gates[pair];
    take_sums(at.tile != 0, s[0][0], s[1][0], s[2][0], s[3][0]);
    for (i64 tile = 0; tile < tiles; tile++, weights += 64, x += 1024) {
        _tile_loadd(4, weights, LINE);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        for (int n = w->copying.per_step; n && w->copying.done < UNITS; n--)
            copy_unit(&w->copying, is_int8);
        _tile_loadd(7, x + apart, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, weights + TILE * LINE, LINE);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        gate_some(w, w->gating.per_step);
        if (tile % (CHUNK / 2) == 1 && w->finishing.done < 2)
            finish_tile(w);
    }
    keep_sums(s[0][0], s[1][0], s[2][0], s[3][0]);
    finish_rest(w);
}

/* Before a matrix's chunk is multiplied: what waits for its sums. */
static void prepare(struct work *w, struct place at, int is_last, i64 steps)
{
    if (w->p->gate && at.is_weight && at.tile == 0) {
        i64 chunks = (w->along - 1) / CHUNK, all = w->pairs * PAIR_VECTORS;
        read_terms(w->p, w->p->gate, at.panel * PANEL, &w->gating.terms);
        w->gating.done = 0;
        w->gating.end = all;
        w->gating.per_step = chunks ? (all + chunks * steps - 1) / (chunks * steps) : 0;
    }
    if (!is_last || !at.is_weight)
        return;
    gate_some(w, w->gating.end);
    finish_rest(w);
    read_terms(w->p, w->p->weight, at.panel * PANEL, &w->finishing.terms);
    w->finishing.first = at.panel * PANEL;
}

static inline __attribute__((always_inline)) void multiply_chunks(struct work *w, i64 first,
                                                                  int is_int8)
{
    struct place at = {first, 0, !w->p->gate}, then;
    begin_copying(w, at, 1, w->chunks[0]);
    while (w->copying.done < UNITS)
        copy_unit(&w->copying, is_int8);
    for (int turn = 0; at.panel < w->end; turn = 1 - turn, at = then) {
        then = after(w, at);
        i64 steps = w->pairs * (w->along - at.tile < CHUNK ? w->along - at.tile : CHUNK);
        prepare(w, at, then.tile == 0, steps);
        begin_copying(w, then, steps, w->chunks[1 - turn]);
        WRITTEN(w->chunks[turn]);
        for (i64 pair = 0; pair < w->pairs; pair++) {
            multiply_pair(w, w->chunks[turn], at, pair, is_int8);
            if (then.tile == 0 && at.is_weight) {
                w->finishing.pair = pair;
                w->finishing.done = 0;
            }
        }
    }
    finish_rest(w);
    _mm_sfence(); /* streamed lines are there before anything else says so */
}

void amx_many(const struct product *p, i64 first, i64 end)
{
    struct work w;
    i64 width = p->weight->width;
    w.p = p;
    w.along = p->x.layout == INT8_TILES ? tiles_along(width) : (width + DEPTH - 1) / DEPTH;
    w.pairs = amx_row_tiles(p->x.rows) / 2;
    w.end = end;
    w.finishing.done = 2;
    w.gating.done = w.gating.end = w.gating.per_step = 0;
    if (p->x.layout == INT8_TILES)
        multiply_chunks(&w, first, 1);
    else
        multiply_chunks(&w, first, 0);
}

#endif
