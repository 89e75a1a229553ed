/* One loop per thread: take tasks while slots are free, submit the reads they want in one go, reap
 * whatever has arrived, hand it to the slots, answer those that are done. A thread sleeps in the
 * ring while reads are in flight, else on its own condition.
 *
 * A thread has at most its share of reads outstanding. Slots that want to read stand in line
 * (`turns`); the first gets what room there is, as much as it wants, before the next gets any. A
 * slot has at most one place in the line and goes to its end when it wants more later, so each
 * waits for at most one turn of every other.
 *
 * While the drive has more than half of the share to do, reads are collected and submitted once per
 * round, which saves calls of the kernel; below that, and hence always when queries come one at a
 * time, they go out at once, so that the drive works while the thread computes.
 *
 * A query that is cancelled or late is noticed by its own walk when a page arrives; here those are
 * found that have nothing in flight: in the queue, and in line. A walk is then given up where it
 * stands, and its slot is free as soon as its own reads are back. */
#include "index/search_engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/pool.h"

#define SLOTS_MAX 64u
#define QUEUE_MAX 65536u
#define RUN_PENDING_MAX 4096u /* of one search_engine_run */
#define REAP_MAX 16u
#define READS_DEFAULT 128u
/* A thread without a free slot looks for lapsed tasks among so many, so often. */
#define SWEEP_TASKS 256u
#define SWEEP_EVERY_US 1000u

struct slot {
    struct disk_search *search;
    struct search_task *task; /* NULL: free */
    uint32_t in_flight;       /* reads the reader has */
    bool in_turn;             /* stands in line */
    bool lapsed;              /* given up: its error is set, it waits for its reads */
};

struct worker {
    struct search_engine *engine;
    pthread_t thread;
    bool started;
    bool ready; /* under the engine's mutex: the reader is open, or open_error says why not */
    struct error open_error;
    struct reader *reader;
    struct reader_read **reads; /* of one submission: engine->share */
    struct walk_scratch *scratch;
    struct slot slots[SLOTS_MAX];
    uint32_t busy;
    uint8_t turns[SLOTS_MAX]; /* slots in line, a ring */
    uint32_t turn_first;
    uint32_t turn_count;
    uint64_t swept_us;
    pthread_cond_t work; /* signalled after `waiting` is cleared */
    bool waiting;        /* on the idle stack */
    struct worker *idle_next;
};

struct search_engine {
    struct search_engine_options options;
    struct worker *workers;
    uint32_t worker_count;
    uint32_t share;        /* reads in flight of one thread */
    pthread_mutex_t mutex; /* guards the queue, the idle stack and stop */
    pthread_cond_t ready;
    struct search_task *first;
    struct search_task *last;
    uint32_t queued;     /* written under the mutex, peeked at without */
    struct worker *idle; /* a stack: who slept last has the warmest caches and wakes first */
    bool stop;
    enum reader_backend backend;
};

/* The worker this thread is; NULL on all other threads. */
static _Thread_local struct worker *current;

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- answers ---- */

static void answer(struct search_task *task)
{
    task->stats.latency_us = (float)(clock_ns() - task->submitted_ns) / 1000.0f;
    task->done(task);
}

/* True with the task's error set when there is no point in going on. */
static bool task_lapsed(struct search_task *task, uint64_t now_us)
{
    const struct search_params *params = &task->params;

    if (params->cancelled && __atomic_load_n(params->cancelled, __ATOMIC_RELAXED)) {
        error_set(&task->error, ERR_CANCELLED, "the search was cancelled");
        return true;
    }
    if (params->deadline_us && now_us > params->deadline_us) {
        error_set(&task->error, ERR_TIMEOUT, "the search passed its deadline while it waited");
        return true;
    }
    return false;
}

static void answer_unstarted(struct search_task *task)
{
    task->hit_count = 0;
    memset(&task->stats, 0, sizeof task->stats);
    answer(task);
}

