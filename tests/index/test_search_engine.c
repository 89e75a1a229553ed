/* The engine: whatever runs beside a query, on however many threads and with however few reads in
 * flight, its answer is the same, and what goes wrong for one query is nobody else's.
 *
 * Reads of the page file pass through a hook that sits in front of vfs_fault: it can hold them,
 * count how many there are at once, and spoil one page for good. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "index/search_engine.h"
#include "storage/file.h"
#include "tests/support/small_index.h"
#include "tests/support/vfs_fault.h"

#define K 10u
#define ROWS 3000u
#define DIM 24u
#define LIST 60u

/* ---- the hook ---- */

enum spoil { SPOIL_NOTHING, SPOIL_EIO, SPOIL_SHORT, SPOIL_DAMAGE };

static struct {
    int (*pread)(struct vfs_file *, void *, size_t, uint64_t, size_t *);
    int (*read_result)(struct vfs_file *, void *, size_t, uint64_t, int);
    const struct vfs_file *file; /* the pages; NULL: the hook does nothing */
    enum spoil spoil;
    uint64_t offset;  /* of the page that is spoilt */
    atomic_bool held; /* reads wait for a permit */
    sem_t arrived;
    sem_t permits;
    unsigned delay_us;
    atomic_uint now, most, calls;
} hook;

static bool is_spoilt(const struct vfs_file *file, uint64_t offset, size_t bytes)
{
    return file == hook.file && hook.spoil && offset <= hook.offset && hook.offset < offset + bytes;
}

/* What a read of the spoilt page is turned into. */
static int spoil_result(void *buffer, uint64_t offset, int result)
{
    int before = (int)(hook.offset - offset);

    if (result < 0)
        return result;
    switch (hook.spoil) {
    case SPOIL_EIO:
        return -EIO;
    case SPOIL_SHORT: /* as if the file ended there */
        return result < before ? result : before;
    case SPOIL_DAMAGE:
        if (result > before + 100)
            ((uint8_t *)buffer)[before + 100] ^= 0x10;
        return result;
    case SPOIL_NOTHING:
        break;
    }
    return result;
}

static int hook_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                      size_t *got)
{
    if (file != hook.file)
        return hook.pread(file, buffer, bytes, offset, got);
    unsigned now = atomic_fetch_add(&hook.now, 1) + 1, most = atomic_load(&hook.most);

    while (now > most && !atomic_compare_exchange_weak(&hook.most, &most, now))
        ;
    atomic_fetch_add(&hook.calls, 1);
    if (hook.held) {
        sem_post(&hook.arrived);
        sem_wait(&hook.permits);
    }
    if (hook.delay_us)
        usleep(hook.delay_us);
    int rc = hook.pread(file, buffer, bytes, offset, got);

    if (is_spoilt(file, offset, bytes)) {
        int result = spoil_result(buffer, offset, rc < 0 ? rc : (int)*got);

        rc = result < 0 ? result : 0;
        *got = result < 0 ? 0 : (size_t)result;
    }
    atomic_fetch_sub(&hook.now, 1);
    return rc;
}

static int hook_read_result(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                            int result)
{
    result = hook.read_result(file, buffer, bytes, offset, result);
    return is_spoilt(file, offset, bytes) ? spoil_result(buffer, offset, result) : result;
}

/* ---- the index under test ---- */

static struct small_index small;
static struct vfs_fault fault;
static struct index_directory *directory;
static const struct disk_index *disk;

static void index_open(uint64_t memory_bytes)
{
    struct error err = ERROR_INIT;

    index_directory_close(directory);
    directory = NULL;
    hook.file = NULL;
    if (index_directory_open(&fault.vfs, small.path, memory_bytes, false, &directory, &err) < 0)
        fail_msg("%s", err.message);
    disk = directory->segments[0].fields[0];
    hook.file = disk->pages->file;
}

static int group_setup(void **state)
{
    struct small_options options = small_options_default(ROWS, DIM);

    (void)state;
    small_index_make(&options, &small);
    vfs_fault_init(&fault, vfs_posix());
    hook.pread = fault.vfs.pread;
    hook.read_result = fault.vfs.read_result;
    fault.vfs.pread = hook_pread;
    fault.vfs.read_result = hook_read_result;
    sem_init(&hook.arrived, 0, 0);
    sem_init(&hook.permits, 0, 0);
    return 0;
}

