/* Row times output in AMX tiles: of every 32 values along K the even and the odd products are
 * summed in two float32 chains, the two are added, and that is added to the total; denormals count
 * as zero. The order is the processor's, so it is the same for any number of rows.
 *
 * The weight is the left factor: 16 outputs x 32 values of it are a tile just as they lie in
 * memory, so one row of activations streams the weight once and nothing is kept twice.
 */
#define _GNU_SOURCE
#include "dense.h"

#ifdef CONCLAVE_TILES

#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tiles.h"

#define CHUNK 16 /* tiles along K whose weights are copied together: 32 KiB for a panel */

/* From here on, half a panel is enough to read in one go (measured; the sums are the same). */
#define TALL_WIDTH 1536

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

struct __attribute__((packed)) tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Asks the operating system once; threads that ask at the same time get the same answer. */
int amx_available(void)
{
    static int answer = -1;
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    if (known < 0) {
        known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
        __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    return known;
}

void amx_begin(i64 rows)
{
    struct tile_config config = {.palette = 1};
    uint16_t narrow = (uint16_t)(4 * tile_rows(rows));
    for (int tile = 0; tile < 8; tile++) { /* 0-3 sums, 4-5 weights, 6-7 activations */
        config.rows[tile] = TILE;
        config.row_bytes[tile] = tile == 4 || tile == 5 ? 64 : narrow;
    }
    WRITTEN(&config);
    _tile_loadconfig(&config);
}

void amx_end(void) { _tile_release(); }

/* Copies tiles first_tile.. of 16 outputs, zeros where there is nothing. */
static void copy_tiles(const struct matrix *w, i64 first, i64 outputs, i64 first_tile, i64 tiles,
                       weight_tile *to)
{
    for (i64 j = 0; j < TILE; j++) {
        const uint16_t *from = (const uint16_t *)w->values + (first + j) * w->width;
        for (i64 tile = 0; tile < tiles; tile++) {
            i64 offset = (first_tile + tile) * DEPTH;
            __m512i v = read_values(from + offset, j < outputs ? w->width - offset : 0);
            _mm512_storeu_si512(to[tile][j], v);
        }
    }
}

/* Where a panel's weights are: two rows of tiles, `step` bytes apart along K. */
struct weights {
    const char *top, *bottom;
    i64 stride, step;
};

/* Adds `tiles` tiles along K to the sums in registers: 32 outputs x two tiles of rows, or one. */
static inline void multiply_wide(struct weights w, const char *left, const char *right, i64 tiles)
{
    for (i64 tile = 0; tile < tiles; tile++) {
        _tile_loadd(4, w.top + tile * w.step, w.stride);
        _tile_loadd(6, left + tile * 1024, 64);
        _tile_loadd(7, right + tile * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, w.bottom + tile * w.step, w.stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

static inline void multiply_narrow(struct weights w, const char *x, i64 columns, i64 tiles)
{
    for (i64 tile = 0; tile < tiles; tile++) {
        _tile_loadd(6, x + tile * columns * 64, columns * 4);
        _tile_loadd(4, w.top + tile * w.step, w.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w.bottom + tile * w.step, w.stride);
        _tile_dpbf16ps(2, 5, 6);
    }
}

/* The same for 16 outputs and four tiles of rows: the weight goes by once, not once per pair. */
static inline void multiply_tall(struct weights w, const char *x, i64 apart, i64 tiles)
{
    for (i64 tile = 0; tile < tiles; tile++, x += 1024) {
        _tile_loadd(4, w.top + tile * w.step, w.stride);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x + apart, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, x + 2 * apart, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, x + 3 * apart, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
}

/* Adds `tiles` tiles along K from `first_tile` on to `sums`, one entry per pair of row tiles. */
static void accumulate(const struct block *x, struct weights w, i64 first_tile, i64 tiles,
                       sum_tiles *sums)
{
    i64 columns = tile_rows(x->rows), apart = tiles_along(x->width) * columns * 64;
    const char *packed = (const char *)x->packed + first_tile * columns * 64;
    WRITTEN(w.top);
    if (amx_row_tiles(x->rows) == 4 && x->width >= TALL_WIDTH) {
        for (int half = 0; half < 4; half += 2, w.top = w.bottom) {
            float *s[4] = {sums[0][half][0], sums[0][half + 1][0], sums[1][half][0],
                           sums[1][half + 1][0]};
            take_sums(first_tile != 0, s[0], s[1], s[2], s[3]);
            multiply_tall(w, packed, apart, tiles);
            keep_sums(s[0], s[1], s[2], s[3]);
        }
        return;
    }
    if (x->rows <= TILE) {
        float(*s)[TILE][TILE] = sums[0];
        take_sums(first_tile != 0, s[0][0], s[1][0], s[2][0], s[3][0]);
        multiply_narrow(w, packed, columns, tiles);
        _tile_stored(0, s[0][0], 64);
        _tile_stored(2, s[2][0], 64);
        return;
    }
    for (i64 pair = 0; pair < (amx_row_tiles(x->rows) + 1) / 2; pair++, packed += 2 * apart) {
        float(*s)[TILE][TILE] = sums[pair];
        take_sums(first_tile != 0, s[0][0], s[1][0], s[2][0], s[3][0]);
        multiply_wide(w, packed, packed + apart, tiles);
        keep_sums(s[0][0], s[1][0], s[2][0], s[3][0]);
    }
}

void amx_turn_over(i64 rows, sum_tiles *tiles, float *sums)
{
    for (i64 row = 0; row < rows; row += TILE)
        for (int half = 0; half < 2; half++) {
            __m512i v[16];
            float(*s)[TILE] = tiles[row / (2 * TILE)][2 * half + row / TILE % 2];
            for (int i = 0; i < 16; i++)
                v[i] = _mm512_loadu_si512(s[i]);
            transpose_16x16(v);
            for (i64 i = 0; i < TILE && row + i < rows; i++)
                _mm512_storeu_si512(sums + (row + i) * PANEL + half * TILE, v[i]);
        }
}

/* While the sums of a panel are finished nothing else is read: its first lines are asked for before.
 * More of them, or all its lines while the panel before is multiplied, is slower. */
static inline void ask_for_panel(const char *values, i64 row_bytes)
{
    for (int row = 0; row < PANEL; row++, values += row_bytes) {
        _mm_prefetch(values, _MM_HINT_T0);
        _mm_prefetch(values + 64, _MM_HINT_T0);
    }
}

void amx_panel(const struct block *x, const struct matrix *w, i64 first, i64 outputs, float *sums)
{
    _Alignas(64) weight_tile copied[2][CHUNK];
    _Alignas(64) sum_tiles tiles[BLOCK_ROWS / (2 * TILE)];
    const struct weights there = {(char *)copied[0], (char *)copied[1], 64, sizeof(weight_tile)};
    i64 along = (w->width + DEPTH - 1) / DEPTH, tile = 0;
    if (outputs == PANEL) {
        i64 row_bytes = w->width * 2;
        const char *top = (const char *)w->values + first * row_bytes;
        struct weights here = {top, top + TILE * row_bytes, row_bytes, DEPTH * 2};
        tile = w->width / DEPTH;
        if (tile)
            accumulate(x, here, 0, tile, tiles);
        if (first + 2 * PANEL <= w->outputs)
            ask_for_panel(top + PANEL * row_bytes, row_bytes);
    }
    while (tile < along) {
        i64 count = along - tile < CHUNK ? along - tile : CHUNK, end = tile + count;
        for (int half = 0; half < 2; half++)
            copy_tiles(w, first + half * TILE, outputs - half * TILE, tile, count, copied[half]);
        accumulate(x, there, tile, count, tiles);
        tile = end;
    }
    amx_turn_over(x->rows, tiles, sums);
}

#endif