/* ---- slots and their turns ---- */

static void turn_push(struct worker *worker, struct slot *slot)
{
    slot->in_turn = true;
    worker->turns[(worker->turn_first + worker->turn_count) % SLOTS_MAX] =
        (uint8_t)(slot - worker->slots);
    worker->turn_count++;
}

static void turn_pop(struct worker *worker)
{
    worker->slots[worker->turns[worker->turn_first]].in_turn = false;
    worker->turn_first = (worker->turn_first + 1) % SLOTS_MAX;
    worker->turn_count--;
}

/* Takes a slot out of the line, wherever it stands. */
static void turn_drop(struct worker *worker, struct slot *slot)
{
    uint32_t count = worker->turn_count;

    for (uint32_t i = 0; i < count; i++) {
        struct slot *other = &worker->slots[worker->turns[worker->turn_first]];

        turn_pop(worker);
        if (other != slot)
            turn_push(worker, other);
    }
}

static void finish(struct worker *worker, struct slot *slot)
{
    struct search_task *task = slot->task;

    task->stats = *disk_search_stats(slot->search);
    task->hit_count = 0;
    if (!slot->lapsed && disk_search_error(slot->search, &task->error) == 0)
        task->hit_count = disk_search_hits(slot->search, task->hits, task->params.k);
    if (slot->in_turn)
        turn_drop(worker, slot);
    slot->task = NULL;
    worker->busy--;
    answer(task);
}

/* After a step of a walk: answers it, or puts it in line for what it wants to read. */
static void settle(struct worker *worker, struct slot *slot)
{
    if (disk_search_done(slot->search))
        finish(worker, slot);
    else if (!slot->in_turn)
        turn_push(worker, slot);
}

/* Ends a walk whose task has lapsed; with reads in flight, once they are back. */
static void give_up(struct worker *worker, struct slot *slot)
{
    slot->lapsed = true;
    if (slot->in_turn)
        turn_drop(worker, slot);
    if (!slot->in_flight)
        finish(worker, slot);
}

static void pump(struct worker *worker);

static void start(struct worker *worker, struct search_task *task)
{
    struct slot *slot = worker->slots;

    if (task_lapsed(task, clock_ns() / 1000)) {
        answer_unstarted(task);
        return;
    }
    while (slot->task)
        slot++;
    if (disk_search_begin(slot->search, task->index, task->query, &task->params, &task->error) <
        0) {
        answer_unstarted(task);
        return;
    }
    slot->task = task;
    slot->in_flight = 0;
    slot->lapsed = false;
    worker->busy++;
    settle(worker, slot);
    if (disk_search_seeding(slot->search)) {
        pump(worker);
        if (slot->task == task && !slot->lapsed) { /* pump gives up what is late */
            disk_search_continue(slot->search);
            settle(worker, slot);
        }
    }
}

/* Submits what the slots in line want, as far as the thread's share goes. */
static void pump(struct worker *worker)
{
    uint32_t room = worker->engine->share - reader_in_flight(worker->reader), count = 0;
    uint64_t now_us = worker->turn_count ? clock_ns() / 1000 : 0;

    while (count < room && worker->turn_count) {
        struct slot *slot = &worker->slots[worker->turns[worker->turn_first]];
        uint32_t most = room - count;

        if (task_lapsed(slot->task, now_us)) {
            give_up(worker, slot);
            continue;
        }
        uint32_t got = disk_search_wanted(slot->search, worker->reads + count, most);

        count += got;
        slot->in_flight += got;
        if (got < most)
            turn_pop(worker);
    }
    /* A submission that fails hands its reads back through reader_wait with their errors. */
    if (count)
        reader_submit(worker->reader, worker->reads, count, NULL);
}

/* Between two computations: keeps the drive from running dry. */
static void pump_early(struct worker *worker)
{
    if (worker->turn_count && reader_in_flight(worker->reader) <= worker->engine->share / 2)
        pump(worker);
}

