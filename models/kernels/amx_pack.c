/* Activations become the right factor of AMX tiles: pairs along K in columns, a column per row. */
#include "dense.h"

#ifdef CONCLAVE_TILES

#include "amx_tiles.h"

#define SOON 512 /* bytes ahead of which a row is asked into the first-level cache */

i64 amx_row_tiles(i64 rows)
{
    return rows <= TILE ? 1 : (rows + 2 * TILE - 1) / (2 * TILE) * 2;
}

size_t amx_packed_bytes(i64 rows, i64 width)
{
    return (size_t)(amx_row_tiles(rows) * tile_rows(rows) * tiles_along(width) * DEPTH) * 2;
}

/* [16 rows][32] → [16 pairs][columns][2] */
static void store_columns(__m512i v[16], i64 columns, uint16_t *to)
{
    __mmask16 mask = (__mmask16)((1u << columns) - 1);
    if (columns == 1) {
        _mm512_storeu_si512(to, v[0]);
        return;
    }
    transpose_16x16(v);
    for (i64 pair = 0; pair < DEPTH / 2; pair++)
        _mm512_mask_storeu_epi32(to + pair * columns * 2, mask, v[pair]);
}

/* Words at even places of a and b, or at odd ones. */
static inline __m512i every_other(__m512i a, __m512i b, int odd)
{
    static const uint16_t even[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    __m512i index = _mm512_add_epi16(_mm512_loadu_si512(even), _mm512_set1_epi16((short)odd));
    return _mm512_permutex2var_epi16(a, index, b);
}

void amx_pack(struct block *x, const void *values, i64 group)
{
    i64 columns = tile_rows(x->rows), tiles = tiles_along(x->width), size = columns * DEPTH;
    uint16_t *to = (uint16_t *)x->packed + group * tiles * size;
    for (i64 tile = 0; tile < tiles; tile += 2, to += 2 * size) {
        __m512i left[16], right[16];
        for (i64 r = 0; r < TILE; r++) {
            i64 row = group * TILE + r, offset = row * x->width + tile * DEPTH;
            i64 n = row < x->rows ? x->width - tile * DEPTH : 0;
            if (n > 0)
                for (int line = 0; line < 2; line++) /* too many rows for the hardware to foresee */
                    _mm_prefetch((const char *)values + 2 * offset + SOON + 64 * line, _MM_HINT_T0);
            left[r] = read_values((const uint16_t *)values + offset, n);
            right[r] = read_values((const uint16_t *)values + offset + DEPTH, n - DEPTH);
            if (x->layout == INT8_TILES) {
                __m512i even = every_other(left[r], right[r], 0);
                right[r] = every_other(left[r], right[r], 1);
                left[r] = even;
            }
        }
        store_columns(left, columns, to);
        store_columns(right, columns, to + size);
    }
}

#endif