static int group_teardown(void **state)
{
    (void)state;
    index_directory_close(directory);
    vfs_fault_release(&fault);
    small_index_remove(&small);
    return 0;
}

static int setup(void **state)
{
    (void)state;
    hook.spoil = SPOIL_NOTHING;
    hook.held = false;
    hook.delay_us = 0;
    atomic_store(&hook.most, 0);
    atomic_store(&hook.calls, 0);
    vfs_fault_plan(&fault, NULL);
    index_open(0);
    return 0;
}

/* ---- running queries ---- */

struct shape {
    uint32_t threads, slots, beam, reads_in_flight;
    enum reader_backend backend;
};

struct outcome {
    struct search_task *tasks;
    struct search_hit *hits;
    uint32_t count;
};

static const struct shape plain = {1, 1, 2, 2, READER_PREAD};
static const struct walk_rule whole_list = {LIST, 8, 0, 0};
static const struct walk_rule by_gain = {LIST, 8, 3, 0.2f};

static struct search_engine *engine_open(const struct shape *shape)
{
    struct error err = ERROR_INIT;
    struct search_engine *engine;
    struct search_engine_options options = {.threads = shape->threads,
                                            .slots_per_thread = shape->slots,
                                            .reads_in_flight = shape->reads_in_flight,
                                            .limits = {.search_list_max = 2 * LIST,
                                                       .cells_max = 16,
                                                       .k_max = K,
                                                       .beam_width = shape->beam},
                                            .backend = shape->backend};

    disk_search_limits_raise(&options.limits, disk);
    if (search_engine_open(&options, &engine, &err) < 0)
        fail_msg("%s", err.message);
    return engine;
}

/* Every query `repeat` times, the first of each first. beam_width is fixed: it is part of what an
 * answer depends on. */
static struct outcome outcome_new(const struct walk_rule *rule, uint32_t repeat)
{
    struct outcome out = {.count = small.query_count * repeat};

    out.tasks = calloc(out.count, sizeof *out.tasks);
    out.hits = calloc((size_t)out.count * K, sizeof *out.hits);
    for (uint32_t i = 0; i < out.count; i++)
        out.tasks[i] =
            (struct search_task){.index = disk,
                                 .query = small.queries + (size_t)(i % small.query_count) * DIM,
                                 .params = {.k = K, .rule = *rule, .beam_width = 2},
                                 .hits = out.hits + (size_t)i * K};
    return out;
}

static void outcome_free(struct outcome *out)
{
    free(out->tasks);
    free(out->hits);
}

static struct outcome run_all(const struct shape *shape, const struct walk_rule *rule,
                              uint32_t repeat)
{
    struct outcome out = outcome_new(rule, repeat);
    struct search_engine *engine = engine_open(shape);
    struct error err = ERROR_INIT;

    if (search_engine_run(engine, out.tasks, out.count, &err) < 0)
        fail_msg("%s", err.message);
    search_engine_close(engine);
    return out;
}

/* Each query by itself: nothing else is in the engine. */
static struct outcome run_alone(const struct shape *shape, const struct walk_rule *rule)
{
    struct outcome out = outcome_new(rule, 1);
    struct search_engine *engine = engine_open(shape);
    struct error err = ERROR_INIT;

    for (uint32_t i = 0; i < out.count; i++)
        if (search_engine_run(engine, &out.tasks[i], 1, &err) < 0)
            fail_msg("%s", err.message);
    search_engine_close(engine);
    return out;
}

/* Bit for bit. */
static void assert_same_answer(const struct search_task *task, const struct search_task *reference)
{
    if (task->error.code)
        fail_msg("%s", task->error.message);
    assert_int_equal(task->hit_count, reference->hit_count);
    for (uint32_t h = 0; h < task->hit_count; h++) {
        const struct search_hit *a = &task->hits[h], *b = &reference->hits[h];

        assert_int_equal(a->position, b->position);
        assert_int_equal(a->key, b->key);
        assert_memory_equal(&a->distance, &b->distance, sizeof a->distance);
    }
    assert_int_equal(task->stats.reads, reference->stats.reads);
    assert_int_equal(task->stats.rounds, reference->stats.rounds);
    assert_int_equal(task->stats.exact, reference->stats.exact);
    assert_int_equal(task->stats.stop, reference->stats.stop);
}

