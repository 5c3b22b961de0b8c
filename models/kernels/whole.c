/* A whole attention or Mamba mixer, or a whole mixture of experts, in one call: the same functions
 * one after the other that the layers otherwise call one by one, so the bits are the same. Between
 * two calls from Python the weights stream through the caches and its own code and data are cold:
 * few calls count, not short ones. */
#include "attention_head.h"
#include "linear.h"
#include "parallel.h"
#include "routed.h"
#include "rowops.h"
#include "scan.h"
#include "scratch.h"

/* The layout of all structures is that of whole.py. */
struct norm {
    const char *weight, *bias; /* bias NULL: none */
    i64 is_rms;
    double eps;
};

/* Of every mixer: norm, what it mixes with, residual, norm. */
struct frame {
    struct norm before, after;
    i64 type, threads;
    const char *x;       /* [rows, width] */
    char *residual, *out; /* [rows, width] twice: x + mixed, and its norm */
};

struct attention_mixer {
    struct frame frame;
    struct weight qkv, projection;
    i64 heads, kv_heads, head_dim, window;
    double limit;
    const struct attention *batch; /* what a batch decides of it */
    const char *cos, *sin;         /* [rows, h / 2] twice; NULL: nothing is rotated or clamped */
    char *keys, *values;
};

struct mamba_mixer {
    struct frame frame;
    struct weight in, select, step, projection;
    const char *part_norms; /* [rank + 2 N] weights of the norms of Δ, B and C */
    const float *taps, *a;
    const char *tap_bias, *step_bias, *d;
    i64 channels, num_taps, rank, num_states;
    const struct batch *batch;
    char *history;
    float *states;
};

struct moe {
    struct weight scores;
    struct gate gate;
    struct routed routed;
    i64 is_softmax;
    const char *residual;
    char *out; /* [tokens, width] residual + experts */
};

struct dense {
    struct expert ffn; /* and its rows */
    i64 width, hidden, type, w_type, threads;
    const char *x, *residual;
    char *out; /* all [rows, width] */
};

/* Memory until the next call, for so many rows of `count` widths in elements, one array behind the other. */
static char *allocate(i64 rows, i64 type, const i64 *widths, int count, char **arrays)
{
    i64 bytes = 64;
    for (int i = 0; i < count; i++)
        bytes += ROUND_UP(rows * widths[i] * type_size((enum type)type), 64);
    static __thread struct scratch kept;
    char *memory = reserve(&kept, (size_t)bytes), *at = memory;
    for (int i = 0; memory && i < count; i++) {
        arrays[i] = at;
        at += ROUND_UP(rows * widths[i] * type_size((enum type)type), 64);
    }
    return memory;
}

/* out = norm(x); where something is added, sum = x + added first. */
static void norm_rows(const struct frame *f, const struct norm *n, const char *x, const char *added,
                      i64 rows, i64 width)
{
    if (n->is_rms) {
        struct rms_norm norm = {x, added, n->weight, f->residual, f->out, &width, 1, rows, width,
                                width, f->type, f->threads, n->eps};
        conclave_rms_norm(&norm);
        return;
    }
    if (added) {
        struct sum sum = {x, added, f->residual, rows, width, f->type, f->threads};
        add_rows(&sum);
        x = f->residual;
    }
    struct layer_norm norm = {x, n->weight, n->bias, f->out, rows, width, width,
                              f->type, f->threads, n->eps};
    conclave_layer_norm(&norm);
}

static void rotate_heads(const struct attention_mixer *m, char *heads, i64 rows)
{
    i64 all = m->heads + 2 * m->kv_heads;
    struct rotation r = {heads, m->cos, m->sin, heads, rows, all, m->heads + m->kv_heads,
                         m->head_dim, all * m->head_dim, m->frame.type, m->frame.threads, m->limit};
    conclave_rotate(&r);
}

static int attend_heads(const struct attention_mixer *m, const char *heads, char *out)
{
    struct attention a = *m->batch;
    i64 head = m->head_dim * type_size((enum type)m->frame.type);
    a.q = heads;
    a.k = heads + m->heads * head;
    a.v = a.k + m->kv_heads * head;
    a.q_stride = a.k_stride = a.v_stride = m->qkv.outputs;
    a.keys = m->keys;
    a.values = m->values;
    a.out = out;
    a.heads = m->heads;
    a.kv_heads = m->kv_heads;
    a.head_dim = m->head_dim;
    a.window = m->window;
    a.type = m->frame.type;
    a.threads = m->frame.threads;
    return conclave_attention(&a);
}

/* What is normed, and the projected heads, lie in `out` until the last norm replaces them. */
EXPORT int conclave_attention_mixer(const struct attention_mixer *m)
{
    const struct frame *f = &m->frame;
    i64 rows = m->batch->num_rows, width = m->projection.outputs;
    char *arrays[2];
    i64 widths[] = {m->qkv.outputs, m->projection.width};
    char *memory = allocate(rows, f->type, widths, 2, arrays);
    if (!memory)
        return OUT_OF_MEMORY;
    norm_rows(f, &f->before, f->x, NULL, rows, width);
    int failed = multiply(&m->qkv, f->out, rows, f->type, arrays[0], f->threads);
    if (m->cos)
        rotate_heads(m, arrays[0], rows);
    failed = failed || attend_heads(m, arrays[0], arrays[1]) ||
             multiply(&m->projection, arrays[1], rows, f->type, f->out, f->threads);
    norm_rows(f, &f->after, f->x, f->out, rows, width);
    return failed;
}

