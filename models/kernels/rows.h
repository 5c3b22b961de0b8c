/* Rows of any width, a register at a time. */
#ifndef CONCLAVE_ROWS_H
#define CONCLAVE_ROWS_H

#include "vector.h"

#define SERIAL_ELEMENTS (1 << 15) /* below, waking other threads costs more than it brings */

/* VW elements from `at` on of a row of `width`, zeros behind its end. */
static inline __attribute__((always_inline)) vec read_some(enum type type, const char *from, i64 at,
                                                           i64 width)
{
    from += at * type_size(type);
    return width - at >= VW ? v_read(type, from) : v_read_part(type, from, width - at);
}

static inline __attribute__((always_inline)) void write_some(enum type type, char *to, i64 at,
                                                             i64 width, vec v)
{
    to += at * type_size(type);
    if (width - at >= VW)
        v_write(type, to, v);
    else
        v_write_part(type, to, v, width - at);
}

/* As the model dtype would hold it. */
static inline __attribute__((always_inline)) vec rounded(enum type type, vec v)
{
    char memory[4 * VW];
    v_write(type, memory, v);
    return v_read(type, memory);
}

#endif
