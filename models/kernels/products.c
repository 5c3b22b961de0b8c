/* Every output of every row is computed whole, by one thread, in the one order of its way (see
 * dense.h): neither the number of rows nor that of threads, nor who shares a block, changes a bit.
 */
#include "products.h"

#include "parallel.h"

static i64 row_groups(const struct block *x)
{
    return x->layout ? amx_row_tiles(x->rows) : (x->rows + GROUP_ROWS - 1) / GROUP_ROWS;
}

static void pack(struct product *p, int index, int count)
{
    i64 group, end;
    share(row_groups(&p->x), index, count, &group, &end);
    for (; group < end; group++)
        if (p->x.layout)
            amx_pack(&p->x, p->values, group);
        else
            dot_pack(&p->x, p->type, p->values, group);
}

static void pack_share(void *context, int index, int count)
{
    const struct products *p = context;
    for (int i = 0; i < p->count; i++)
        pack(p->all + i, index, count);
}

static void read_floats(float *to, enum type type, const void *from, i64 first, i64 count)
{
    for (i64 j = 0; j < count; j++) {
        vec one = v_read_part(type, (const char *)from + (first + j) * type_size(type), 1);
        to[j] = one[0];
    }
}

void read_terms(const struct product *p, const struct matrix *w, i64 first, struct terms *terms)
{
    i64 outputs = w->outputs - first < PANEL ? w->outputs - first : PANEL;
    for (int j = 0; j < PANEL; j++) {
        terms->scale[j] = 1.0f;
        terms->bias[j] = -0.0f; /* adding it changes nothing */
    }
    if (w->scale)
        read_floats(terms->scale, F32, w->scale, first, outputs);
    if (p->x.layout == INT8_TILES)
        for (int j = 0; j < PANEL; j++)
            terms->scale[j] *= AMX_INT8_SCALE;
    if (w->bias)
        read_floats(terms->bias, p->type, w->bias, first, outputs);
}

/* Scales, biases, gates and rounds the sums of one panel. */
static void finish(const struct product *p, i64 first, i64 outputs, const float *sums,
                   const float *gate_sums)
{
    struct terms terms, gate;
    i64 size = type_size(p->type);
    read_terms(p, p->weight, first, &terms);
    if (p->gate)
        read_terms(p, p->gate, first, &gate);
    for (i64 row = 0; row < p->x.rows; row++) {
        char *out = p->out + (row * p->weight->outputs + first) * size;
        for (i64 j = 0; j < outputs; j += VW, out += VW * size) {
            vec v = v_load(sums + row * PANEL + j) * v_load(terms.scale + j) +
                    v_load(terms.bias + j);
            if (p->gate)
                v *= v_silu(v_load(gate_sums + row * PANEL + j) * v_load(gate.scale + j));
            if (outputs - j >= VW)
                v_write(p->type, out, v);
            else
                v_write_part(p->type, out, v, outputs - j);
        }
    }
}

static void multiply_panels(const struct product *p, i64 first, i64 end)
{
    _Alignas(64) float sums[BLOCK_ROWS * PANEL], gate_sums[BLOCK_ROWS * PANEL];
    const struct block *x = &p->x;
    i64 outputs = p->weight->outputs;
    panel_sums *panel = x->layout == INT8_TILES   ? int8_panel
                        : x->layout == BF16_TILES ? amx_panel
                                                  : dot_panel;
    for (first *= PANEL; first < end * PANEL; first += PANEL) {
        i64 here = outputs - first < PANEL ? outputs - first : PANEL;
        if (p->gate)
            panel(x, p->gate, first, here, gate_sums);
        panel(x, p->weight, first, here, sums);
        finish(p, first, here, sums, gate_sums);
    }
}

static void multiply(const struct product *p, int index, int count)
{
    const struct block *x = &p->x;
    i64 first, end;
    share((p->weight->outputs + PANEL - 1) / PANEL, index, count, &first, &end);
    if (x->layout)
        amx_begin(x->rows);
    if (x->layout && x->rows > amx_few_rows(x->layout))
        amx_many(p, first, end);
    else
        multiply_panels(p, first, end);
    if (x->layout)
        amx_end();
}

static void multiply_share(void *context, int index, int count)
{
    const struct products *p = context;
    for (int i = 0; i < p->count; i++)
        multiply(p->all + i, index, count);
}

void run_products(struct products p, int threads)
{
    i64 values = 0, weights = 0;
    for (int i = 0; i < p.count; i++) {
        values += p.all[i].x.rows * p.all[i].x.width;
        weights += p.all[i].weight->outputs * p.all[i].weight->width;
    }
    in_parallel(pack_share, &p, values < SERIAL_ELEMENTS ? 1 : threads);
    in_parallel(multiply_share, &p, weights < SERIAL_ELEMENTS ? 1 : threads);
}

struct product rows_of(const struct product *all, i64 first, i64 rows)
{
    struct product p = *all;
    i64 size = type_size(p.type);
    p.x.rows = all->x.rows - first < rows ? all->x.rows - first : rows;
    p.values += first * p.x.width * size;
    p.out += first * p.weight->outputs * size;
    return p;
}

struct apart {
    const struct product *all;
    i64 rows;
    size_t slot;
};

static void apart_share(void *context, int index, int count)
{
    const struct apart *a = context;
    for (i64 first = index * a->rows; first < a->all->x.rows; first += count * a->rows) {
        struct product p = rows_of(a->all, first, a->rows);
        p.x.packed = (char *)p.x.packed + (size_t)index * a->slot;
        pack(&p, 0, 1);
        multiply(&p, 0, 1);
    }
}

void run_apart(const struct product *all, i64 rows, size_t slot, int threads)
{
    struct apart apart = {all, rows, slot};
    in_parallel(apart_share, &apart, threads);
}
