/* Mamba-1 (Gu and Dao 2023) on packed sequences with state slots: causal convolution and selective
 * scan.
 *
 * A channel is a chain of operations from token to token, in one order and in a lane of its own, so
 * neither the chunk nor the batch nor the threads can change a bit; a decode is a chunk of one.
 *
 * Legend: I channels, N state size, K convolution width.
 */
#include "scan.h"

#include "exponential.h"
#include "parallel.h"

#define STRIP 64 /* channels computed together: their states stay in the first-level cache */
#define MOST_STATES 128
#define MOST_TAPS 16
#define ITEM_COST 4           /* of fetching and storing the state of a strip, in tokens */
#define SERIAL_COST (1 << 13) /* below, waking other threads costs more than it brings */

/* One strip of one sequence. */
struct item {
    i64 first_row, tokens, slot, channel, lanes;
};

typedef void item_task(const void *call, const struct item *item);

struct job {
    const struct batch *batch;
    const void *call;
    item_task *run;
};

static i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static i64 num_strips(const struct batch *b) { return (b->channels + STRIP - 1) / STRIP; }
static i64 total_cost(const struct batch *b)
{
    return num_strips(b) * (b->num_tokens + b->num_seqs * ITEM_COST);
}

/* The items whose cost begins in this thread's share of all. */
static void run_share(void *context, int index, int count)
{
    const struct job *job = context;
    const struct batch *b = job->batch;
    i64 at = 0, begin, end;
    share(total_cost(b), index, count, &begin, &end);
    for (i64 seq = 0; seq < b->num_seqs; seq++) {
        struct item item = {b->query_starts[seq], b->query_starts[seq + 1] - b->query_starts[seq],
                            b->slots[seq], 0, 0};
        for (; item.channel < b->channels; item.channel += STRIP, at += item.tokens + ITEM_COST)
            if (at >= begin && at < end && item.tokens) {
                item.lanes = smaller(b->channels - item.channel, STRIP);
                job->run(job->call, &item);
            }
    }
}

static void run_all(const struct batch *b, const void *call, item_task *run, char *out)
{
    struct job job = {b, call, run};
    i64 row = b->channels * type_size((enum type)b->type);
    i64 cost = total_cost(b);
    in_parallel(run_share, &job, cost * STRIP < SERIAL_COST ? 1 : (int)b->threads);
    memset(out + b->num_tokens * row, 0, (size_t)((b->num_rows - b->num_tokens) * row));
}

/* VW channels from `lane` on, as floats; zeros behind the last one. */
static inline vec read_lanes(enum type type, const char *strip, i64 lane, i64 lanes)
{
    const char *from = strip + lane * type_size(type);
    return lanes - lane >= VW ? v_read(type, from) : v_read_part(type, from, lanes - lane);
}

static inline void write_lanes(enum type type, char *strip, i64 lane, i64 lanes, vec v)
{
    char *to = strip + lane * type_size(type);
    if (lanes - lane >= VW)
        v_write(type, to, v);
    else
        v_write_part(type, to, v, lanes - lane);
}

/* Copies `count` elements that lie `from_step` and `to_step` elements apart. */
static void copy_apart(i64 size, char *to, i64 to_step, const char *from, i64 from_step, i64 count)
{
    if (size == 2)
        for (i64 i = 0; i < count; i++)
            ((uint16_t *)to)[i * to_step] = ((const uint16_t *)from)[i * from_step];
    else
        for (i64 i = 0; i < count; i++)
            ((uint32_t *)to)[i * to_step] = ((const uint32_t *)from)[i * from_step];
}

/* Token t's inputs, where t < 0 is before the chunk. */
static const char *input(const struct convolution *call, const struct item *item, i64 t,
                         char history[MOST_TAPS][4 * STRIP])
{
    if (t < 0)
        return history[t + call->num_taps - 1];
    i64 offset = (item->first_row + t) * call->u_stride + item->channel;
    return call->u + offset * type_size((enum type)call->batch.type);
}

static void convolve_token(const struct convolution *call, const struct item *item,
                           const char *const inputs[MOST_TAPS], char *out)
{
    enum type type = (enum type)call->batch.type;
    const float *taps = call->taps + item->channel;
    const char *bias = call->bias ? call->bias + item->channel * type_size(type) : NULL;
    for (i64 lane = 0; lane < item->lanes; lane += VW) {
        vec sum = v_zero();
        for (i64 k = 0; k < call->num_taps; k++) {
            vec tap = read_lanes(F32, (const char *)(taps + k * call->batch.channels), lane,
                                 item->lanes);
            sum = v_fma(read_lanes(type, inputs[k], lane, item->lanes), tap, sum);
        }
        if (bias)
            sum += read_lanes(type, bias, lane, item->lanes);
        write_lanes(type, out, lane, item->lanes, v_silu(sum));
    }
}