static void assert_same(const struct outcome *out, const struct outcome *reference)
{
    for (uint32_t i = 0; i < out->count; i++)
        assert_same_answer(&out->tasks[i], &reference->tasks[i % reference->count]);
}

static uint32_t backends(enum reader_backend *out)
{
    char reason[256];

    out[0] = READER_PREAD;
    out[1] = READER_URING;
    if (reader_probe(reason) == READER_URING)
        return 2;
    print_message("# io_uring is not available here: %s\n", reason);
    return 1;
}

/* ---- tests ---- */

static void test_a_query_has_one_answer_whatever_runs_beside_it(void **state)
{
    static const struct shape shapes[] = {
        {1, 1, 2, 1, READER_PREAD},    {1, 16, 2, 1, READER_PREAD},  {1, 16, 2, 5, READER_PREAD},
        {2, 5, 2, 7, READER_PREAD},    {4, 1, 2, 128, READER_PREAD}, {4, 16, 2, 32, READER_PREAD},
        {4, 16, 8, 128, READER_PREAD}, {3, 64, 2, 2, READER_PREAD},  {4, 16, 2, 0, READER_PREAD}};
    static const struct walk_rule *const rules[] = {&whole_list, &by_gain};
    enum reader_backend list[2];
    uint32_t list_count = backends(list);

    (void)state;
    for (size_t r = 0; r < 2; r++) {
        struct outcome reference = run_alone(&plain, rules[r]);
        uint64_t reads = 0;

        for (uint32_t i = 0; i < reference.count; i++) {
            assert_int_equal(reference.tasks[i].error.code, ERR_NONE);
            assert_int_equal(reference.tasks[i].hit_count, K);
            assert_true(reference.tasks[i].stats.latency_us > 0);
            reads += reference.tasks[i].stats.reads;
        }
        assert_true(reads > 0);
        for (uint32_t b = 0; b < list_count; b++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
                struct shape shape = shapes[s];

                shape.backend = list[b];
                struct outcome among = run_all(&shape, rules[r], 4);

                assert_same(&among, &reference);
                outcome_free(&among);
                struct outcome alone = run_alone(&shape, rules[r]);

                assert_same(&alone, &reference);
                outcome_free(&alone);
            }
        outcome_free(&reference);
    }
}

static void test_never_more_reads_are_in_flight_than_granted(void **state)
{
    static const struct {
        struct shape shape;
        uint32_t most;
    } cases[] = {{{1, 16, 2, 1, READER_PREAD}, 1},
                 {{1, 16, 2, 5, READER_PREAD}, 5},
                 {{3, 16, 2, 8, READER_PREAD}, 6},
                 {{4, 16, 2, 2, READER_PREAD}, 4}}; /* each thread has one at least */

    (void)state;
    struct outcome reference = run_alone(&plain, &whole_list);

    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        atomic_store(&hook.most, 0);
        hook.delay_us = 50;
        struct outcome out = run_all(&cases[c].shape, &whole_list, 1);

        assert_same(&out, &reference);
        assert_true(atomic_load(&hook.most) <= cases[c].most);
        outcome_free(&out);
    }
    outcome_free(&reference);
}

static void test_a_bad_page_fails_only_the_queries_that_need_it(void **state)
{
    static const struct shape alone = {1, 1, 2, 2, READER_PREAD}, among = {4, 16, 2, 32, 0};
    static const enum spoil ways[] = {SPOIL_EIO, SPOIL_SHORT, SPOIL_DAMAGE};
    enum reader_backend list[2];
    uint32_t list_count = backends(list);

    (void)state;
    struct outcome reference = run_alone(&alone, &whole_list);

    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        /* The page of the first query's nearest row, which that query cannot do without. */
        hook.offset = segment_block_offset(disk->pages, reference.tasks[0].hits[0].position /
                                                            disk->format.capacity);
        hook.spoil = ways[w];
        struct outcome need = run_alone(&alone, &whole_list);
        uint32_t failed = 0;

        for (uint32_t i = 0; i < need.count; i++)
            failed += need.tasks[i].error.code != ERR_NONE;
        assert_int_not_equal(need.tasks[0].error.code, ERR_NONE);
        assert_true(failed < need.count / 2);
        for (uint32_t b = 0; b < list_count; b++) {
            struct shape shape = among;

            shape.backend = list[b];
            struct outcome out = run_all(&shape, &whole_list, 3);

            for (uint32_t i = 0; i < out.count; i++) {
                const struct search_task *task = &out.tasks[i];
                const struct search_task *wanted = &need.tasks[i % need.count];

                if (!wanted->error.code) {
                    assert_same_answer(task, &reference.tasks[i % need.count]);
                    continue;
                }
                assert_int_equal(task->error.code, ways[w] == SPOIL_DAMAGE ? ERR_CORRUPT : ERR_IO);
                assert_string_equal(task->error.message, wanted->error.message);
                assert_non_null(strstr(task->error.message, "f0.pages"));
                assert_int_equal(task->hit_count, 0);
            }
            outcome_free(&out);
        }
        outcome_free(&need);
        hook.spoil = SPOIL_NOTHING;
    }
    struct outcome again = run_alone(&alone, &whole_list);

    assert_same(&again, &reference); /* nothing of it stays behind */
    outcome_free(&again);
    outcome_free(&reference);
}

