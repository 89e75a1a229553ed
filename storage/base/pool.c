/* The threads live as long as the pool and sleep between loops. A loop is announced under the
 * mutex with a new generation number; every worker then takes range numbers from one atomic
 * counter until they run out, and the last to leave wakes the caller. The mutex orders the loop's
 * description before the work and the work's results before pool_for() returns. */
#include "storage/base/pool.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

struct worker {
    struct pool *pool;
    pthread_t thread;
    uint32_t number; /* from 1; the caller is 0 */
};

struct pool {
    uint32_t worker_count;
    uint32_t started; /* threads to join */
    struct worker *workers;
    pthread_mutex_t mutex;
    pthread_cond_t start;
    pthread_cond_t done;
    /* Under the mutex; constant while a loop runs: */
    uint64_t generation;
    uint32_t running; /* threads still in the loop */
    bool busy;
    bool stop;
    uint64_t count;
    uint64_t grain;
    pool_range_fn fn;
    void *context;
    /* Range to take next. */
    _Atomic uint64_t next;
};

static uint64_t range_count(uint64_t count, uint64_t grain)
{
    return count / grain + (count % grain != 0);
}

static void run_range(uint64_t range, uint64_t count, uint64_t grain, pool_range_fn fn,
                      void *context, uint32_t worker)
{
    uint64_t begin = range * grain;
    uint64_t end = count - begin < grain ? count : begin + grain;

    fn(context, begin, end, worker);
}

static void run_ranges(struct pool *pool, uint32_t worker)
{
    uint64_t ranges = range_count(pool->count, pool->grain);

    for (;;) {
        uint64_t range = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);

        if (range >= ranges)
            return;
        run_range(range, pool->count, pool->grain, pool->fn, pool->context, worker);
    }
}

static void *worker_main(void *argument)
{
    struct worker *worker = argument;
    struct pool *pool = worker->pool;
    uint64_t seen = 0;

    pthread_setname_np(pthread_self(), "annd-pool");
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->stop && pool->generation == seen)
            pthread_cond_wait(&pool->start, &pool->mutex);
        if (pool->stop)
            break;
        seen = pool->generation;
        pthread_mutex_unlock(&pool->mutex);
        run_ranges(pool, worker->number);
        pthread_mutex_lock(&pool->mutex);
        if (--pool->running == 0)
            pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

/* Signals are for the program's own threads: the workers are born with all of them blocked. */
static int start_threads(struct pool *pool, struct error *err)
{
    sigset_t all, old;
    int failed = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (uint32_t i = 0; i + 1 < pool->worker_count; i++) {
        struct worker *worker = &pool->workers[i];

        worker->pool = pool;
        worker->number = i + 1;
        failed = pthread_create(&worker->thread, NULL, worker_main, worker);
        if (failed)
            break;
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!failed)
        return 0;
    /* EAGAIN means a limit on threads here, not "busy": error_set_errno would say the wrong code.
     */
    return error_set(err, ERR_IO, "cannot start worker thread %u of %u: error %d",
                     pool->started + 1, pool->worker_count - 1, failed);
}

int pool_new(uint32_t worker_count, struct pool **out, struct error *err)
{
    struct pool *pool;

    if (worker_count == 0)
        worker_count = cpu_count();
    pool = calloc(1, sizeof *pool);
    if (!pool)
        return error_set(err, ERR_NOMEM, "no memory for a pool of %u workers", worker_count);
    pool->worker_count = worker_count;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->start, NULL);
    pthread_cond_init(&pool->done, NULL);
    atomic_init(&pool->next, 0);
    if (worker_count > 1) {
        pool->workers = calloc(worker_count - 1, sizeof *pool->workers);
        if (!pool->workers) {
            error_set(err, ERR_NOMEM, "no memory for a pool of %u workers", worker_count);
            goto fail;
        }
        if (start_threads(pool, err) < 0)
            goto fail;
    }
    *out = pool;
    return 0;
fail:
    pool_free(pool);
    return -1;
}

void pool_free(struct pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->mutex);
    assert(!pool->busy);
    pool->stop = true;
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->mutex);
    for (uint32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->start);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

uint32_t pool_workers(const struct pool *pool)
{
    return pool ? pool->worker_count : 1;
}

void pool_for(struct pool *pool, uint64_t count, uint64_t grain, pool_range_fn fn, void *context)
{
    uint64_t ranges;

    assert(grain >= 1);
    ranges = range_count(count, grain);
    if (!pool || pool->worker_count == 1 || ranges <= 1) {
        for (uint64_t range = 0; range < ranges; range++)
            run_range(range, count, grain, fn, context, 0);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    assert(!pool->busy); /* two callers, or a loop inside a loop */
    pool->busy = true;
    pool->count = count;
    pool->grain = grain;
    pool->fn = fn;
    pool->context = context;
    pool->running = pool->worker_count - 1;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->generation++;
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->mutex);

    run_ranges(pool, 0);

    pthread_mutex_lock(&pool->mutex);
    while (pool->running > 0)
        pthread_cond_wait(&pool->done, &pool->mutex);
    pool->busy = false;
    pthread_mutex_unlock(&pool->mutex);
}

uint32_t cpu_count(void)
{
    long online;

    /* The kernel refuses a set smaller than its own, so the size is found by doubling. */
    for (size_t cpus = 1024; cpus <= 1024 * 64; cpus *= 2) {
        cpu_set_t *set = CPU_ALLOC(cpus);
        size_t bytes = CPU_ALLOC_SIZE(cpus);
        int failed, count;

        if (!set)
            break;
        CPU_ZERO_S(bytes, set);
        failed = sched_getaffinity(0, bytes, set) < 0 ? errno : 0;
        count = failed ? 0 : CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        if (count > 0)
            return (uint32_t)count;
        if (failed != EINVAL)
            break;
    }
    online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (uint32_t)online : 1;
}
