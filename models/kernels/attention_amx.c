/* Attention's products in AMX tiles, for bfloat16: keys are turned over and values interleaved once
 * per split and head, for all query rows; or, where they are few, the queries are turned instead
 * and keys multiplied where they lie. The order of a sum is the processor's, the same for either
 * and for any number of rows; denormals count as zero. */
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
    return _mm512_maskz_loadu_epi16(mask, from + 2 * d);
}

static void pack_query(enum type type, const char *from, i64 head_dim, void *to)
{
    (void)type;
    for (i64 d = 0; d < head_dim; d += DEPTH)
        _mm512_storeu_si512((uint16_t *)to + d,
                            from ? read_values(from, d, head_dim) : _mm512_setzero_si512());
}

/* → tiles [d / 32][key / 16] of [16 pairs along d][16 keys][2] */
static void pack_keys(enum type type, const struct split *from, i64 head_dim, void *packed)
{
    (void)type;
    for (i64 part = 0; part < PARTS; part++) {
        uint16_t *to = (uint16_t *)packed + part * TILE_VALUES;
        for (i64 d = 0; d < head_dim; d += DEPTH, to += PARTS * TILE_VALUES) {
            __m512i v[TILE];
            for (i64 i = 0; i < TILE; i++) {
                v[i] = read_values(from->rows[part] + 2 * i * head_dim, d, head_dim);
                _mm_prefetch(from->next[part] + 2 * (i * head_dim + d), FETCH);
            }
            transpose_16x16(v);
            for (i64 i = 0; i < TILE; i++)
                _mm512_storeu_si512(to + i * DEPTH, v[i]);
        }
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
    const i64 column = SPLIT / DEPTH * TILE_VALUES, row = 2 * head_dim;
    for (i64 key = 0; key < SPLIT; key += 2) {
        uint16_t *to = (uint16_t *)packed + key / 2 * DEPTH;
        const char *from_row = from->rows[key / TILE] + key % TILE * row;
        const char *next = from->next[key / TILE] + key % TILE * row;
        for (i64 d = 0; d < head_dim; d += DEPTH, to += 2 * column) {
            __m512i even = read_values(from_row, d, head_dim);
            __m512i odd = read_values(from_row + row, d, head_dim);
            _mm_prefetch(next + 2 * d, FETCH);
            _mm_prefetch(next + row + 2 * d, FETCH);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + column, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/* Tiles 0-3 sums, 4 rows, 5-6 keys or values; 7 the same or, for few, turned queries. These have
 * sums of keys with queries in 2 and 3. */
static void begin(i64 rows, int few)
{
    struct tile_config config = {.palette = 1};
    uint8_t most = (uint8_t)(rows < TILE ? rows : TILE);
    for (int tile = 0; tile < 8; tile++) {
        int turned = few && (tile == 2 || tile == 3 || tile == 7);
        config.rows[tile] = tile < 5 && !turned ? most : TILE;
        config.row_bytes[tile] = turned ? 4 * most : 64;
    }
    WRITTEN();
    _tile_loadconfig(&config);
}

static void end(void) { _tile_release(); }

static int reads_keys(i64 head_dim) { return head_dim % DEPTH == 0; }

/* [rows][head_dim] → [pairs along head_dim][rows][2], in place */
static void turn_queries(void *queries, i64 head_dim, i64 rows)
{
    uint32_t pairs[TILE * MOST_HEAD_DIM / 2], *to = queries;
    memcpy(pairs, queries, (size_t)(rows * head_dim * 2));
    for (i64 pair = 0; pair < head_dim / 2; pair++)
        for (i64 row = 0; row < rows; row++)
            *to++ = pairs[row * head_dim / 2 + pair];
}

/* [16 keys][rows] → rows at a stride of SPLIT */
static void turn_scores(const float *from, i64 rows, float *to)
{
    __m512i v[TILE];
    if (rows == 4) { /* four keys in a register: turned within lanes, then across */
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (i64 i = 0; i < 4; i++)
            v[i] = _mm512_loadu_si512(from + i * 16);
        __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        v[0] = _mm512_unpacklo_epi64(a, c);
        v[1] = _mm512_unpackhi_epi64(a, c);
        v[2] = _mm512_unpacklo_epi64(b, d);
        v[3] = _mm512_unpackhi_epi64(b, d);
        for (i64 row = 0; row < 4; row++)
            _mm512_storeu_si512(to + row * SPLIT, _mm512_permutexvar_epi32(order, v[row]));
        return;
    }
    __mmask16 some = (__mmask16)((1u << rows) - 1);
    for (i64 key = 0; key < TILE; key++)
        v[key] = _mm512_maskz_loadu_epi32(some, from + key * rows);
    transpose_16x16(v);
    for (i64 row = 0; row < rows; row++)
        _mm512_storeu_si512(to + row * SPLIT, v[row]);
}

static void fetch(const char *from, i64 bytes)
{
    for (i64 at = 0; at < bytes; at += 64)
        _mm_prefetch(from + at, FETCH);
}

static void scores_of_few(const void *queries, const struct split *keys, i64 head_dim, i64 rows,
                          float *to)
{
    _Alignas(64) float turned[2][TILE * TILE];
    const i64 row = 2 * head_dim;
    for (i64 part = 0; part < PARTS; part += 2) {
        const char *q = queries, *first = keys->rows[part], *second = keys->rows[part + 1];
        WRITTEN();
        _tile_zero(2);
        _tile_zero(3);
        for (i64 d = 0; d < head_dim; d += DEPTH, q += TILE * 4 * rows) {
            _tile_loadd(7, q, 4 * rows);
            _tile_loadd(5, first + 2 * d, row);
            _tile_dpbf16ps(2, 5, 7);
            fetch(keys->next[part] + d * TILE * 2, DEPTH * TILE * 2);
            _tile_loadd(6, second + 2 * d, row);
            _tile_dpbf16ps(3, 6, 7);
            fetch(keys->next[part + 1] + d * TILE * 2, DEPTH * TILE * 2);
        }
        _tile_stored(2, turned[0], 4 * rows);
        _tile_stored(3, turned[1], 4 * rows);
        WRITTEN();
        turn_scores(turned[0], rows, to + part * TILE);
        turn_scores(turned[1], rows, to + (part + 1) * TILE);
    }
}

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

const struct arithmetic amx_arithmetic = {row_bytes,   width_of,   pack_query,   pack_keys,
                                          pack_values, begin,      end,          scores,
                                          add,         reads_keys, turn_queries, scores_of_few};

#else

const struct arithmetic amx_arithmetic = {0}; /* amx_available() says that it is not there */

#endif
