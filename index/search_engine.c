/* One loop per thread: take tasks while slots are free, collect the reads all slots want, submit
 * them in one go, reap whatever has arrived, hand it to the slots, answer those that are done. A
 * thread sleeps in the ring while reads are in flight, else on its own condition. */
#include "index/search_engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/pool.h"

#define SLOTS_MAX 64u
#define QUEUE_MAX 65536u
#define RUN_PENDING_MAX 4096u /* of one search_engine_run */
#define REAP_MAX 64u

struct slot {
    struct disk_search *search;
    struct search_task *task; /* NULL: free */
    double started_us;
};

struct worker {
    struct search_engine *engine;
    pthread_t thread;
    bool started;
    bool ready; /* under the engine's mutex: the reader is open, or open_error says why not */
    struct error open_error;
    struct reader *reader;
    struct slot slots[SLOTS_MAX];
    uint32_t busy;
    pthread_cond_t work; /* signalled after `waiting` is cleared */
    bool waiting;        /* on the idle stack */
    struct worker *idle_next;
};

struct search_engine {
    struct search_engine_options options;
    struct worker *workers;
    uint32_t worker_count;
    pthread_mutex_t mutex; /* guards the queue, the idle stack and stop */
    pthread_cond_t ready;
    struct search_task *first;
    struct search_task *last;
    uint32_t queued;
    struct worker *idle; /* a stack: who slept last has the warmest caches and wakes first */
    bool stop;
    enum reader_backend backend;
};

static double clock_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void finish(struct worker *worker, struct slot *slot)
{
    struct search_task *task = slot->task;

    task->stats = *disk_search_stats(slot->search);
    task->stats.latency_us = (float)(clock_us() - slot->started_us);
    task->hit_count = 0;
    if (disk_search_error(slot->search, &task->error) == 0)
        task->hit_count = disk_search_hits(slot->search, task->hits, task->params.k);
    slot->task = NULL;
    worker->busy--;
    task->done(task);
}

/* Submits what a slot wants; true when its query is done. The reader's depth is slots x beam, so a
 * submission always fits. */
static bool push(struct worker *worker, struct slot *slot)
{
    struct reader_read *reads[DISK_SEARCH_BEAM_MAX];
    uint32_t count = disk_search_wanted(slot->search, reads, DISK_SEARCH_BEAM_MAX);

    /* A submission that fails hands its reads back through reader_wait with their errors. */
    if (count)
        reader_submit(worker->reader, reads, count, NULL);
    return disk_search_done(slot->search);
}

static void start(struct worker *worker, struct search_task *task)
{
    struct slot *slot = worker->slots;

    while (slot->task)
        slot++;
    slot->task = task;
    slot->started_us = clock_us();
    worker->busy++;
    if (disk_search_begin(slot->search, task->index, task->query, &task->params, &task->error) <
        0) {
        slot->task = NULL;
        worker->busy--;
        task->hit_count = 0;
        task->done(task);
        return;
    }
    if (push(worker, slot))
        finish(worker, slot);
}

/* Under the mutex. */
static void wake_one(struct search_engine *engine)
{
    struct worker *worker = engine->idle;

    engine->idle = worker->idle_next;
    worker->waiting = false;
    pthread_cond_signal(&worker->work);
}

/* Takes a fair share of the queue; waits for work only when the thread has nothing in flight.
 * Returns false when the engine stops and nothing is left. */
static bool take(struct worker *worker)
{
    struct search_engine *engine = worker->engine;
    struct search_task *taken = NULL, **end = &taken;
    uint32_t room = engine->options.slots_per_thread - worker->busy;

    if (!room)
        return true;
    pthread_mutex_lock(&engine->mutex);
    while (!engine->first && !worker->busy) {
        if (engine->stop) {
            pthread_mutex_unlock(&engine->mutex);
            return false;
        }
        worker->waiting = true;
        worker->idle_next = engine->idle;
        engine->idle = worker;
        while (worker->waiting)
            pthread_cond_wait(&worker->work, &engine->mutex);
    }
    uint32_t share = (engine->queued + engine->worker_count - 1) / engine->worker_count;

    for (room = room < share ? room : share; room && engine->first; room--) {
        *end = engine->first;
        end = &engine->first->next;
        engine->first = engine->first->next;
        engine->queued--;
    }
    *end = NULL;
    pthread_mutex_unlock(&engine->mutex);
    while (taken) {
        struct search_task *task = taken;

        taken = taken->next;
        start(worker, task);
    }
    return true;
}

