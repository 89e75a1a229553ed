/* reader on plain pread: a few threads of the reader's own, one mutex, two queues.
 *
 * Each thread takes one read off `queue`, does it to the end with the loop every backend shares,
 * and puts it on `done`. Threads start when reads outnumber the idle ones, up to the depth or
 * READER_THREADS_MAX; beyond that reads queue, which a disk would make them do as well. If not even
 * one thread can be started, reads are done by the caller inside submit: slower, never wrong. */
#include <signal.h>
#include <stddef.h>

#include "storage/reader_internal.h"

/* vfs->pread is shallow; the default of 8 MiB times 32 times the number of readers only looks like
 * a leak in every monitor. */
#define STACK_BYTES (256u << 10)

static void *worker(void *argument)
{
    struct reader_pread *pool = argument;

    pthread_mutex_lock(&pool->lock);
    for (;;) {
        struct reader_read *read = reader_list_pop(&pool->queue);

        if (!read) {
            if (pool->stop)
                break;
            pthread_cond_wait(&pool->work_there, &pool->lock);
            continue;
        }
        pool->running++;
        pthread_mutex_unlock(&pool->lock);
        reader_read_now(read);
        pthread_mutex_lock(&pool->lock);
        pool->running--;
        reader_list_push(&pool->done, read);
        if (pool->owner_waits)
            pthread_cond_signal(&pool->done_there);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Signals are for the program's own threads: they start blocked here. */
static bool start_thread(struct reader_pread *pool)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int rc;

    if (pthread_attr_init(&attributes) != 0)
        return false;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&pool->threads[pool->thread_count], &attributes, worker, pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (rc != 0)
        return false;
    pool->thread_count++;
    return true;
}

static void pread_submit(struct reader *reader, struct reader_read **reads, uint32_t count)
{
    struct reader_pread *pool = &reader->pread;
    uint32_t thread_max = reader->depth < READER_THREADS_MAX ? reader->depth : READER_THREADS_MAX;
    uint32_t wanted;

    pthread_mutex_lock(&pool->lock);
    wanted = pool->running + pool->queue.count + count;
    pthread_mutex_unlock(&pool->lock);
    if (wanted > thread_max)
        wanted = thread_max;
    while (pool->thread_count < wanted && start_thread(pool))
        ;
    if (pool->thread_count == 0) {
        for (uint32_t i = 0; i < count; i++) {
            reader_read_now(reads[i]);
            reader_list_push(&reader->ready, reads[i]);
        }
        return;
    }
    pthread_mutex_lock(&pool->lock);
    for (uint32_t i = 0; i < count; i++) {
        reader_list_push(&pool->queue, reads[i]);
        pthread_cond_signal(&pool->work_there);
    }
    pthread_mutex_unlock(&pool->lock);
}

static void pread_reap(struct reader *reader, bool block)
{
    struct reader_pread *pool = &reader->pread;
    struct reader_read *read;

    pthread_mutex_lock(&pool->lock);
    pool->owner_waits = true;
    while (block && pool->done.count == 0)
        pthread_cond_wait(&pool->done_there, &pool->lock);
    pool->owner_waits = false;
    while ((read = reader_list_pop(&pool->done)))
        reader_list_push(&reader->ready, read);
    pthread_mutex_unlock(&pool->lock);
}

static void pread_close(struct reader *reader)
{
    struct reader_pread *pool = &reader->pread;

    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work_there);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done_there);
    pthread_cond_destroy(&pool->work_there);
    pthread_mutex_destroy(&pool->lock);
}

static const struct reader_ops pread_ops = {
    .submit = pread_submit,
    .reap = pread_reap,
    .close = pread_close,
};

void reader_pread_attach(struct reader *reader)
{
    struct reader_pread *pool = &reader->pread;

    /* With default attributes these do nothing that can fail on Linux. */
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work_there, NULL);
    pthread_cond_init(&pool->done_there, NULL);
    reader->ops = &pread_ops;
    reader->backend = READER_PREAD;
}
