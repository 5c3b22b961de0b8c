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

#define STEP 2   /* of int8 tiles that are converted while others are multiplied */
#define AHEAD 64 /* bytes that int8 weights are asked for before their turn */
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

typedef uint16_t weight_tile[TILE][DEPTH];

/* The tile intrinsics do not tell the compiler what they read: it must be in memory by then. */
#define WRITTEN(p) __asm__ volatile("" : : "r"(p) : "memory")

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

/* Two bytes in each of 32 words: their low ones as bfloat16, divided by 256.
 *
 * As a half float, 0x4400 with u in its last bits is 4 + u / 256; u is v + 128. What is left after
 * taking 4.5 away fits bfloat16, whose exponent is 112 more: as a half's is below 16, or-ing adds.
 */
static inline __m512i low_bytes(__m512i words)
{
    const __m512i byte = _mm512_set1_epi16(0xff), four = _mm512_set1_epi16(0x4480);
    const __m512i half = _mm512_set1_epi16((short)0x8fff), bias = _mm512_set1_epi16(0x3800);
    __m512i shifted = _mm512_ternarylogic_epi32(words, byte, four, 0x6a); /* (a & b) ^ c */
    __m512i v = _mm512_castph_si512(
        _mm512_sub_ph(_mm512_castsi512_ph(shifted), _mm512_castsi512_ph(_mm512_set1_epi16(0x4480))));
    __mmask32 nonzero = _mm512_test_epi16_mask(v, v);
    v = _mm512_ternarylogic_epi32(_mm512_srai_epi16(v, 3), half, bias, 0xea); /* (a & b) | c */
    return _mm512_maskz_mov_epi16(nonzero, v);
}

/* Copies tiles first_tile.. of 16 outputs, zeros where there is nothing. */
static void copy_bf16(const struct matrix *w, i64 first, i64 outputs, i64 first_tile, i64 tiles,
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

/* The same, from int8 to bfloat16 in two steps of 32 at a time; asks for what comes next. */
static void copy_int8(const struct matrix *w, i64 first, i64 outputs, i64 first_tile, i64 tiles,
                      weight_tile *to)
{
    for (i64 tile = 0; tile < tiles; tile += 2) {
        i64 offset = (first_tile + tile) * DEPTH, n = w->width - offset;
        const int8_t *from = (const int8_t *)w->values + first * w->width + offset;
        __mmask64 mask = n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
        for (i64 j = 0; j < TILE; j++, from += w->width) {
            __m512i v = _mm512_maskz_loadu_epi8(j < outputs ? mask : 0, from);
            _mm_prefetch(from + AHEAD, _MM_HINT_T0);
            _mm512_storeu_si512(to[tile][j], low_bytes(v));
            _mm512_storeu_si512(to[tile + 1][j], low_bytes(_mm512_srli_epi16(v, 8)));
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
    for (i64 pair = 0; pair < (amx_row_tiles(x->rows) + 1) / 2; pair++, packed += 2 * apart) {
        float(*s)[TILE][TILE] = sums[pair];
        take_sums(first_tile != 0, s[0][0], s[1][0], s[2][0], s[3][0]);
        if (x->rows > TILE)
            multiply_wide(w, packed, packed + apart, tiles);
        else
            multiply_narrow(w, packed, columns, tiles);
        keep_sums(s[0][0], s[1][0], s[2][0], s[3][0]);
    }
}

/* [outputs][rows] tiles → sums[row * PANEL + output]. */
static void turn_over(i64 rows, sum_tiles *tiles, float *sums)
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

/* Few rows: the next tiles are converted while the processor multiplies the last ones. */
static void int8_narrow(const struct block *x, const struct matrix *w, i64 first, i64 outputs,
                        sum_tiles *sums)
{
    _Alignas(64) weight_tile copied[2][2][STEP];
    i64 columns = tile_rows(x->rows), along = tiles_along(w->width), last = 0;
    const char *packed = x->packed;
    _tile_zero(0);
    _tile_zero(2);
    for (i64 tile = 0, step = 0; last || tile < along; step++) {
        weight_tile(*next)[STEP] = copied[step % 2], (*ready)[STEP] = copied[1 - step % 2];
        i64 count = along - tile < STEP ? along - tile : STEP;
        if (count) {
            copy_int8(w, first, outputs, tile, count, next[0]);
            copy_int8(w, first + TILE, outputs - TILE, tile, count, next[1]);
        }
        if (last) {
            struct weights there = {(char *)ready[0], (char *)ready[1], 64, sizeof(weight_tile)};
            WRITTEN(ready);
            multiply_narrow(there, packed, columns, last);
            packed += last * columns * 64;
        }
        tile += count;
        last = count;
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(2, sums[0][2], 64);
}

void amx_panel(const struct block *x, const struct matrix *w, i64 first, i64 outputs, float *sums)
{
    _Alignas(64) weight_tile copied[2][CHUNK];
    _Alignas(64) sum_tiles tiles[BLOCK_ROWS / (2 * TILE)];
    const struct weights there = {(char *)copied[0], (char *)copied[1], 64, sizeof(weight_tile)};
    i64 along = w->type == I8 ? tiles_along(w->width) : (w->width + DEPTH - 1) / DEPTH, tile = 0;
    if (w->type == BF16 && outputs == PANEL) {
        i64 row_bytes = w->width * 2;
        const char *top = (const char *)w->values + first * row_bytes;
        struct weights here = {top, top + TILE * row_bytes, row_bytes, DEPTH * 2};
        tile = w->width / DEPTH;
        if (tile)
            accumulate(x, here, 0, tile, tiles);
    }
    if (w->type == I8 && x->rows <= TILE) {
        int8_narrow(x, w, first, outputs, tiles);
        tile = along;
    }
    while (tile < along) {
        i64 count = along - tile < CHUNK ? along - tile : CHUNK, end = tile + count;
        for (int half = 0; half < 2; half++)
            if (w->type == BF16)
                copy_bf16(w, first + half * TILE, outputs - half * TILE, tile, count, copied[half]);
            else
                copy_int8(w, first + half * TILE, outputs - half * TILE, tile, count, copied[half]);
        accumulate(x, there, tile, count, tiles);
        tile = end;
    }
    turn_over(x->rows, tiles, sums);
}

#endif
