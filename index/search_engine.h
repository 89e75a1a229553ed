/* search_engine: threads that run many queries at once.
 *
 * Each thread owns one reader (ring) and a fixed number of query slots; a slot runs one query's
 * state machine (disk_search.h) and the thread interleaves them, so that the drive sees as deep a
 * queue as it is allowed and no query keeps another from its turn. Nothing is allocated per query.
 * Answers do not depend on what else runs. */
#ifndef ANND_INDEX_SEARCH_ENGINE_H
#define ANND_INDEX_SEARCH_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "index/disk_index.h"
#include "index/disk_search.h"
#include "storage/reader.h"

struct search_engine_options {
    uint32_t threads;          /* 0: one per CPU */
    uint32_t slots_per_thread; /* queries interleaved by one thread, 1..64 */
    /* Reads outstanding over all threads, each having its equal share, one at least: few keep the
     * drive's latency low (about 32), many its throughput high (about 128). A query that wants more
     * waits its turn. 0: 128. */
    uint32_t reads_in_flight;
    struct disk_search_limits limits; /* scratch of each slot is sized by these */
    enum reader_backend backend;
};

struct search_engine;

/* One query. Owned by the caller until `done` has been called. */
struct search_task {
    const struct disk_index *index;
    const float *query; /* dim floats, finite */
    struct search_params params;
    struct search_hit *hits; /* params.k of them, filled best first */
    uint32_t hit_count;
    struct search_stats stats;
    struct error error; /* code 0: good */
    /* Called on the engine's thread, once; must not block. */
    void (*done)(struct search_task *task);
    void *context;
    struct search_task *next; /* the engine's, as is the next */
    uint64_t submitted_ns;
};

int search_engine_open(const struct search_engine_options *options, struct search_engine **out,
                       struct error *err);
/* Finishes what is queued, joins the threads. NULL is accepted. */
void search_engine_close(struct search_engine *engine);
/* Any thread, done() included. ERR_BUSY when the queue is full (65,536 tasks wait); then done() is
 * not called. A task that exceeds what the engine was sized for is answered with ERR_INVALID. One
 * whose deadline passes, or that is cancelled, while it waits for a thread or for its turn to read
 * is answered without going on. */
int search_engine_submit(struct search_engine *engine, struct search_task *task, struct error *err);
/* Submits count tasks and waits for all; their own `done` and `context` are overwritten. Any thread
 * that is not the engine's. Errors are in each task. ERR_BUSY when others keep the queue full: some
 * tasks, the last ones, were not run. */
int search_engine_run(struct search_engine *engine, struct search_task *tasks, uint32_t count,
                      struct error *err);
uint64_t search_engine_memory_bytes(const struct search_engine *engine);
enum reader_backend search_engine_backend(const struct search_engine *engine);
uint32_t search_engine_threads(const struct search_engine *engine);

#endif
