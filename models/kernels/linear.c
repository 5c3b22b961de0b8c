/* Matrix products and expert FFNs: blocks of rows are packed, panels of outputs shared by threads.
 *
 * Every output of every row is computed whole, by one thread, in the one order of its way (see
 * dense.h): neither the number of rows nor that of threads, nor who shares a block, changes a bit.
 */
#include <stdlib.h>

#include "dense.h"
#include "experts.h"
#include "parallel.h"

#define EXPORT __attribute__((visibility("default")))

#define MOST_PRODUCTS 64
#define BATCH_ROWS 1024
#define PACKED_BYTES (3 << 19)    /* of one block: most of a second-level cache */
#define SERIAL_ELEMENTS (1 << 15) /* below, waking other threads costs more than it brings */

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

/* Memory of the calling thread that is kept from call to call. */
static void *reserve(size_t bytes)
{
    static __thread char *memory;
    static __thread size_t size;
    if (bytes > size) {
        free(memory);
        size = (bytes + 4095) / 4096 * 4096;
        memory = aligned_alloc(4096, size);
        if (!memory)
            size = 0;
    }
    return memory;
}

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
    i64 rows = PACKED_BYTES / (width * (layout ? 2 : 4) + 1) / 32 * 32;
    return rows < 32 ? 32 : rows > BLOCK_ROWS ? BLOCK_ROWS : rows;
}

static i64 row_groups(const struct block *x)
{
    return x->layout ? amx_row_tiles(x->rows) : (x->rows + GROUP_ROWS - 1) / GROUP_ROWS;
}

static void pack_share(void *context, int index, int count)
{
    const struct products *p = context;
    for (int i = 0; i < p->count; i++) {
        struct product *product = p->all + i;
        i64 group, end;
        share(row_groups(&product->x), index, count, &group, &end);
        for (; group < end; group++)
            if (product->x.layout)
                amx_pack(&product->x, product->values, group);
            else
                dot_pack(&product->x, product->type, product->values, group);
    }
}

static void read_floats(float *to, enum type type, const void *from, i64 first, i64 count)
{
    for (i64 j = 0; j < count; j++) {
        vec one = v_read_part(type, (const char *)from + (first + j) * type_size(type), 1);
        to[j] = one[0];
    }
}

static void read_scale_and_bias(const struct product *p, const struct matrix *w, i64 first,
                                i64 outputs, float *scale, float *bias)
{
    for (int j = 0; j < PANEL; j++) {
        scale[j] = 1.0f;
        bias[j] = -0.0f; /* adding it changes nothing */
    }
    if (w->scale)
        read_floats(scale, F32, w->scale, first, outputs);
    if (p->x.layout == INT8_TILES)
        for (int j = 0; j < PANEL; j++)
            scale[j] *= AMX_INT8_SCALE;
    if (w->bias)
        read_floats(bias, p->type, w->bias, first, outputs);
}

/* Scales, biases, gates and rounds the sums of one panel. */
static void finish(const struct product *p, i64 first, i64 outputs, const float *sums,
                   const float *gate_sums)
{
    float scale[PANEL], bias[PANEL], gate_scale[PANEL], unused[PANEL];
    i64 size = type_size(p->type);
    read_scale_and_bias(p, p->weight, first, outputs, scale, bias);
    if (p->gate)
        read_scale_and_bias(p, p->gate, first, outputs, gate_scale, unused);
    for (i64 row = 0; row < p->x.rows; row++) {
        char *out = p->out + (row * p->weight->outputs + first) * size;
        for (i64 j = 0; j < outputs; j += VW, out += VW * size) {
            vec v = v_load(sums + row * PANEL + j) * v_load(scale + j) + v_load(bias + j);
            if (p->gate)
                v *= v_silu(v_load(gate_sums + row * PANEL + j) * v_load(gate_scale + j));
            if (outputs - j >= VW)
                v_write(p->type, out, v);
            else
                v_write_part(p->type, out, v, outputs - j);
        }
    }
}

static void multiply_share(void *context, int index, int count)
{
    _Alignas(64) float sums[BLOCK_ROWS * PANEL], gate_sums[BLOCK_ROWS * PANEL];
    const struct products *p = context;
    for (int i = 0; i < p->count; i++) {
        const struct product *product = p->all + i;
        const struct block *x = &product->x;
        panel_sums *panel = x->layout == INT8_TILES   ? int8_panel
                            : x->layout == BF16_TILES ? amx_panel
                                                      : dot_panel;
        i64 outputs = product->weight->outputs, first, end;
        share((outputs + PANEL - 1) / PANEL, index, count, &first, &end);
        if (x->layout)
            amx_begin(x->rows);
        for (first *= PANEL; first < end * PANEL; first += PANEL) {
            i64 here = outputs - first < PANEL ? outputs - first : PANEL;
            if (product->gate)
                panel(x, product->gate, first, here, gate_sums);
            panel(x, product->weight, first, here, sums);
            finish(product, first, here, sums, gate_sums);
        }
        if (x->layout)
            amx_end();
    }
}

static void run(struct products p, int threads)
{
    i64 values = 0, weights = 0;
    for (int i = 0; i < p.count; i++) {
        values += p.all[i].x.rows * p.all[i].x.width;
        weights += p.all[i].weight->outputs * p.all[i].weight->width;
    }
    in_parallel(pack_share, &p, values < SERIAL_ELEMENTS ? 1 : threads);
    in_parallel(multiply_share, &p, weights < SERIAL_ELEMENTS ? 1 : threads);
}

/* out [rows, outputs] = x [rows, width] · valuesᵀ · scale + bias; scale and bias may be NULL. */
EXPORT int conclave_linear(const void *x, i64 rows, i64 width, int x_type, const void *values,
                           const float *scale, const void *bias, int w_type, i64 outputs, void *out,
                           int threads)
{
    struct matrix w = {values, scale, bias, (enum type)w_type, outputs, width};
    enum layout layout = layout_of((enum type)x_type, w.type);
    i64 size = type_size((enum type)x_type);
    i64 most = block_rows(layout, width);
    void *packed = reserve(packed_bytes(layout, rows < most ? rows : most, width));
    if (!packed && rows)
        return OUT_OF_MEMORY;
    for (i64 row = 0; row < rows; row += most) {
        i64 count = rows - row < most ? rows - row : most;
        struct product product = {{packed, count, width, layout},
                                  (const char *)x + row * width * size,
                                  &w,
                                  NULL,
                                  (char *)out + row * outputs * size,
                                  (enum type)x_type};
        run((struct products){&product, 1}, threads);
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
    char *memory = reserve(bytes);
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
    run((struct products){into, count}, f->threads);
    run((struct products){back, count}, f->threads);
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
            i64 here = e->rows - done < most ? e->rows - done : most;
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
