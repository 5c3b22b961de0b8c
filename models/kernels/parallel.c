/* libgomp's entry points are looked up, not linked: a second OpenMP runtime beside PyTorch's would
 * keep a second pool of spinning threads. Without one, everything runs in the caller's thread. */
#define _GNU_SOURCE
#include "parallel.h"

#include <dlfcn.h>

typedef void gomp_parallel(void (*)(void *), void *, unsigned, unsigned);
typedef int omp_number(void);

struct job {
    task *run;
    void *context;
    omp_number *index, *count;
};

static void one_thread(void *argument)
{
    struct job *job = argument;
    job->run(job->context, job->index(), job->count());
}

void in_parallel(task *run, void *context, int threads)
{
    if (threads > 1) {
        gomp_parallel *parallel = (gomp_parallel *)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        struct job job = {run, context, (omp_number *)dlsym(RTLD_DEFAULT, "omp_get_thread_num"),
                          (omp_number *)dlsym(RTLD_DEFAULT, "omp_get_num_threads")};
        if (parallel && job.index && job.count) {
            parallel(one_thread, &job, (unsigned)threads, 0);
            return;
        }
    }
    run(context, 0, 1);
}