static void *work(void *context)
{
    struct worker *worker = context;
    struct search_engine *engine = worker->engine;
    const struct search_engine_options *options = &engine->options;
    struct reader_read *done[REAP_MAX];

    /* A ring belongs to the thread that makes it. */
    reader_open(options->backend, options->slots_per_thread * options->beam_width, &worker->reader,
                &worker->open_error);
    pthread_mutex_lock(&engine->mutex);
    worker->ready = true;
    pthread_cond_signal(&engine->ready);
    pthread_mutex_unlock(&engine->mutex);
    while (worker->reader && take(worker)) {
        uint32_t count = reader_wait(worker->reader, done, REAP_MAX, true);

        for (uint32_t i = 0; i < count; i++) {
            struct slot *slot = worker->slots;

            while (slot->search != done[i]->owner)
                slot++;
            disk_search_arrived(slot->search, done[i], NULL);
            if (push(worker, slot))
                finish(worker, slot);
        }
    }
    reader_close(worker->reader);
    return NULL;
}

int search_engine_open(const struct search_engine_options *options, struct search_engine **out,
                       struct error *err)
{
    int rc = -1;
    struct search_engine *engine = NULL;

    if (options->slots_per_thread < 1 || options->slots_per_thread > SLOTS_MAX ||
        options->slots_per_thread * options->beam_width > READER_DEPTH_MAX)
        return error_set(err, ERR_INVALID,
                         "a search thread takes 1..%u queries with at most %u reads in flight; "
                         "got %u queries of %u reads",
                         SLOTS_MAX, READER_DEPTH_MAX, options->slots_per_thread,
                         options->beam_width);
    engine = calloc(1, sizeof *engine);
    if (!engine)
        return error_set(err, ERR_NOMEM, "no memory for the search engine");
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->ready, NULL);
    engine->options = *options;
    engine->worker_count = options->threads ? options->threads : cpu_count();
    engine->workers = calloc(engine->worker_count, sizeof *engine->workers);
    if (!engine->workers) {
        error_set(err, ERR_NOMEM, "no memory for %u search threads", engine->worker_count);
        goto done;
    }
    for (uint32_t i = 0; i < engine->worker_count; i++) {
        struct worker *worker = &engine->workers[i];
        const struct disk_search_limits limits = {
            options->search_list_max,   options->k_max,          options->beam_width,
            options->dim_max,           options->page_bytes_max, options->table_floats_max,
            options->scratch_floats_max};

        worker->engine = engine;
        pthread_cond_init(&worker->work, NULL);
        for (uint32_t s = 0; s < options->slots_per_thread; s++)
            if (disk_search_new(&limits, &worker->slots[s].search, err) < 0)
                goto done;
    }
    for (uint32_t i = 0; i < engine->worker_count; i++) {
        int code = pthread_create(&engine->workers[i].thread, NULL, work, &engine->workers[i]);

        if (code) {
            error_set(err, ERR_NOMEM, "starting search thread %u failed: %s", i, strerror(code));
            goto done;
        }
        engine->workers[i].started = true;
    }
    for (uint32_t i = 0; i < engine->worker_count; i++) {
        struct worker *worker = &engine->workers[i];

        pthread_mutex_lock(&engine->mutex);
        while (!worker->ready)
            pthread_cond_wait(&engine->ready, &engine->mutex);
        pthread_mutex_unlock(&engine->mutex);
        if (worker->open_error.code) {
            *err = worker->open_error;
            goto done;
        }
    }
    engine->backend = reader_backend_of(engine->workers[0].reader);
    *out = engine;
    engine = NULL; /* moved to the caller */
    rc = 0;
