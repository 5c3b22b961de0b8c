/* Attention of query rows over splits of keys: two ways to multiply, each with one order.
 *
 * Legend: H query heads, G key/value heads, h head_dim; a query row is one head of one token.
 */
#ifndef CONCLAVE_ATTENTION_H
#define CONCLAVE_ATTENTION_H

#include "vector.h"

#define SPLIT 64 /* keys computed together, at absolute positions */
#define TILE 16  /* most query rows computed together */
#define PARTS (SPLIT / TILE)
#define MOST_HEAD_DIM 512
#define FETCH _MM_HINT_T1 /* into the second-level cache */
#define ROUND_UP(n, m) (((n) + (m)-1) / (m) * (m))

/* Keys (or values) of a split of one head: TILE rows each, one row behind the other. And where
 * those are that will be read next, to be fetched meanwhile: the processor foresees no jumps. */
struct split {
    const char *rows[PARTS], *next[PARTS];
};

/* One way to multiply. Query rows, keys and values are rearranged ("packed") once, each key or
 * value row in as much memory as a query row. */
struct arithmetic {
    i64 (*row_bytes)(i64 head_dim);
    i64 (*width)(i64 head_dim); /* floats in a row of sums */
    void (*pack_query)(enum type type, const char *from, i64 head_dim, void *to); /* NULL: zeros */
    void (*pack_keys)(enum type type, const struct split *from, i64 head_dim, void *to);
    void (*pack_values)(enum type type, const struct split *from, i64 head_dim, void *to);
    /* Around all tiles of the same number of rows: TILE, or fewer; `few` where that is all. */
    void (*begin)(i64 rows, int few);
    void (*end)(void);
    /* scores[row * SPLIT + key] = query · key */
    void (*scores)(const void *queries, const void *keys, i64 head_dim, i64 rows, float *scores);
    /* sums[row * width + d] += weights[row * SPLIT + key] · values[key][d] */
    void (*add)(const float *weights, const void *values, i64 head_dim, i64 rows, float *sums);
    /* For one tile alone, the same scores from keys as they lie: rearranges its queries instead. */
    int (*reads_keys)(i64 head_dim);
    void (*turn_queries)(void *queries, i64 head_dim, i64 rows);
    void (*scores_of_few)(const void *queries, const struct split *keys, i64 head_dim, i64 rows,
                          float *scores);
};

extern const struct arithmetic dot_arithmetic; /* float32 throughout, any type */
extern const struct arithmetic amx_arithmetic; /* bfloat16; weights are rounded to it too */

/* What is known of some query rows after some splits: the exponents' maximum, the weights' sums
 * lane by lane, the weighted sums of the values. `most` has TILE readable. */
struct sums {
    float *most, *mass, *values; /* [rows], [rows][VW], [rows][width] */
};

/* Some query rows and one split. */
struct tile {
    const void *queries; /* packed */
    i64 rows;
    struct sums sums;
    const i64 *from, *to; /* the keys of the split that each row sees: from < to, or none */
    float *scores;        /* [TILE][SPLIT], for the time of a call */
};

/* Takes in one split of packed keys and values; or of keys as they lie. */
void attend(const struct arithmetic *arithmetic, const struct tile *tile, const void *keys,
            const void *values, i64 head_dim);
void attend_few(const struct arithmetic *arithmetic, const struct tile *tile,
                const struct split *keys, const void *values, i64 head_dim);

/* Takes in what is known of one row from other splits, of which it saw at least one. */
void merge_row(struct sums *all, const struct sums *more, i64 row, i64 width);

/* What the masses of a row's lanes add up to. */
float total_mass(const float *mass);

#endif
