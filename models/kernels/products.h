/* Matrix products of blocks of rows: packed once, panels of outputs shared by threads. */
#ifndef CONCLAVE_PRODUCTS_H
#define CONCLAVE_PRODUCTS_H

#include "dense.h"

/* Some rows times one matrix, or silu(rows · gate) ⊙ (rows · weight): → out [rows, outputs]. */
struct product {
    struct block x;
    const char *values;
    const struct matrix *weight, *gate;
    char *out;
    enum type type; /* of values and out */
};

struct products {
    struct product *all;
    int count;
};

/* All products, which may be computed in any order; returns when all are there. */
void run_products(struct products p, int threads);

/* Of a product whose rows are not packed, at most so many rows from `first` on. */
struct product rows_of(const struct product *all, i64 first, i64 rows);

/* Each thread takes whole blocks of so many rows and packs them into `slot` bytes of its own, one
 * after another in x.packed: no thread waits for another or reads what another's cache holds. */
void run_apart(const struct product *all, i64 rows, size_t slot, int threads);

/* What the sums of a panel's outputs are multiplied by and what is added to them then. */
struct terms {
    float scale[PANEL], bias[PANEL];
};

void read_terms(const struct product *p, const struct matrix *w, i64 first, struct terms *terms);

/* Panels first..end of a product, packed as tiles, of more rows than amx_few_rows. */
#ifdef CONCLAVE_TILES
void amx_many(const struct product *p, i64 first, i64 end);
#else
#define amx_many(p, first, end) ((void)0)
#endif

#endif
