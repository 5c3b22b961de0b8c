/* The entry points: products and expert FFNs, divided into blocks of rows. */
#include "linear.h"

#include "experts.h"
#include "parallel.h"
#include "products.h"
#include "scratch.h"

#define MOST_PRODUCTS 64
#define BATCH_ROWS 1024
#define APART_ROWS 192 /* of each thread: from here on rows are divided, not outputs */
#define TILES_BYTES (1 << 20)  /* of one block: a second-level cache has room for more */
#define FLOATS_BYTES (3 << 19) /* the same: most of it */

static __thread struct scratch blocks;

static enum layout layout_of(enum type x, enum type w)
{
    if (!amx_available() || x != BF16 || (w != BF16 && w != I8))
        return FLOATS;
    return w == I8 ? INT8_TILES : BF16_TILES;
}

static size_t packed_bytes(enum layout layout, i64 rows, i64 width)
{
    size_t bytes = layout ? amx_packed_bytes(rows, width) : dot_packed_bytes(rows, width);
    return (bytes + 63) / 64 * 64;
}

/* Rows packed together: they stay in the second-level cache while the weight goes by. */
static i64 block_rows(enum layout layout, i64 width)
{
    i64 most = layout ? MANY_ROWS : BLOCK_ROWS;
    i64 bytes = layout ? TILES_BYTES : FLOATS_BYTES;
    i64 rows = bytes / ((width ? width : 1) * (layout ? 2 : 4)) / 32 * 32;
    return rows < 32 ? 32 : rows > most ? most : rows;
}

/* The same for blocks of one size, as many for each thread. */
static i64 even_rows(i64 rows, i64 most, i64 threads)
{
    i64 blocks = ((rows + most - 1) / most + threads - 1) / threads * threads;
    i64 even = ((rows + blocks - 1) / blocks + 31) / 32 * 32;
    return even < rows ? even : rows;
}

/* out [rows, outputs] = x [rows, width] · valuesᵀ · scale + bias; scale and bias may be NULL. */
EXPORT int conclave_linear(const void *x, i64 rows, i64 width, int x_type, const void *values,
                           const float *scale, const void *bias, int w_type, i64 outputs, void *out,
                           int threads)
{
    struct matrix w = {values, scale, bias, (enum type)w_type, outputs, width};
    enum layout layout = layout_of((enum type)x_type, w.type);
    i64 most = block_rows(layout, width);
    int is_apart = layout && threads > 1 && rows >= APART_ROWS * threads;
    if (is_apart)
        most = even_rows(rows, most, threads);
    size_t slot = packed_bytes(layout, rows < most ? rows : most, width);
    void *packed = reserve(&blocks, is_apart ? slot * (size_t)threads : slot);
    if (!packed && rows)
        return OUT_OF_MEMORY;
    struct product all = {{packed, rows, width, layout}, x, &w, NULL, out, (enum type)x_type};
    if (is_apart)
        run_apart(&all, most, slot, threads);
    else
        for (i64 row = 0; row < rows; row += most) {
            struct product product = rows_of(&all, row, most);
            run_products((struct products){&product, 1}, threads);
        }
    return 0;
}

/* What is the same for all experts of a call. */
struct ffn {
    enum type x_type, w_type;
    i64 width, hidden;
    enum layout layout;
    int threads;
};

/* Rows of one expert that go together. */
struct slice {
    struct matrix gate, up, down;
    i64 first, rows;
};

static int run_slices(const struct ffn *f, const struct slice *slices, int count, const char *x,
                      char *out)
{
    struct product into[MOST_PRODUCTS], back[MOST_PRODUCTS];
    i64 size = type_size(f->x_type);
    size_t bytes = 0, at = 0;
    for (int i = 0; i < count; i++)
        bytes += packed_bytes(f->layout, slices[i].rows, f->width) +
                 packed_bytes(f->layout, slices[i].rows, f->hidden) +
                 (size_t)((slices[i].rows * f->hidden * size + 63) / 64 * 64);
    char *memory = reserve(&blocks, bytes);
    if (!memory && bytes)
        return OUT_OF_MEMORY;
    for (int i = 0; i < count; i++) {
        const struct slice *s = slices + i;
        char *packed = memory + at;
        at += packed_bytes(f->layout, s->rows, f->width);
        char *packed_hidden = memory + at;
        at += packed_bytes(f->layout, s->rows, f->hidden);
        char *hidden = memory + at;
        at += (size_t)((s->rows * f->hidden * size + 63) / 64 * 64);
        i64 offset = s->first * f->width * size;
        into[i] = (struct product){{packed, s->rows, f->width, f->layout},
                                   x + offset, &s->up, &s->gate, hidden, f->x_type};
        back[i] = (struct product){{packed_hidden, s->rows, f->hidden, f->layout},
                                   hidden, &s->down, NULL, out + offset, f->x_type};
    }
    run_products((struct products){into, count}, f->threads);
    run_products((struct products){back, count}, f->threads);
    return 0;
}

EXPORT int conclave_experts(const void *x, i64 width, i64 hidden, int x_type, int w_type,
                            const struct expert *experts, i64 num_experts, void *out, int threads)
{
    enum layout layout = layout_of((enum type)x_type, (enum type)w_type);
    int count = 0;
    struct ffn f = {(enum type)x_type, (enum type)w_type, width, hidden, layout, threads};
    i64 most = block_rows(layout, width > hidden ? width : hidden), rows = 0, first = 0;
    struct slice slices[MOST_PRODUCTS];
    for (const struct expert *e = experts; e < experts + num_experts; e++)
        for (i64 done = 0; done < e->rows;) {
            i64 here = even_rows(e->rows - done, most, 1);
            if (count == MOST_PRODUCTS || (count && rows + here > BATCH_ROWS)) {
                if (run_slices(&f, slices, count, x, out))
                    return OUT_OF_MEMORY;
                count = 0;
                rows = 0;
            }
            slices[count++] =
                (struct slice){{e->gate, e->gate_scale, NULL, f.w_type, hidden, width},
                               {e->up, e->up_scale, NULL, f.w_type, hidden, width},
                               {e->down, e->down_scale, NULL, f.w_type, width, hidden},
                               first, here};
            rows += here;
            first += here;
            done += here;
        }
    return count ? run_slices(&f, slices, count, x, out) : 0;
}

/* Whether the processor lets this process use what the library was compiled for. */
EXPORT int conclave_ready(int wants_tiles) { return !wants_tiles || amx_available(); }