static void arrive(struct worker *worker, struct reader_read *read)
{
    struct slot *slot = worker->slots;

    while (slot->search != read->owner)
        slot++;
    slot->in_flight--;
    disk_search_arrived(slot->search, read, NULL); /* one that has lapsed sees so itself */
    if (!slot->lapsed)
        settle(worker, slot);
    else if (!slot->in_flight)
        finish(worker, slot);
}

/* Gives up the walks in line that have lapsed, wherever they stand. */
static void drop_lapsed(struct worker *worker)
{
    uint64_t now_us = clock_ns() / 1000;

    for (uint32_t i = 0; i < worker->turn_count;) {
        struct slot *slot = &worker->slots[worker->turns[(worker->turn_first + i) % SLOTS_MAX]];

        if (task_lapsed(slot->task, now_us)) {
            give_up(worker, slot);
            i = 0; /* the ring has moved */
        } else {
            i++;
        }
    }
}

/* ---- the queue; the mutex is held ---- */

static void wake_one(struct search_engine *engine)
{
    struct worker *worker = engine->idle;

    engine->idle = worker->idle_next;
    worker->waiting = false;
    pthread_cond_signal(&worker->work);
}

static uint32_t queued_peek(const struct search_engine *engine)
{
    return __atomic_load_n(&engine->queued, __ATOMIC_RELAXED);
}

static void queued_set(struct search_engine *engine, uint32_t queued)
{
    __atomic_store_n(&engine->queued, queued, __ATOMIC_RELAXED);
}

/* Unlinks up to `most` tasks from the front; returns them as a list. */
static struct search_task *queue_take(struct search_engine *engine, uint32_t most)
{
    struct search_task *taken = NULL, **end = &taken;
    uint32_t left = engine->queued;

    for (; most && engine->first; most--, left--) {
        *end = engine->first;
        end = &engine->first->next;
        engine->first = engine->first->next;
    }
    *end = NULL;
    queued_set(engine, left);
    return taken;
}

/* Unlinks the lapsed among the first SWEEP_TASKS; returns them as a list. */
static struct search_task *queue_sweep(struct search_engine *engine, uint64_t now_us)
{
    struct search_task *swept = NULL, **end = &swept, **at = &engine->first, *before = NULL;
    uint32_t left = engine->queued;

    for (uint32_t i = 0; i < SWEEP_TASKS && *at; i++) {
        struct search_task *task = *at;

        if (!task_lapsed(task, now_us)) {
            before = task;
            at = &task->next;
            continue;
        }
        *at = task->next;
        if (engine->last == task)
            engine->last = before;
        *end = task;
        end = &task->next;
        left--;
    }
    *end = NULL;
    queued_set(engine, left);
    return swept;
}

/* ---- threads ---- */

static void sweep(struct worker *worker)
{
    struct search_engine *engine = worker->engine;
    uint64_t now_us = clock_ns() / 1000;
    struct search_task *swept;

    if (now_us - worker->swept_us < SWEEP_EVERY_US)
        return;
    worker->swept_us = now_us;
    pthread_mutex_lock(&engine->mutex);
    swept = queue_sweep(engine, now_us);
    pthread_mutex_unlock(&engine->mutex);
    while (swept) {
        struct search_task *task = swept;

        swept = swept->next;
        answer_unstarted(task);
    }
}

/* Takes a fair share of the queue; waits for work only when the thread has nothing in flight.
 * Returns false when the engine stops and nothing is left. */
static bool take(struct worker *worker)
{
    struct search_engine *engine = worker->engine;
    struct search_task *taken;
    uint32_t room = engine->options.slots_per_thread - worker->busy;

    if (worker->busy && !queued_peek(engine))
        return true;
    if (!room) {
        sweep(worker);
        return true;
    }
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

    taken = queue_take(engine, room < share ? room : share);
    pthread_mutex_unlock(&engine->mutex);
    while (taken) {
        struct search_task *task = taken;

        taken = taken->next;
        start(worker, task);
        pump_early(worker);
    }
    return true;
}

