/* Rows of any width, a register at a time. */
#ifndef CONCLAVE_ROWS_H
#define CONCLAVE_ROWS_H

#include "parallel.h"
#include "vector.h"

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

/* A task that computes the rows of a structure with `rows` and `type`, one by one, compiled for each
 * type: `one_row(type, structure, row)`. */
#define ROWS_TASK(name, structure, one_row)                                                        \
    static void name(void *context, int index, int count)                                          \
    {                                                                                              \
        const struct structure *s = context;                                                       \
        i64 row, end;                                                                              \
        share(s->rows, index, count, &row, &end);                                                  \
        for (; row < end; row++)                                                                   \
            switch (s->type) {                                                                     \
            case F32: one_row(F32, s, row); break;                                                 \
            case BF16: one_row(BF16, s, row); break;                                               \
            default: one_row(F16, s, row); break;                                                  \
            }                                                                                      \
    }

/* As the model dtype would hold it. */
static inline __attribute__((always_inline)) vec rounded(enum type type, vec v)
{
    char memory[4 * VW];
    v_write(type, memory, v);
    return v_read(type, memory);
}

#endif