static void test_one_failed_read_fails_one_query(void **state)
{
    static const struct shape among = {4, 16, 2, 32, 0};
    static const struct vfs_fault_plan plans[] = {
        {.call = VFS_CALL_READ, .path = "f0.pages", .effect = VFS_EFFECT_ERRNO, .errno_value = EIO},
        {.call = VFS_CALL_READ, .path = "f0.pages", .effect = VFS_EFFECT_FLIP, .bit = 4000},
        {.call = VFS_CALL_READ, .path = "f0.pages", .effect = VFS_EFFECT_TEAR},
        {.call = VFS_CALL_READ, .path = "f0.pages", .effect = VFS_EFFECT_SHORT}};
    enum reader_backend list[2];
    uint32_t list_count = backends(list);

    (void)state;
    struct outcome reference = run_alone(&plain, &whole_list);

    for (size_t p = 0; p < sizeof plans / sizeof *plans; p++)
        for (uint64_t nth = 1; nth < 300; nth += 61) {
            struct vfs_fault_plan plan = plans[p];
            struct shape shape = among;
            uint32_t failed = 0;

            plan.nth = nth;
            shape.backend = list[nth / 61 % list_count];
            vfs_fault_plan(&fault, &plan);
            struct outcome out = run_all(&shape, &whole_list, 1);

            assert_int_equal(vfs_fault_fired(&fault), 1);
            for (uint32_t i = 0; i < out.count; i++)
                if (out.tasks[i].error.code)
                    failed++;
                else
                    assert_same_answer(&out.tasks[i], &reference.tasks[i]);
            /* A short read is resumed. */
            assert_int_equal(failed, plan.effect == VFS_EFFECT_SHORT ? 0 : 1);
            outcome_free(&out);
        }
    outcome_free(&reference);
}