/* Δ (before bias and softplus), B and C: → parts [rows, rank + 2 N], step [rows, channels]. */
static int select_by(const struct mamba_mixer *m, const char *signal, char *parts, char *narrow,
                     char *step)
{
    const struct frame *f = &m->frame;
    i64 rows = m->batch->num_rows, size = type_size((enum type)f->type);
    i64 widths[] = {m->rank, m->num_states, m->num_states}, width = m->select.outputs;
    int failed = multiply(&m->select, signal, rows, f->type, parts, f->threads);
    struct rms_norm norm = {parts, NULL, m->part_norms, NULL, parts, widths, 3, rows, width, width,
                            f->type, f->threads, f->before.eps};
    conclave_rms_norm(&norm);
    for (i64 row = 0; row < rows; row++)
        memcpy(narrow + row * m->rank * size, parts + row * width * size,
               (size_t)(m->rank * size));
    return failed || multiply(&m->step, narrow, rows, f->type, step, f->threads);
}

static void scan_rows(const struct mamba_mixer *m, const struct batch *batch, const char *mixed,
                      const char *signal, const char *step, const char *parts, char *out)
{
    i64 size = type_size((enum type)m->frame.type), wide = m->channels, narrow = m->select.outputs;
    const char *b = parts + m->rank * size;
    struct scan scan = {*batch, signal, step, mixed + wide * size, b, b + m->num_states * size,
                        m->step_bias, m->d, m->a, m->states, out,
                        wide, wide, 2 * wide, narrow, narrow, m->num_states};
    conclave_scan(&scan);
}

EXPORT int conclave_mamba_mixer(const struct mamba_mixer *m)
{
    const struct frame *f = &m->frame;
    i64 rows = m->batch->num_rows, width = m->projection.outputs;
    enum { MIXED, SIGNAL, SELECTED, NARROW, STEP, GATED, COUNT };
    i64 widths[COUNT] = {2 * m->channels, m->channels, m->select.outputs,
                         m->rank, m->channels, m->channels};
    char *arrays[COUNT], *memory = allocate(rows, f->type, widths, COUNT, arrays);
    if (!memory)
        return OUT_OF_MEMORY;
    struct batch batch = *m->batch;
    batch.channels = m->channels;
    batch.type = f->type;
    batch.threads = f->threads;
    norm_rows(f, &f->before, f->x, NULL, rows, width);
    int failed = multiply(&m->in, f->out, rows, f->type, arrays[MIXED], f->threads);
    struct convolution convolution = {batch, arrays[MIXED], m->taps, m->tap_bias, m->history,
                                      arrays[SIGNAL], 2 * m->channels, m->num_taps};
    conclave_convolve(&convolution);
    failed = failed || select_by(m, arrays[SIGNAL], arrays[SELECTED], arrays[NARROW], arrays[STEP]);
    scan_rows(m, &batch, arrays[MIXED], arrays[SIGNAL], arrays[STEP], arrays[SELECTED],
              arrays[GATED]);
    failed = failed || multiply(&m->projection, arrays[GATED], rows, f->type, f->out, f->threads);
    norm_rows(f, &f->after, f->x, f->out, rows, width);
    return failed;
}

/* residual + Σ weight · expert(x) over the experts that the gate chooses. */
EXPORT int conclave_moe(const struct moe *m)
{
    struct routed routed = m->routed;
    struct gate gate = m->gate;
    i64 tokens = routed.tokens, slots = gate.top_k;
    i64 size = type_size((enum type)routed.type), id_size = (i64)sizeof(i64) / size;
    char *arrays[4];
    i64 widths[] = {gate.experts, slots * id_size, slots, routed.width};
    char *memory = allocate(tokens, routed.type, widths, 4, arrays);
    if (!memory)
        return OUT_OF_MEMORY;
    int failed =
        multiply(&m->scores, routed.x, tokens, routed.type, arrays[0], routed.threads);
    gate.logits = arrays[0];
    routed.ids = gate.ids = (i64 *)(void *)arrays[1];
    routed.weights = gate.weights = arrays[2];
    routed.out = arrays[3];
    gate.tokens = tokens;
    gate.type = routed.type;
    gate.threads = routed.threads;
    if (!failed && m->is_softmax)
        conclave_softmax_gate(&gate);
    else if (!failed)
        conclave_mixer_gate(&gate);
    failed = failed || conclave_routed(&routed);
    struct sum sum = {m->residual, routed.out, m->out, tokens, routed.width, routed.type,
                      routed.threads};
    add_rows(&sum);
    return failed;
}

/* One function after the other, each with its structure; the layout is that of program.py. */
struct program {
    i64 count;
    struct {
        int (*run)(const void *);
        const void *structure;
    } calls[];
};

EXPORT int conclave_run(const struct program *p)
{
    int failed = 0;
    for (i64 i = 0; i < p->count && !failed; i++)
        failed = p->calls[i].run(p->calls[i].structure);
    return failed;
}

/* residual + FFN; without memory for it, no result. */
EXPORT int conclave_dense(const struct dense *d)
{
    int failed = conclave_experts(d->x, d->width, d->hidden, (int)d->type, (int)d->w_type, &d->ffn,
                                  1, d->out, (int)d->threads);
    struct sum sum = {d->residual, d->out, d->out, d->ffn.rows, d->width, d->type, d->threads};
    if (!failed)
        add_rows(&sum);
    return failed;
}