done:
    search_engine_close(engine);
    return rc;
}

void search_engine_close(struct search_engine *engine)
{
    if (!engine)
        return;
    pthread_mutex_lock(&engine->mutex);
    engine->stop = true;
    while (engine->idle)
        wake_one(engine);
    pthread_mutex_unlock(&engine->mutex);
    for (uint32_t i = 0; engine->workers && i < engine->worker_count; i++) {
        struct worker *worker = &engine->workers[i];

        if (worker->started)
            pthread_join(worker->thread, NULL);
        for (uint32_t s = 0; s < SLOTS_MAX; s++)
            disk_search_free(worker->slots[s].search);
        if (worker->engine)
            pthread_cond_destroy(&worker->work);
    }
    free(engine->workers);
    pthread_cond_destroy(&engine->ready);
    pthread_mutex_destroy(&engine->mutex);
    free(engine);
}

int search_engine_submit(struct search_engine *engine, struct search_task *task, struct error *err)
{
    int rc = 0;

    task->next = NULL;
    error_clear(&task->error);
    pthread_mutex_lock(&engine->mutex);
    if (engine->queued >= QUEUE_MAX || engine->stop) {
        rc = error_set(err, ERR_BUSY, "the search queue is full: %u searches wait", engine->queued);
    } else {
        if (engine->first)
            engine->last->next = task;
        else
            engine->first = task;
        engine->last = task;
        engine->queued++;
        if (engine->idle)
            wake_one(engine);
    }
    pthread_mutex_unlock(&engine->mutex);
    return rc;
}

struct run {
    pthread_mutex_t mutex;
    pthread_cond_t done;
    uint32_t pending; /* submitted and not answered */
};

static void run_done(struct search_task *task)
{
    struct run *run = task->context;

    pthread_mutex_lock(&run->mutex);
    run->pending--;
    pthread_cond_signal(&run->done);
    pthread_mutex_unlock(&run->mutex);
}

/* Waits until at most `most` tasks are pending. */
static void run_wait(struct run *run, uint32_t most)
{
    pthread_mutex_lock(&run->mutex);
    while (run->pending > most)
        pthread_cond_wait(&run->done, &run->mutex);
    pthread_mutex_unlock(&run->mutex);
}

int search_engine_run(struct search_engine *engine, struct search_task *tasks, uint32_t count,
                      struct error *err)
{
    struct run run = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};
    int rc = 0;

    for (uint32_t i = 0; i < count && rc == 0; i++) {
        /* However many there are, the queue keeps room for others. */
        run_wait(&run, RUN_PENDING_MAX - 1);
        tasks[i].done = run_done;
        tasks[i].context = &run;
        pthread_mutex_lock(&run.mutex);
        run.pending++;
        pthread_mutex_unlock(&run.mutex);
        rc = search_engine_submit(engine, &tasks[i], err);
        if (rc < 0) {
            pthread_mutex_lock(&run.mutex);
            run.pending--; /* it will never report */
            pthread_mutex_unlock(&run.mutex);
        }
    }
    run_wait(&run, 0);
    return rc;
}

uint64_t search_engine_memory_bytes(const struct search_engine *engine)
{
    const struct search_engine_options *o = &engine->options;
    const struct disk_search_limits limits = {o->search_list_max,   o->k_max,
                                              o->beam_width,        o->dim_max,
                                              o->page_bytes_max,    o->table_floats_max,
                                              o->scratch_floats_max};

    return sizeof *engine +
           (uint64_t)engine->worker_count *
               (sizeof(struct worker) + o->slots_per_thread * disk_search_memory_bytes(&limits));
}

enum reader_backend search_engine_backend(const struct search_engine *engine)
{
    return engine->backend;
}

uint32_t search_engine_threads(const struct search_engine *engine)
{
    return engine->worker_count;
}
