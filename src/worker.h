/* worker: a few threads with a bounded queue, for what would hold up an HTTP thread: answers of
 * many rows, large gets. Functions run in the order they were handed over. Any thread may submit.
 */
#ifndef ANND_SRC_WORKER_H
#define ANND_SRC_WORKER_H

#include <stdint.h>

#include "storage/base/error.h"

struct worker_pool;

/* Embedded in what is to be done; the pool's from submit until fn is called. */
struct worker_task {
    void (*fn)(struct worker_task *task);
    struct worker_task *next;
};

int worker_pool_open(uint32_t threads, uint32_t queue_max, struct worker_pool **out,
                     struct error *err);
/* Runs what is queued, joins. NULL is accepted. */
void worker_pool_close(struct worker_pool *pool);
/* ERR_BUSY when the queue is full. */
int worker_submit(struct worker_pool *pool, struct worker_task *task, struct error *err);

#endif
