/* One register of VW floats: what differs between AVX-512 and AVX2, and nothing else. */
#ifndef CONCLAVE_VECTOR_H
#define CONCLAVE_VECTOR_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

/* Element types; the numbers are those of native.py. */
enum type { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

static inline int type_size(enum type t) { return t == F32 ? 4 : t == I8 ? 1 : 2; }

#if defined(__AVX512F__)

#define VW 16
typedef __m512 vec;

static inline vec v_zero(void) { return _mm512_setzero_ps(); }
static inline vec v_set(float x) { return _mm512_set1_ps(x); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
/* Both return b where either is NaN. */
static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
/* v · 2^n, n an integral value between -126 and 127 in `magic` = n + 1.5·2^23. */
static inline vec v_scale2(vec v, vec magic)
{
    __m512i n = _mm512_slli_epi32(_mm512_castps_si512(magic), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n));
}
static inline vec v_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline vec v_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
static inline vec v_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
static inline void v_store_f16(uint16_t *p, vec v)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
/* Round to nearest even. */
static inline void v_store_bf16(uint16_t *p, vec v)
{
#ifdef __AVX512BF16__
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
#endif
}
static inline __m256 v_fold(vec v)
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#define V_LOW(a, b) _mm512_unpacklo_ps(a, b)
#define V_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define V_SHUFFLE(a, b, m) _mm512_shuffle_ps(a, b, m)

#else

#define VW 8
typedef __m256 vec;

static inline vec v_zero(void) { return _mm256_setzero_ps(); }
static inline vec v_set(float x) { return _mm256_set1_ps(x); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec v_scale2(vec v, vec magic)
{
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(magic), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), n));
}
static inline vec v_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vec v_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}
static inline vec v_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}
static inline void v_store_f16(uint16_t *p, vec v)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_store_bf16(uint16_t *p, vec v)
{
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
    up = _mm256_srli_epi32(up, 16);
    up = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
    _mm_storeu_si128((void *)p, _mm256_castsi256_si128(up));
}
static inline __m256 v_fold(vec v) { return v; }
#define V_LOW(a, b) _mm256_unpacklo_ps(a, b)
#define V_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define V_SHUFFLE(a, b, m) _mm256_shuffle_ps(a, b, m)

#endif

/* VW elements as floats; exact for every type. */
static inline __attribute__((always_inline)) vec v_read(enum type t, const void *p)
{
    switch (t) {
    case F32: return v_load(p);
    case BF16: return v_load_bf16(p);
    case F16: return v_load_f16(p);
    default: return v_load_i8(p);
    }
}

/* The first n < VW elements, zeros behind; reads nothing beyond them. */
static inline vec v_read_part(enum type t, const void *p, i64 n)
{
    char part[4 * VW] = {0};
    memcpy(part, p, (size_t)(n * type_size(t)));
    return v_read(t, part);
}

static inline void v_write(enum type t, void *p, vec v)
{
    if (t == F32)
        v_store(p, v);
    else if (t == BF16)
        v_store_bf16(p, v);
    else
        v_store_f16(p, v);
}

static inline void v_write_part(enum type t, void *p, vec v, i64 n)
{
    char part[4 * VW];
    v_write(t, part, v);
    memcpy(p, part, (size_t)(n * type_size(t)));
}

/* Sums over the lanes of four registers, each by the same tree: → 4 floats. */
static inline __m128 v_sum4(vec a, vec b, vec c, vec d)
{
    vec ab = V_LOW(a, b) + V_HIGH(a, b), cd = V_LOW(c, d) + V_HIGH(c, d);
    __m256 half = v_fold(V_SHUFFLE(ab, cd, 0x44) + V_SHUFFLE(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* exp(x) to about one unit in the last place; beyond ±87 the value at ±87. NaN stays NaN. */
static inline vec v_exp(vec x)
{
    const vec magic = v_set(12582912.0f);
    x = v_min(v_set(87.0f), v_max(v_set(-87.0f), x));
    vec shifted = v_fma(x, v_set(1.44269504f), magic);
    vec n = shifted - magic;
    vec r = v_fma(n, v_set(-0.693359375f), x);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vec p = v_set(1.9875691500e-4f); /* Cephes' expf */
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p, r * r, r) + v_set(1.0f);
    return v_scale2(p, shifted);
}

/* x · sigmoid(x), where sigmoid falls to 0 between -89 and -90. NaN for -inf, as in PyTorch. */
static inline vec v_silu(vec x)
{
    vec some = v_min(v_set(1.0f), v_max(v_zero(), x + v_set(90.0f)));
    return x * some / (v_set(1.0f) + v_exp(v_zero() - x));
}

#endif