static void test_a_task_beyond_the_limits_is_answered_alone(void **state)
{
    static const struct shape shape = {2, 4, 2, 8, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct outcome out = outcome_new(&whole_list, 1);
    struct search_engine *engine = engine_open(&shape);
    struct error err = ERROR_INIT;

    (void)state;
    out.tasks[3].params.k = K + 1;
    out.tasks[5].params.rule.search_list = 2 * LIST + 1;
    out.tasks[7].params.rule.cells = 17;
    out.tasks[9].params.beam_width = 3;
    assert_int_equal(search_engine_run(engine, out.tasks, out.count, &err), 0);
    for (uint32_t i = 0; i < out.count; i++) {
        if (i >= 3 && i <= 9 && i % 2) {
            assert_int_equal(out.tasks[i].error.code, ERR_INVALID);
            assert_int_equal(out.tasks[i].hit_count, 0);
        } else {
            assert_same_answer(&out.tasks[i], &reference.tasks[i]);
        }
    }
    search_engine_close(engine);
    outcome_free(&out);
    outcome_free(&reference);
}

/* ---- waiting ---- */

static void done_post(struct search_task *task)
{
    sem_post(task->context);
}

/* Against the contract of done(): it keeps the engine's thread busy until the test says so. */
struct blocker {
    sem_t reached, release;
};

static void done_block(struct search_task *task)
{
    struct blocker *blocker = task->context;

    sem_post(&blocker->reached);
    sem_wait(&blocker->release);
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void test_tasks_that_lapse_in_the_queue_are_answered_without_running(void **state)
{
    static const struct shape shape = {1, 4, 2, 8, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct outcome out = outcome_new(&whole_list, 1);
    struct search_engine *engine = engine_open(&shape);
    struct blocker blocker;
    struct error err = ERROR_INIT;
    bool cancelled = false;
    sem_t done;

    (void)state;
    sem_init(&blocker.reached, 0, 0);
    sem_init(&blocker.release, 0, 0);
    sem_init(&done, 0, 0);
    out.tasks[0].done = done_block;
    out.tasks[0].context = &blocker;
    assert_int_equal(search_engine_submit(engine, &out.tasks[0], &err), 0);
    sem_wait(&blocker.reached);
    for (uint32_t i = 1; i < 10; i++) {
        out.tasks[i].done = done_post;
        out.tasks[i].context = &done;
        if (i == 2 || i == 8)
            out.tasks[i].params.cancelled = &cancelled;
        if (i == 5)
            out.tasks[i].params.deadline_us = now_us() + 5000;
        if (i == 6)
            out.tasks[i].params.deadline_us = now_us() + 600000000;
        assert_int_equal(search_engine_submit(engine, &out.tasks[i], &err), 0);
    }
    __atomic_store_n(&cancelled, true, __ATOMIC_RELAXED);
    usleep(10000);
    sem_post(&blocker.release);
    for (uint32_t i = 1; i < 10; i++)
        sem_wait(&done);
    for (uint32_t i = 0; i < 10; i++) {
        const struct search_task *task = &out.tasks[i];

        if (i != 2 && i != 8 && i != 5) {
            assert_same_answer(task, &reference.tasks[i]);
            continue;
        }
        assert_int_equal(task->error.code, i == 5 ? ERR_TIMEOUT : ERR_CANCELLED);
        assert_int_equal(task->hit_count, 0);
        assert_int_equal(task->stats.exact + task->stats.estimates + task->stats.reads, 0);
        assert_true(task->stats.latency_us > 5000);
    }
    search_engine_close(engine);
    outcome_free(&out);
    outcome_free(&reference);
}

/* One read at a time: while the first query reads, the second stands in line. */
static void lapse_in_line(bool by_deadline)
{
    static const struct shape shape = {1, 4, 2, 1, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct outcome out = outcome_new(&whole_list, 1);
    struct search_engine *engine = engine_open(&shape);
    struct blocker blocker;
    struct error err = ERROR_INIT;
    bool cancelled = false;
    sem_t first_done, second_done;

    sem_init(&blocker.reached, 0, 0);
    sem_init(&blocker.release, 0, 0);
    sem_init(&first_done, 0, 0);
    sem_init(&second_done, 0, 0);
    /* Both are to be in the queue before the thread looks, so that it starts both at once. */
    out.tasks[0].done = done_block;
    out.tasks[0].context = &blocker;
    assert_int_equal(search_engine_submit(engine, &out.tasks[0], &err), 0);
    sem_wait(&blocker.reached);
    hook.held = true;
    atomic_store(&hook.calls, 0);
    out.tasks[1].done = done_post;
    out.tasks[1].context = &first_done;
    out.tasks[2].done = done_post;
    out.tasks[2].context = &second_done;
    if (by_deadline)
        out.tasks[2].params.deadline_us = now_us() + 30000;
    else
        out.tasks[2].params.cancelled = &cancelled;
    assert_int_equal(search_engine_submit(engine, &out.tasks[1], &err), 0);
    assert_int_equal(search_engine_submit(engine, &out.tasks[2], &err), 0);
    sem_post(&blocker.release);
    sem_wait(&hook.arrived); /* the first query's first read */
    usleep(50000);
    __atomic_store_n(&cancelled, true, __ATOMIC_RELAXED);
    sem_post(&hook.permits);
    /* The second is answered although it never got to read; the first reads on. */
    sem_wait(&second_done);
    assert_int_equal(out.tasks[2].error.code, by_deadline ? ERR_TIMEOUT : ERR_CANCELLED);
    assert_int_equal(out.tasks[2].hit_count, 0);
    sem_wait(&hook.arrived);
    assert_int_equal(atomic_load(&hook.calls), 2);
    assert_int_equal(sem_trywait(&first_done), -1);
    hook.held = false;
    for (uint32_t i = 0; i < 8; i++)
        sem_post(&hook.permits);
    sem_wait(&first_done);
    assert_same_answer(&out.tasks[1], &reference.tasks[1]);
    /* The slot of the one that was given up is as good as any. */
    for (uint32_t i = 1; i < out.count; i++)
        out.tasks[i].params.deadline_us = 0, out.tasks[i].params.cancelled = NULL;
    assert_int_equal(search_engine_run(engine, out.tasks, out.count, &err), 0);
    assert_same(&out, &reference);
    search_engine_close(engine);
    while (sem_trywait(&hook.permits) == 0)
        ;
    while (sem_trywait(&hook.arrived) == 0)
        ;
    outcome_free(&out);
    outcome_free(&reference);
}

static void test_a_query_cancelled_in_line_gives_up_its_turn(void **state)
{
    (void)state;
    lapse_in_line(false);
}

static void test_a_query_late_in_line_gives_up_its_turn(void **state)
{
    (void)state;
    lapse_in_line(true);
}

static void test_queries_cancelled_at_any_moment_leave_the_others_alone(void **state)
{
    static const struct shape shape = {2, 16, 2, 3, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct search_engine *engine = engine_open(&shape);
    struct error err = ERROR_INIT;
    sem_t done;

    (void)state;
    sem_init(&done, 0, 0);
    hook.delay_us = 20;
    for (unsigned round = 0; round < 20; round++) {
        struct outcome out = outcome_new(&whole_list, 2);
        bool cancelled = false;

        for (uint32_t i = 0; i < out.count; i++) {
            out.tasks[i].done = done_post;
            out.tasks[i].context = &done;
            if (i % 3 == 0)
                out.tasks[i].params.cancelled = &cancelled;
            assert_int_equal(search_engine_submit(engine, &out.tasks[i], &err), 0);
        }
        usleep(round * 500);
        __atomic_store_n(&cancelled, true, __ATOMIC_RELAXED);
        for (uint32_t i = 0; i < out.count; i++)
            sem_wait(&done);
        for (uint32_t i = 0; i < out.count; i++) {
            if (i % 3 == 0 && out.tasks[i].error.code)
                assert_int_equal(out.tasks[i].error.code, ERR_CANCELLED);
            else
                assert_same_answer(&out.tasks[i], &reference.tasks[i % reference.count]);
        }
        outcome_free(&out);
    }
    search_engine_close(engine);
    outcome_free(&reference);
}

/* ---- submitting ---- */

struct chain {
    struct search_engine *engine;
    struct search_task task;
    struct search_hit hits[K];
    const struct outcome *reference;
    uint32_t query;
    uint32_t left;
    uint32_t wrong;
    sem_t *ended;
};

static void chain_next(struct search_task *task)
{
    struct chain *chain = task->context;
    struct error err = ERROR_INIT;

    if (task->error.code ||
        memcmp(task->hits, chain->reference->tasks[chain->query].hits, sizeof chain->hits) != 0)
        chain->wrong++;
    if (--chain->left == 0) {
        sem_post(chain->ended);
        return;
    }
    chain->query = (chain->query + 7) % small.query_count;
    task->query = small.queries + (size_t)chain->query * DIM;
    if (search_engine_submit(chain->engine, task, &err) < 0) {
        chain->wrong++;
        sem_post(chain->ended);
    }
}

static void chains(const struct shape *shape, uint32_t count, const struct outcome *reference)
{
    struct search_engine *engine = engine_open(shape);
    struct chain *list = calloc(count, sizeof *list);
    struct error err = ERROR_INIT;
    sem_t ended;

    sem_init(&ended, 0, 0);
    for (uint32_t i = 0; i < count; i++) {
        struct chain *c = &list[i];

        *c = (struct chain){.engine = engine,
                            .reference = reference,
                            .query = i % small.query_count,
                            .left = 100,
                            .ended = &ended};
        c->task = (struct search_task){.index = disk,
                                       .query = small.queries + (size_t)c->query * DIM,
                                       .params = {.k = K, .rule = whole_list, .beam_width = 2},
                                       .hits = c->hits,
                                       .done = chain_next,
                                       .context = c};
        assert_int_equal(search_engine_submit(engine, &c->task, &err), 0);
    }
    for (uint32_t i = 0; i < count; i++)
        sem_wait(&ended);
    for (uint32_t i = 0; i < count; i++)
        assert_int_equal(list[i].wrong, 0);
    search_engine_close(engine);
    free(list);
}

static void test_done_may_submit_the_next_task(void **state)
{
    static const struct shape shapes[] = {
        {1, 1, 2, 2, READER_PREAD}, {1, 4, 2, 3, READER_PREAD}, {4, 4, 2, 32, READER_PREAD}};

    (void)state;
    for (int resident = 0; resident < 2; resident++) {
        index_open(resident ? 64u << 20 : 0);
        struct outcome reference = run_alone(&plain, &whole_list);

        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            chains(&shapes[s], 1, &reference);
            chains(&shapes[s], 24, &reference); /* more than there are slots, at times */
        }
        outcome_free(&reference);
    }
}

struct caller {
    pthread_t thread;
    struct search_engine *engine;
    const struct outcome *reference;
    uint32_t wrong;
};

static void *call(void *context)
{
    struct caller *caller = context;
    struct error err = ERROR_INIT;

    for (uint32_t round = 0; round < 20; round++) {
        struct outcome out = outcome_new(&whole_list, 1);
        uint32_t count = round % 3 ? 1 + round : out.count;

        if (search_engine_run(caller->engine, out.tasks, count, &err) < 0)
            caller->wrong++;
        for (uint32_t i = 0; i < count; i++)
            if (out.tasks[i].error.code ||
                memcmp(out.tasks[i].hits, caller->reference->tasks[i].hits, K * sizeof *out.hits) !=
                    0)
                caller->wrong++;
        outcome_free(&out);
    }
    return NULL;
}

static void test_single_and_batch_callers_share_the_engine(void **state)
{
    static const struct shape shape = {3, 4, 2, 12, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct search_engine *engine = engine_open(&shape);
    struct caller callers[6];

    (void)state;
    for (size_t i = 0; i < 6; i++) {
        callers[i] = (struct caller){.engine = engine, .reference = &reference};
        assert_int_equal(pthread_create(&callers[i].thread, NULL, call, &callers[i]), 0);
    }
    for (size_t i = 0; i < 6; i++) {
        pthread_join(callers[i].thread, NULL);
        assert_int_equal(callers[i].wrong, 0);
    }
    search_engine_close(engine);
    outcome_free(&reference);
}

static void test_closing_answers_what_is_queued(void **state)
{
    static const struct shape shape = {2, 2, 2, 4, READER_PREAD};
    struct outcome reference = run_alone(&plain, &whole_list);
    struct outcome out = outcome_new(&whole_list, 1);
    struct search_engine *engine = engine_open(&shape);
    struct error err = ERROR_INIT;
    sem_t done;

    (void)state;
    sem_init(&done, 0, 0);
    for (uint32_t i = 0; i < out.count; i++) {
        out.tasks[i].done = done_post;
        out.tasks[i].context = &done;
        assert_int_equal(search_engine_submit(engine, &out.tasks[i], &err), 0);
    }
    search_engine_close(engine);
    for (uint32_t i = 0; i < out.count; i++)
        assert_int_equal(sem_trywait(&done), 0);
    assert_same(&out, &reference);
    outcome_free(&out);
    outcome_free(&reference);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_a_query_has_one_answer_whatever_runs_beside_it, setup),
        cmocka_unit_test_setup(test_never_more_reads_are_in_flight_than_granted, setup),
        cmocka_unit_test_setup(test_a_bad_page_fails_only_the_queries_that_need_it, setup),
        cmocka_unit_test_setup(test_one_failed_read_fails_one_query, setup),
        cmocka_unit_test_setup(test_a_task_beyond_the_limits_is_answered_alone, setup),
        cmocka_unit_test_setup(test_tasks_that_lapse_in_the_queue_are_answered_without_running,
                               setup),
        cmocka_unit_test_setup(test_a_query_cancelled_in_line_gives_up_its_turn, setup),
        cmocka_unit_test_setup(test_a_query_late_in_line_gives_up_its_turn, setup),
        cmocka_unit_test_setup(test_queries_cancelled_at_any_moment_leave_the_others_alone, setup),
        cmocka_unit_test_setup(test_done_may_submit_the_next_task, setup),
        cmocka_unit_test_setup(test_single_and_batch_callers_share_the_engine, setup),
        cmocka_unit_test_setup(test_closing_answers_what_is_queued, setup),
    };

    return cmocka_run_group_tests_name("search_engine", tests, group_setup, group_teardown);
}
