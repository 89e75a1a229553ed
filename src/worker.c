/* One mutex, one condition, one list: the work behind it takes milliseconds. */
#include "src/worker.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

struct worker_pool {
    pthread_mutex_t mutex;
    pthread_cond_t work;
    struct worker_task *first;
    struct worker_task *last;
    uint32_t queued;
    uint32_t queue_max;
    bool stop;
    uint32_t thread_count;
    pthread_t threads[];
};

static void *work(void *context)
{
    struct worker_pool *pool = context;

    pthread_setname_np(pthread_self(), "annd-worker");
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        struct worker_task *task;

        while (!pool->first && !pool->stop)
            pthread_cond_wait(&pool->work, &pool->mutex);
        task = pool->first;
        if (!task)
            break;
        pool->first = task->next;
        pool->queued--;
        pthread_mutex_unlock(&pool->mutex);
        task->fn(task);
        pthread_mutex_lock(&pool->mutex);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

int worker_pool_open(uint32_t threads, uint32_t queue_max, struct worker_pool **out,
                     struct error *err)
{
    struct worker_pool *pool = calloc(1, sizeof *pool + threads * sizeof pool->threads[0]);

    if (!pool)
        return error_set(err, ERR_NOMEM, "no memory for %u worker threads", threads);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->queue_max = queue_max;
    for (; pool->thread_count < threads; pool->thread_count++) {
        int code = pthread_create(&pool->threads[pool->thread_count], NULL, work, pool);

        if (code != 0) {
            error_set_errno(err, code, "starting worker thread %u failed", pool->thread_count);
            worker_pool_close(pool);
            return -1;
        }
    }
    *out = pool;
    return 0;
}

void worker_pool_close(struct worker_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (uint32_t i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

int worker_submit(struct worker_pool *pool, struct worker_task *task, struct error *err)
{
    int rc = 0;

    task->next = NULL;
    pthread_mutex_lock(&pool->mutex);
    if (pool->queued >= pool->queue_max || pool->stop) {
        rc = error_set(err, ERR_BUSY, "the worker queue is full: %u tasks wait", pool->queued);
    } else {
        if (pool->first)
            pool->last->next = task;
        else
            pool->first = task;
        pool->last = task;
        pool->queued++;
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->mutex);
    return rc;
}
