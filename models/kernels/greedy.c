/* The greatest logit of each row. */
#include <math.h>

#include "parallel.h"
#include "rows.h"

#define NOT_FINITE -1

/* The layout is that of greedy.py. */
struct greedy {
    const char *logits; /* [rows, width] */
    i64 *ids;           /* [rows] */
    i64 rows, width, type, threads;
};

/* The first of the greatest; NOT_FINITE where any value is infinite or no number. */
static i64 greatest(enum type type, const char *row, i64 width)
{
    vec most = v_set(-INFINITY), zeros = v_zero();
    i64 at = 0;
    for (; at + VW <= width; at += VW) {
        vec v = v_read(type, row + at * type_size(type));
        most = v_max(most, v);
        zeros += v * v_zero(); /* NaN from here on, unless v is finite */
    }
    float top[VW], check[VW];
    v_store(top, most);
    v_store(check, zeros);
    float best = -INFINITY, sound = 0.0f;
    for (int i = 0; i < VW; i++) {
        best = top[i] > best ? top[i] : best;
        sound += check[i];
    }
    for (i64 i = at; i < width; i++) {
        float value = v_read_part(type, row + i * type_size(type), 1)[0];
        best = value > best ? value : best;
        sound += value * 0.0f;
    }
    if (sound != 0.0f)
        return NOT_FINITE;
    for (i64 i = 0; i < width; i += VW) {
        float some[VW];
        v_store(some, read_some(type, row, i, width));
        for (i64 j = 0; j < VW && i + j < width; j++)
            if (some[j] == best)
                return i + j;
    }
    return NOT_FINITE;
}

static void greedy_share(void *context, int index, int count)
{
    const struct greedy *g = context;
    enum type type = (enum type)g->type;
    i64 row, end;
    share(g->rows, index, count, &row, &end);
    for (; row < end; row++)
        g->ids[row] = greatest(type, g->logits + row * g->width * type_size(type), g->width);
}

EXPORT void conclave_greedy(struct greedy *g)
{
    in_parallel(greedy_share, g, g->rows * g->width < SERIAL_ELEMENTS ? 1 : (int)g->threads);
}
