/* Few rows times int8 weights in AMX tiles, in the order of dense_amx.c.
 *
 * Between the parts of a conversion stand the products of what was converted before it, so that
 * the vector units and the tiles work at once, while memory brings the next panel.
 */
#include "dense.h"

#ifdef CONCLAVE_TILES

#include "int8_tiles.h"

/* What goes by together: 32 outputs and at most one tile of rows, or two; 16 outputs and four. */
enum pass { NARROW, WIDE, TALL };

/* Rows of activations as tiles, `apart` bytes from each other. */
struct tiles {
    const char *packed;
    i64 apart, columns;
};

/* A quarter of the products of two tiles along K; `w` is [half of the outputs][tile]. */
static inline __attribute__((always_inline)) void multiply_quarter(enum pass pass, int quarter,
                                                                   weight_tile (*w)[2],
                                                                   const struct tiles *x)
{
    int tile = quarter / 2, second = quarter % 2;
    const char *at = x->packed + tile * x->columns * 64;
    if (second && pass != TALL)
        _tile_loadd(5, w[1][tile], 64);
    if (!second)
        _tile_loadd(4, w[0][tile], 64);
    if (pass == NARROW) {
        if (second) {
            _tile_dpbf16ps(2, 5, 6);
        } else {
            _tile_loadd(6, at, x->columns * 4);
            _tile_dpbf16ps(0, 4, 6);
        }
    } else if (second && pass == WIDE) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    } else if (second) {
        _tile_loadd(6, at + 2 * x->apart, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, at + 3 * x->apart, 64);
        _tile_dpbf16ps(3, 4, 7);
    } else {
        _tile_loadd(6, at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, at + x->apart, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
}

static inline __attribute__((always_inline)) void convert_quarter(enum pass pass, int quarter,
                                                                  const struct source *w, i64 k,
                                                                  int is_whole, weight_tile (*to)[2])
{
    if (pass == TALL)
        convert(w, k, quarter * TILE / 4, TILE / 4, is_whole, to[0]);
    else
        convert(w + quarter / 2, k, quarter % 2 * TILE / 2, TILE / 2, is_whole, to[quarter / 2]);
}

/* Sums in tiles 0 to 3, over all of K: a pair is multiplied while the next one is converted. */
static inline __attribute__((always_inline)) void run_pass(enum pass pass, const struct source *w,
                                                           struct tiles x)
{
    _Alignas(64) weight_tile copied[2][2][2];
    i64 pairs = tiles_along(w->width) / 2, step = 2 * x.columns * 64;
    i64 whole = w[pass != TALL].outputs >= TILE ? w->width / PAIR : 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int quarter = 0; quarter < 4; quarter++)
        convert_quarter(pass, quarter, w, 0, 0, copied[0]);
    for (i64 pair = 1; pair <= pairs; pair++, x.packed += step) {
        weight_tile(*next)[2] = copied[pair % 2], (*last)[2] = copied[1 - pair % 2];
        WRITTEN(copied);
        for (int quarter = 0; quarter < 4; quarter++) {
            if (pair < whole)
                convert_quarter(pass, quarter, w, pair * PAIR, 1, next);
            else if (pair < pairs)
                convert_quarter(pass, quarter, w, pair * PAIR, 0, next);
            multiply_quarter(pass, quarter, last, &x);
        }
    }
}

static inline void keep(float *a, float *b, float *c, float *d)
{
    _tile_stored(0, a, 64);
    _tile_stored(1, b, 64);
    _tile_stored(2, c, 64);
    _tile_stored(3, d, 64);
}

void int8_panel(const struct block *x, const struct matrix *w, i64 first, i64 outputs, float *sums)
{
    _Alignas(64) sum_tiles s[2];
    i64 columns = tile_rows(x->rows);
    struct tiles tiles = {x->packed, tiles_along(x->width) * columns * 64, columns};
    struct source halves[2] = {source_of(w, first, outputs),
                               source_of(w, first + TILE, outputs - TILE)};
    if (x->rows <= TILE) {
        run_pass(NARROW, halves, tiles);
        if (x->rows == 1) { /* a column of sums is a row */
            _tile_stored(0, sums, 4);
            _tile_stored(2, sums + TILE, 4);
            return;
        }
        _tile_stored(0, s[0][0], 64);
        _tile_stored(2, s[0][2], 64);
    } else if (x->rows <= 2 * TILE) {
        run_pass(WIDE, halves, tiles);
        keep(s[0][0][0], s[0][1][0], s[0][2][0], s[0][3][0]);
    } else {
        for (int half = 0; half < 2; half++) {
            run_pass(TALL, halves + half, tiles);
            keep(s[0][2 * half][0], s[0][2 * half + 1][0], s[1][2 * half][0],
                 s[1][2 * half + 1][0]);
        }
    }
    amx_turn_over(x->rows, s, sums);
}

#endif
