/* Sums of products of some rows with some outputs of a matrix: two ways, each with one order.
 *
 * Legend: R rows of activations, K their width, N outputs (rows of a weight [N, K]).
 */
#ifndef CONCLAVE_DENSE_H
#define CONCLAVE_DENSE_H

#include "vector.h"

#define PANEL 32      /* outputs computed together */
#define BLOCK_ROWS 256 /* most rows packed together as floats */
#define MANY_ROWS 512  /* the same as tiles */

/* A weight [N, K], row after row; scale [N] and bias [N] may be missing. */
struct matrix {
    const void *values;
    const float *scale;
    const void *bias;
    enum type type;
    i64 outputs, width;
};

/* Floats row after row; or AMX tiles, for weights of either type. */
enum layout { FLOATS, BF16_TILES, INT8_TILES };

/* Rows, rearranged once for every panel of every matrix of one type. */
struct block {
    void *packed;
    i64 rows, width;
    enum layout layout;
};

/* sums[r * PANEL + j] is row r times output first + j, of `outputs` <= PANEL ones. */
typedef void panel_sums(const struct block *x, const struct matrix *w, i64 first, i64 outputs,
                        float *sums);

/* The plain way: float32 fused multiply-adds, VW partial sums along K, then a fixed tree. */
size_t dot_packed_bytes(i64 rows, i64 width);
void dot_pack(struct block *x, enum type type, const void *values, i64 group);
panel_sums dot_panel;

#define GROUP_ROWS 16 /* rows that one call of `pack` rearranges */

/* AMX: bfloat16 activations with bfloat16 or int8 weights. Each thread begins and ends.
 * Sums with int8 weights are too small by AMX_INT8_SCALE. */
#define AMX_INT8_SCALE 256.0f

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#define CONCLAVE_TILES
int amx_available(void);
/* One narrow tile of rows, or an even number of tiles. */
i64 amx_row_tiles(i64 rows);
size_t amx_packed_bytes(i64 rows, i64 width);
void amx_pack(struct block *x, const void *values, i64 group);
void amx_begin(i64 rows);
void amx_end(void);
/* For bfloat16 and int8 weights, at most amx_few_rows rows. */
panel_sums amx_panel, int8_panel;

/* More go another way, which copies weights and so needs rows to make up for it (measured). */
static inline i64 amx_few_rows(enum layout layout) { return layout == INT8_TILES ? 64 : 96; }

#else /* never called */

#define amx_available() 0
#define amx_row_tiles(rows) (rows)
#define amx_packed_bytes dot_packed_bytes
#define amx_pack(x, values, group) ((void)0)
#define amx_begin(rows) ((void)0)
#define amx_end() ((void)0)
#define amx_few_rows(layout) 0
#define amx_panel dot_panel
#define int8_panel dot_panel

#endif

#endif