static void convolve_item(const void *context, const struct item *item)
{
    const struct convolution *call = context;
    char history[MOST_TAPS][4 * STRIP];
    const char *inputs[MOST_TAPS];
    i64 size = type_size((enum type)call->batch.type), past = call->num_taps - 1;
    char *kept = call->history + (item->slot * call->batch.channels + item->channel) * past * size;
    for (i64 k = 0; k < past; k++)
        copy_apart(size, history[k], 1, kept + k * size, past, item->lanes);
    for (i64 t = 0; t < item->tokens; t++) {
        for (i64 k = 0; k <= past; k++)
            inputs[k] = input(call, item, t + k - past, history);
        i64 offset = (item->first_row + t) * call->batch.channels + item->channel;
        convolve_token(call, item, inputs, call->out + offset * size);
    }
    for (i64 k = 0; k < past; k++)
        copy_apart(size, kept + k * size, past, input(call, item, item->tokens + k - past, history),
                   1, item->lanes);
}

/* [lanes][N] → [N][STRIP], or back. */
static void turn(float *states, float (*turned)[STRIP], i64 num_states, i64 lanes, int back)
{
    i64 lane = 0;
    for (; num_states % 4 == 0 && lane + 4 <= lanes; lane += 4)
        for (i64 n = 0; n < num_states; n += 4) {
            float *from[4], *to[4];
            for (i64 i = 0; i < 4; i++) {
                from[i] = back ? turned[n + i] + lane : states + (lane + i) * num_states + n;
                to[i] = back ? states + (lane + i) * num_states + n : turned[n + i] + lane;
            }
            __m128 a = _mm_loadu_ps(from[0]), b = _mm_loadu_ps(from[1]);
            __m128 c = _mm_loadu_ps(from[2]), d = _mm_loadu_ps(from[3]);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to[0], a);
            _mm_storeu_ps(to[1], b);
            _mm_storeu_ps(to[2], c);
            _mm_storeu_ps(to[3], d);
        }
    for (; lane < lanes; lane++)
        for (i64 n = 0; n < num_states; n++)
            if (back)
                states[lane * num_states + n] = turned[n][lane];
            else
                turned[n][lane] = states[lane * num_states + n];
}

/* What is the same for all tokens of an item. */
struct strip {
    _Alignas(64) float state[MOST_STATES][STRIP], a[MOST_STATES][STRIP];
    _Alignas(64) float b[MOST_STATES], c[MOST_STATES]; /* of the token */
};

/* h = exp(Δ A) h + Δ x B, VW channels: → Σ h C, four partial sums. */
static inline vec advance(struct strip *s, i64 lane, i64 num_states, vec delta, vec signal)
{
    vec y[4] = {v_zero(), v_zero(), v_zero(), v_zero()}, into = delta * signal;
    for (i64 n = 0; n < num_states; n += 4)
        for (i64 i = 0; i < 4 && n + i < num_states; i++) {
            float *state = s->state[n + i] + lane;
            vec decay = v_exp2(delta * v_load(s->a[n + i] + lane));
            vec h = v_fma(decay, v_load(state), into * v_set(s->b[n + i]));
            v_store(state, h);
            y[i] = v_fma(h, v_set(s->c[n + i]), y[i]);
        }
    return (y[0] + y[1]) + (y[2] + y[3]);
}

static void read_floats(enum type type, const char *from, i64 count, float *to)
{
    for (i64 i = 0; i < count; i += VW)
        v_store(to + i, read_lanes(type, from, i, count));
}

static void scan_token(const struct scan *call, const struct item *item, struct strip *s, i64 row)
{
    enum type type = (enum type)call->batch.type;
    i64 size = type_size(type), at = item->channel * size, lanes = item->lanes;
    read_floats(type, call->b + row * call->b_stride * size, call->num_states, s->b);
    read_floats(type, call->c + row * call->c_stride * size, call->num_states, s->c);
    for (i64 lane = 0; lane < lanes; lane += VW) {
        vec step = read_lanes(type, call->step + row * call->step_stride * size + at, lane, lanes);
        vec delta = v_softplus(step + read_lanes(type, call->step_bias + at, lane, lanes));
        vec x = read_lanes(type, call->signal + row * call->signal_stride * size + at, lane, lanes);
        vec y = advance(s, lane, call->num_states, delta, x);
        y = v_fma(read_lanes(type, call->d + at, lane, lanes), x, y);
        vec z = read_lanes(type, call->z + row * call->z_stride * size + at, lane, lanes);
        write_lanes(type, call->out + row * call->batch.channels * size + at, lane, lanes,
                    y * v_silu(z));
    }
}

static void scan_item(const void *context, const struct item *item)
{
    const struct scan *call = context;
    struct strip s;
    i64 channels = call->batch.channels, num_states = call->num_states;
    float *states = call->states + (item->slot * channels + item->channel) * num_states;
    for (i64 n = 0; n < num_states; n++) {
        const char *from = (const char *)(call->a + n * channels + item->channel);
        for (i64 lane = 0; lane < item->lanes; lane += VW) {
            v_store(s.a[n] + lane, read_lanes(F32, from, lane, item->lanes));
            v_store(s.state[n] + lane, v_zero());
        }
    }
    turn(states, s.state, num_states, item->lanes, 0);
    for (i64 t = 0; t < item->tokens; t++)
        scan_token(call, item, &s, item->first_row + t);
    turn(states, s.state, num_states, item->lanes, 1);
}

/* Rows of `out` behind the tokens are 0 in both. */
EXPORT void conclave_convolve(const struct convolution *call)
{
    run_all(&call->batch, call, convolve_item, call->out);
}

EXPORT void conclave_scan(const struct scan *call)
{
    run_all(&call->batch, call, scan_item, call->out);
}
