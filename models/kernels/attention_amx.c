/* Attention's products in AMX tiles, for bfloat16: keys are turned over and values interleaved once
 * per split and head, for all query rows. The order of a sum is the processor's, so it is the same
 * for any number of rows; denormals count as zero. */
#include "attention.h"
#include "dense.h"

#ifdef CONCLAVE_TILES

#include "transpose.h"

#define DEPTH 32 /* values along a sum in a tile */
#define TILE_VALUES (TILE * DEPTH)

struct __attribute__((packed)) tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* The tile intrinsics do not tell the compiler what they read: it must be in memory by then. */
#define WRITTEN() __asm__ volatile("" : : : "memory")

static i64 width_of(i64 head_dim) { return ROUND_UP(head_dim, DEPTH); }
static i64 row_bytes(i64 head_dim) { return width_of(head_dim) * 2; }

static inline __m512i read_values(const char *from, i64 d, i64 head_dim)
{
    i64 left = head_dim - d;
    __mmask32 mask = left >= DEPTH ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
    return from ? _mm512_maskz_loadu_epi16(mask, from + 2 * d) : _mm512_setzero_si512();
}

static void pack_query(enum type type, const char *from, i64 head_dim, void *to)
{
    (void)type;
    for (i64 d = 0; d < head_dim; d += DEPTH)
        _mm512_storeu_si512((uint16_t *)to + d, read_values(from, d, head_dim));
}

/* → tiles [d / 32][key / 16] of [16 pairs along d][16 keys][2] */
static void pack_keys(enum type type, const struct split *from, i64 head_dim, void *packed)
{
    (void)type;
    uint16_t *to = packed;
    for (i64 d = 0; d < head_dim; d += DEPTH)
        for (i64 key = 0; key < SPLIT; key += TILE, to += TILE_VALUES) {
            __m512i v[TILE];
            for (i64 i = 0; i < TILE; i++) {
                v[i] = read_values(from->rows[key + i], d, head_dim);
                _mm_prefetch(from->next[key + i] + 2 * d, FETCH);
            }
            transpose_16x16(v);
            for (i64 i = 0; i < TILE; i++)
                _mm512_storeu_si512(to + i * DEPTH, v[i]);
        }
}

/* → tiles [d / 16][key / 32] of [16 pairs of keys][16 d][2] */
static void pack_values(enum type type, const struct split *from, i64 head_dim, void *packed)
{
    (void)type;
    uint16_t order[2 * DEPTH];
    for (uint16_t i = 0; i < DEPTH; i++) {
        order[2 * i] = i;
        order[2 * i + 1] = i + DEPTH;
    }
    const __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + DEPTH);
    const i64 column = SPLIT / DEPTH * TILE_VALUES;
    for (i64 pair = 0; pair < SPLIT / 2; pair++) {
        uint16_t *to = (uint16_t *)packed + pair * DEPTH;
        for (i64 d = 0; d < head_dim; d += DEPTH, to += 2 * column) {
            __m512i even = read_values(from->rows[2 * pair], d, head_dim);
            __m512i odd = read_values(from->rows[2 * pair + 1], d, head_dim);
            _mm_prefetch(from->next[2 * pair] + 2 * d, FETCH);
            _mm_prefetch(from->next[2 * pair + 1] + 2 * d, FETCH);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + column, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

static void begin(i64 rows)
{
    struct tile_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) { /* 0-3 sums, 4 rows, 5-7 keys or values */
        config.rows[tile] = tile < 5 ? (uint8_t)(rows < TILE ? rows : TILE) : TILE;
        config.row_bytes[tile] = 64;
    }
    WRITTEN();
    _tile_loadconfig(&config);
}

static void end(void) { _tile_release(); }

static void scores(const void *queries, const void *keys, i64 head_dim, i64 rows, float *to)
{
    (void)rows;
    const char *q = queries, *k = keys;
    i64 stride = row_bytes(head_dim);
    WRITTEN();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 d = 0; d < head_dim; d += DEPTH, k += 4 * 2 * TILE_VALUES) {
        _tile_loadd(4, q + 2 * d, stride);
        _tile_loadd(5, k, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, k + 2 * TILE_VALUES, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, k + 4 * TILE_VALUES, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, k + 6 * TILE_VALUES, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, to, SPLIT * 4);
    _tile_stored(1, to + TILE, SPLIT * 4);
    _tile_stored(2, to + 2 * TILE, SPLIT * 4);
    _tile_stored(3, to + 3 * TILE, SPLIT * 4);
}

static void round_weights(const float *weights, i64 rows, uint16_t *to)
{
    for (i64 i = 0; i < rows * SPLIT; i += 32)
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + i + 16),
                                                                 _mm512_loadu_ps(weights + i)));
}

static void add(const float *weights, const void *values, i64 head_dim, i64 rows, float *sums)
{
    _Alignas(64) uint16_t rounded[TILE * SPLIT];
    const char *w = (const char *)rounded, *v = values;
    i64 width = width_of(head_dim);
    round_weights(weights, rows, rounded);
    WRITTEN();
    for (i64 d = 0; d < width; d += 2 * TILE, v += 8 * TILE_VALUES) {
        _tile_loadd(0, sums + d, width * 4);
        _tile_loadd(1, sums + d + TILE, width * 4);
        _tile_loadd(4, w, SPLIT * 2);
        _tile_loadd(5, v, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, v + 4 * TILE_VALUES, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(4, w + 2 * DEPTH, SPLIT * 2);
        _tile_loadd(5, v + 2 * TILE_VALUES, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, v + 6 * TILE_VALUES, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_stored(0, sums + d, width * 4);
        _tile_stored(1, sums + d + TILE, width * 4);
    }
}

const struct arithmetic amx_arithmetic = {row_bytes, width_of, pack_query, pack_keys, pack_values,
                                          begin,     end,      scores,     add};

#else

const struct arithmetic amx_arithmetic = {0}; /* amx_available() says that it is not there */

#endif
