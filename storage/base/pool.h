/* Pool: worker threads for data-parallel loops.
 *
 * One pool serves one job at a time; the calling thread works too, as worker 0. Ranges are cut by
 * count and grain alone, never by the number of threads: a loop whose ranges do not depend on each
 * other's results gives the same bytes with 1 and with N threads. */
#ifndef ANND_STORAGE_BASE_POOL_H
#define ANND_STORAGE_BASE_POOL_H

#include <stdint.h>

#include "storage/base/error.h"

struct pool;

/* Handles [begin, end). worker is 0..pool_workers()-1, distinct among ranges that run at the same
 * time: index per-worker scratch with it, never results. */
typedef void (*pool_range_fn)(void *context, uint64_t begin, uint64_t end, uint32_t worker);

/* Starts worker_count - 1 threads (0: one worker per online CPU). ERR_NOMEM, ERR_IO. */
int pool_new(uint32_t worker_count, struct pool **out, struct error *err);
/* Joins the threads. NULL is accepted. No loop may be running. */
void pool_free(struct pool *pool);

uint32_t pool_workers(const struct pool *pool);

/* Calls fn for [0, count) in ranges of `grain` (>= 1) until all are done. pool may be NULL: then
 * the caller does it all, with the same ranges. Only one thread may be in here per pool. */
void pool_for(struct pool *pool, uint64_t count, uint64_t grain, pool_range_fn fn, void *context);

/* Number of CPUs this process may run on (its affinity mask), at least 1. */
uint32_t cpu_count(void);

#endif