static void *work(void *context)
{
    struct worker *worker = context;
    struct search_engine *engine = worker->engine;
    const struct search_engine_options *options = &engine->options;
    struct reader_read *done[REAP_MAX];

    current = worker;
    /* A ring belongs to the thread that makes it. */
    reader_open(options->backend, engine->share, &worker->reader, &worker->open_error);
    pthread_mutex_lock(&engine->mutex);
    worker->ready = true;
    pthread_cond_signal(&engine->ready);
    pthread_mutex_unlock(&engine->mutex);
    while (worker->reader && take(worker)) {
        pump(worker);
        /* done() may have queued a task that nobody was woken for. */
        bool more = worker->busy < options->slots_per_thread && queued_peek(engine);
        uint32_t count = reader_wait(worker->reader, done, REAP_MAX, !more);

        for (uint32_t i = 0; i < count; i++) {
            arrive(worker, done[i]);
            pump_early(worker);
        }
        if (worker->turn_count)
            drop_lapsed(worker);
    }
    reader_close(worker->reader);
    return NULL;
}

/* ---- life ---- */

static int worker_init(struct worker *worker, struct search_engine *engine, struct error *err)
{
    const struct search_engine_options *options = &engine->options;

    pthread_cond_init(&worker->work, NULL);
    worker->engine = engine;
    worker->reads = malloc(engine->share * sizeof(struct reader_read *));
    if (!worker->reads)
        return error_set(err, ERR_NOMEM, "no memory for %u reads in flight", engine->share);
    if (walk_scratch_new(&options->limits, &worker->scratch, err) < 0)
        return -1;
    for (uint32_t s = 0; s < options->slots_per_thread; s++)
        if (disk_search_new(&options->limits, worker->scratch, &worker->slots[s].search, err) < 0)
            return -1;
    return 0;
}

int search_engine_open(const struct search_engine_options *options, struct search_engine **out,
                       struct error *err)
{
    int rc = -1;
    uint32_t reads = options->reads_in_flight ? options->reads_in_flight : READS_DEFAULT;
    struct search_engine *engine = NULL;

    if (options->slots_per_thread < 1 || options->slots_per_thread > SLOTS_MAX)
        return error_set(err, ERR_INVALID, "a search thread takes 1..%u queries at once, not %u",
                         SLOTS_MAX, options->slots_per_thread);
    engine = calloc(1, sizeof *engine);
    if (!engine)
        return error_set(err, ERR_NOMEM, "no memory for the search engine");
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->ready, NULL);
    engine->options = *options;
    engine->worker_count = options->threads ? options->threads : cpu_count();
    engine->share = reads / engine->worker_count;
    if (engine->share > options->slots_per_thread * options->limits.beam_width)
        engine->share = options->slots_per_thread * options->limits.beam_width;
    if (engine->share > READER_DEPTH_MAX)
        engine->share = READER_DEPTH_MAX;
    if (engine->share < 1)
        engine->share = 1;
    engine->workers = calloc(engine->worker_count, sizeof *engine->workers);
    if (!engine->workers) {
        error_set(err, ERR_NOMEM, "no memory for %u search threads", engine->worker_count);
        goto done;
    }
    for (uint32_t i = 0; i < engine->worker_count; i++)
        if (worker_init(&engine->workers[i], engine, err) < 0)
            goto done;
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
        walk_scratch_free(worker->scratch);
        free(worker->reads);
        if (worker->engine)
            pthread_cond_destroy(&worker->work);
    }
    free(engine->workers);
    pthread_cond_destroy(&engine->ready);
    pthread_mutex_destroy(&engine->mutex);
    free(engine);
}

/* ---- submitting ---- */

