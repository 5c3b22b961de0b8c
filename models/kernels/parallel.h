/* Work shared by the threads that PyTorch's own OpenMP runtime keeps. */
#ifndef CONCLAVE_PARALLEL_H
#define CONCLAVE_PARALLEL_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default"))) /* what Python finds */

#define SERIAL_ELEMENTS (1 << 15) /* below, waking other threads costs more than it brings */

/* Does part `index` of `count`; the parts together are the whole, whatever `count` is. */
typedef void task(void *context, int index, int count);

/* Calls `run` once in each of at most `threads` threads and returns when all have. */
void in_parallel(task *run, void *context, int threads);

/* Half-open share of `items` of part `index` of `count`. */
static inline void share(int64_t items, int index, int count, int64_t *begin, int64_t *end)
{
    *begin = items * index / count;
    *end = items * (index + 1) / count;
}

#endif
