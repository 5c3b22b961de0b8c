/* What the two AMX files share: the shapes of tiles and how values get into them. */
#ifndef CONCLAVE_AMX_TILES_H
#define CONCLAVE_AMX_TILES_H

#include "dense.h"
#include "transpose.h"

#define DEPTH 32 /* values along K in a tile */
#define TILE 16  /* outputs, or rows, in a tile */

/* An even number: 64 int8 values become two tiles, of those at even and at odd places. */
static inline i64 tiles_along(i64 width) { return (width + 2 * DEPTH - 1) / (2 * DEPTH) * 2; }

/* Rows in each tile of activations. */
static inline i64 tile_rows(i64 rows) { return rows < TILE ? rows : TILE; }

/* 32 values, or the first n of them with zeros behind. */
static inline __m512i read_values(const uint16_t *p, i64 n)
{
    __mmask32 mask = n >= DEPTH ? ~(__mmask32)0 : n > 0 ? ((__mmask32)1 << n) - 1 : 0;
    return _mm512_maskz_loadu_epi16(mask, p);
}

typedef uint16_t weight_tile[TILE][DEPTH];

/* Of a pair of row tiles: [half of the outputs * 2 + tile of the pair][output][row]. */
typedef float sum_tiles[4][TILE][TILE];

static inline void take_sums(int are_there, float *a, float *b, float *c, float *d)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (are_there) {
        _tile_loadd(0, a, 64);
        _tile_loadd(1, b, 64);
        _tile_loadd(2, c, 64);
        _tile_loadd(3, d, 64);
    }
}

static inline void keep_sums(float *a, float *b, float *c, float *d)
{
    _tile_stored(0, a, 64);
    _tile_stored(1, b, 64);
    _tile_stored(2, c, 64);
    _tile_stored(3, d, 64);
}

/* [outputs][rows] tiles → sums[row * PANEL + output]. */
void amx_turn_over(i64 rows, sum_tiles *tiles, float *sums);

/* The tile intrinsics do not tell the compiler what they read: it must be in memory by then. */
#define WRITTEN(p) __asm__ volatile("" : : "r"(p) : "memory")

#endif