/* Queues count tasks, all or none. */
static int submit(struct search_engine *engine, struct search_task *tasks, uint32_t count,
                  struct error *err)
{
    uint64_t now_ns = clock_ns();
    uint32_t wake = count;

    for (uint32_t i = 0; i < count; i++) {
        tasks[i].next = i + 1 < count ? &tasks[i + 1] : NULL;
        tasks[i].submitted_ns = now_ns;
        error_clear(&tasks[i].error);
    }
    /* A thread of ours that has nothing else to do takes the task itself, in a moment. */
    if (current && current->engine == engine && current->busy == 0)
        wake--;
    pthread_mutex_lock(&engine->mutex);
    if (engine->queued + count > QUEUE_MAX || engine->stop) {
        uint32_t queued = engine->queued;

        pthread_mutex_unlock(&engine->mutex);
        return error_set(err, ERR_BUSY, "the search queue is full: %u searches wait", queued);
    }
    if (engine->first)
        engine->last->next = tasks;
    else
        engine->first = tasks;
    engine->last = &tasks[count - 1];
    queued_set(engine, engine->queued + count);
    for (; wake && engine->idle; wake--)
        wake_one(engine);
    pthread_mutex_unlock(&engine->mutex);
    return 0;
}

int search_engine_submit(struct search_engine *engine, struct search_task *task, struct error *err)
{
    return submit(engine, task, 1, err);
}

struct run {
    pthread_mutex_t mutex;
    pthread_cond_t done;
    uint32_t pending; /* submitted and not answered */
    uint32_t most;    /* the caller is woken when so many are left */
};

static void run_done(struct search_task *task)
{
    struct run *run = task->context;

    pthread_mutex_lock(&run->mutex);
    run->pending--;
    if (run->pending == run->most)
        pthread_cond_signal(&run->done);
    pthread_mutex_unlock(&run->mutex);
}

/* Waits until at most `most` tasks are pending; returns how many are. */
static uint32_t run_wait(struct run *run, uint32_t most)
{
    uint32_t pending;

    pthread_mutex_lock(&run->mutex);
    run->most = most;
    while (run->pending > most)
        pthread_cond_wait(&run->done, &run->mutex);
    pending = run->pending;
    pthread_mutex_unlock(&run->mutex);
    return pending;
}

int search_engine_run(struct search_engine *engine, struct search_task *tasks, uint32_t count,
                      struct error *err)
{
    struct run run = {.mutex = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};
    int rc = 0;

    for (uint32_t i = 0; i < count && rc == 0;) {
        /* However many there are, the queue keeps room for others. */
        uint32_t room = RUN_PENDING_MAX - run_wait(&run, RUN_PENDING_MAX / 2);
        uint32_t piece = count - i < room ? count - i : room;

        for (uint32_t j = i; j < i + piece; j++) {
            tasks[j].done = run_done;
            tasks[j].context = &run;
        }
        pthread_mutex_lock(&run.mutex);
        run.pending += piece;
        pthread_mutex_unlock(&run.mutex);
        rc = submit(engine, tasks + i, piece, err);
        if (rc < 0) {
            pthread_mutex_lock(&run.mutex);
            run.pending -= piece; /* they will never report */
            pthread_mutex_unlock(&run.mutex);
        }
        i += piece;
    }
    run_wait(&run, 0);
    return rc;
}

uint64_t search_engine_memory_bytes(const struct search_engine *engine)
{
    const struct search_engine_options *o = &engine->options;

    return sizeof *engine +
           (uint64_t)engine->worker_count *
               (sizeof(struct worker) + engine->share * sizeof(struct reader_read *) +
                walk_scratch_memory_bytes(&o->limits) +
                o->slots_per_thread * disk_search_memory_bytes(&o->limits));
}

enum reader_backend search_engine_backend(const struct search_engine *engine)
{
    return engine->backend;
}

uint32_t search_engine_threads(const struct search_engine *engine)
{
    return engine->worker_count;
}
