/* Exponentials and logarithms of whole registers, a few operations each and one order. */
#ifndef CONCLAVE_EXPONENTIAL_H
#define CONCLAVE_EXPONENTIAL_H

#include "vector.h"

#define LOG2_E 1.44269504088896340736

/* 2^x for x < 127 to one unit in the last place; below -126 the value at -126. NaN stays NaN. */
static inline __attribute__((always_inline)) vec v_exp2(vec x)
{
    const vec magic = v_set(12582912.0f); /* 1.5 · 2^23: adding it rounds to an integer */
    x = v_max(v_set(-126.0f), x);
    vec shifted = x + magic;
    vec r = x - (shifted - magic);
    vec p = v_set(1.535336196e-04f); /* minimax on ±1/2 of (2^r - 1) / r */
    p = v_fma(p, r, v_set(1.339887502e-03f));
    p = v_fma(p, r, v_set(9.618436918e-03f));
    p = v_fma(p, r, v_set(5.550332367e-02f));
    p = v_fma(p, r, v_set(2.402264774e-01f));
    p = v_fma(p, r, v_set(6.931471825e-01f));
    p = v_fma(p, r, v_set(1.0f));
    return v_scale2(p, shifted);
}

/* log(1 + t) for 0 <= t <= 1, as 2 artanh(t / (2 + t)): small values keep their digits. */
static inline vec v_log1p(vec t)
{
    vec s = t / (t + v_set(2.0f)), z = s * s;
    vec p = v_set(1.401223242e-01f); /* minimax on z <= 1/9 */
    p = v_fma(p, z, v_set(1.399956942e-01f));
    p = v_fma(p, z, v_set(2.001084983e-01f));
    p = v_fma(p, z, v_set(3.333320618e-01f));
    vec twice = s + s;
    return v_fma(twice * z, p, twice);
}

/* log(1 + exp(x)) */
static inline vec v_softplus(vec x)
{
    vec size = v_max(x, v_zero() - x);
    return v_max(v_zero(), x) + v_log1p(v_exp(v_zero() - size));
}

#endif
