/* Memory that a thread keeps from call to call: fresh pages would cost more than what is computed
 * in them. */
#ifndef CONCLAVE_SCRATCH_H
#define CONCLAVE_SCRATCH_H

#include <stdlib.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)1 << 21)

struct scratch {
    char *memory;
    size_t size;
};

/* At least so many bytes, with whatever in them; NULL where there is no memory. */
static inline char *reserve(struct scratch *s, size_t bytes)
{
    if (bytes <= s->size && s->memory)
        return s->memory;
    free(s->memory);
    size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
    s->size = (bytes / page + 1) * page;
    s->memory = aligned_alloc(page, s->size);
    if (!s->memory)
        s->size = 0;
    else if (page == HUGE_PAGE)
        madvise(s->memory, s->size, MADV_HUGEPAGE);
    return s->memory;
}

#endif
