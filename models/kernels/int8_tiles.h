/* int8 weights as AMX tiles: 64 values of an output along K become a row in each of two tiles, those
 * at even places and those at odd ones, as bfloat16 divided by 256, which is exact. */
#ifndef CONCLAVE_INT8_TILES_H
#define CONCLAVE_INT8_TILES_H

#include "amx_tiles.h"

#define PAIR (2 * DEPTH) /* values along K that are converted together: a line of cache */
#define SOON (2 * PAIR)  /* bytes ahead of which a line is asked into the first-level cache */

/* At most 16 outputs of a weight where they lie, and what is to be read after them. */
struct source {
    const int8_t *values;
    i64 width, outputs;
    const char *next; /* is asked into the second-level cache in the order of its addresses */
};

/* A panel later the same outputs come again; the last panel has nothing better than itself. */
static inline struct source source_of(const struct matrix *w, i64 first, i64 outputs)
{
    const int8_t *values = (const int8_t *)w->values + first * w->width;
    i64 next = first + PANEL + TILE <= w->outputs ? PANEL * w->width : 0;
    return (struct source){values, w->width, outputs, (const char *)values + next};
}

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

/* Outputs row.. of the pair at k into their rows of two tiles, zeros where there is nothing.
 * `is_whole`: 16 outputs and 64 values are there. */
static inline __attribute__((always_inline)) void convert(const struct source *w, i64 k, i64 row,
                                                          i64 count, int is_whole, weight_tile *to)
{
    const int8_t *from = w->values + row * w->width + k;
    const char *next = w->next + k * TILE + row * PAIR;
    __mmask64 mask = ~(__mmask64)0;
    if (!is_whole && w->width - k < PAIR)
        mask = ((__mmask64)1 << (w->width - k)) - 1;
    for (i64 end = row + count; row < end; row++, from += w->width, next += PAIR) {
        __m512i v = is_whole ? _mm512_loadu_si512(from)
                             : _mm512_maskz_loadu_epi8(row < w->outputs ? mask : 0, from);
        _mm_prefetch(from + SOON, _MM_HINT_T0);
        _mm_prefetch(next, _MM_HINT_T1);
        _mm512_storeu_si512(to[0][row], low_bytes(v));
        _mm512_storeu_si512(to[1][row], low_bytes(_mm512_srli_epi16(v, 8)));
    }
}

#endif
