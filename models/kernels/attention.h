/* Attention of query rows over splits of keys: two ways to multiply, each with one order.
 *
 * Legend: H query heads, G key/value heads, h head_dim; a query row is one head of one token.
 */
#ifndef CONCLAVE_ATTENTION_H
#define CONCLAVE_ATTENTION_H

#include "vector.h"

#define SPLIT 64 /* keys computed together, at absolute positions */
#define TILE 16  /* most query rows computed together */
#define MOST_HEAD_DIM 512
#define FETCH _MM_HINT_T1 /* into the second-level cache */
#define ROUND_UP(n, m) (((n) + (m)-1) / (m) * (m))

/* Where each key (or value) of a split of one head is, NULL where nobody looks; and where those are
 * that will be packed next, to be fetched meanwhile: rows too short for the processor to foresee. */
struct split {
    const char *rows[SPLIT], *next[SPLIT];
};

/* One way to multiply. Query rows, keys and values are rearranged ("packed") once, each key or
 * value row in as much memory as a query row; what is not there is packed as zeros. */
struct arithmetic {
    i64 (*row_bytes)(i64 head_dim);
    i64 (*width)(i64 head_dim); /* floats in a row of sums */
    void (*pack_query)(enum type type, const char *from, i64 head_dim, void *to);
    void (*pack_keys)(enum type type, const struct split *from, i64 head_dim, void *to);
    void (*pack_values)(enum type type, const struct split *from, i64 head_dim, void *to);
    /* Around all tiles of the same number of rows: TILE, or fewer. */
    void (*begin)(i64 rows);
    void (*end)(void);
    /* scores[row * SPLIT + key] = query · key */
    void (*scores)(const void *queries, const void *keys, i64 head_dim, i64 rows, float *scores);
    /* sums[row * width + d] += weights[row * SPLIT + key] · values[key][d] */
    void (*add)(const float *weights, const void *values, i64 head_dim, i64 rows, float *sums);
};

extern const struct arithmetic dot_arithmetic; /* float32 throughout, any type */
extern const struct arithmetic amx_arithmetic; /* bfloat16; weights are rounded to it too */

/* Some query rows and what is known of them after the splits so far. */
struct tile {
    const void *queries; /* packed */
    i64 rows;
    float *sums, *most, *mass; /* [rows][width], [rows], [rows][VW]; `most` has TILE readable */
    const i64 *from, *to;      /* the keys of the split that each row sees: from < to, or none */
    float *scores;             /* [TILE][SPLIT], for the time of a call */
};

/* Takes in one split of packed keys and values. */
void attend(const struct arithmetic *arithmetic, const struct tile *tile, const void *keys,
            const void *values, i64 head_dim);

/* What the masses of a row's lanes add up to. */
float total_mass(const float *mass);

#endif
