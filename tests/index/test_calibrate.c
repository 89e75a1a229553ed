/* Checks index/calibrate.c: the rules it measured reach on fresh queries what they promise; what it
 * says a rule reached and read is what the rule itself reaches and reads; the pool, the budgets,
 * hidden rows and failing reads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/calibrate.h"
#include "index/disk_search.h"
#include "index/flat.h"
#include "tests/support/small_index.h"
#include "tests/support/vfs_fault.h"

#define ROWS 8000u
#define DIM 32u
#define CODE_BYTES 6u /* coarse, so that the rule matters */
#define QUERIES 2000u
#define HALF (QUERIES / 2)
#define K 10u
#define WIDE 100u
#define WIDE_K 100u
#define UNLIMITED 0u

static struct small_index small;
static struct segment *segment;
static uint32_t *truth;      /* QUERIES x K positions */
static uint32_t *wide_truth; /* WIDE x WIDE_K */

static void check(int rc, const struct error *err)
{
    if (rc < 0)
        fail_msg("%s", err->message);
}

static struct disk_index *open_index(uint64_t pages)
{
    struct disk_index *index;
    struct error err = ERROR_INIT;
    uint64_t bytes;

    check(disk_index_memory_min(segment, 0, &bytes, &err), &err);
    if (pages) {
        check(disk_index_open(segment, 0, 0, &index, &err), &err);
        bytes += pages * index->format.page_bytes;
        disk_index_close(index);
    }
    check(disk_index_open(segment, 0, bytes, &index, &err), &err);
    assert_int_equal(index->resident_page_count, pages);
    return index;
}

/* A stored row's key is its row number; the truth names rows, the calibration wants positions. */
static int make_index(void **state)
{
    struct small_options options = small_options_default(ROWS, DIM);
    uint32_t *positions = malloc(ROWS * sizeof *positions);
    uint32_t *position_of = malloc(ROWS * sizeof *position_of);
    int64_t *keys = malloc(ROWS * sizeof *keys);
    struct vector_source *source;
    struct truth wide;
    struct error err = ERROR_INIT;
    struct reader *reader;
    struct disk_index *index;

    (void)state;
    options.queries = QUERIES;
    options.params.code_bytes = CODE_BYTES;
    options.workers = 4;
    small_index_make(&options, &small);
    check(segment_open(vfs_posix(), small.segment, &segment, &err), &err);
    index = open_index(0);
    for (uint32_t i = 0; i < ROWS; i++)
        positions[i] = i;
    check(reader_open(READER_AUTO, 32, &reader, &err), &err);
    check(disk_index_keys(index, reader, positions, ROWS, keys, &err), &err);
    for (uint32_t i = 0; i < ROWS; i++)
        position_of[keys[i]] = i;
    truth = malloc((size_t)QUERIES * K * sizeof *truth);
    for (uint32_t i = 0; i < QUERIES * K; i++)
        truth[i] = position_of[small.truth.ids[i]];
    check(vector_source_open_memory(small.rows, ELEMENT_F32, ROWS, DIM, "rows", &source, &err),
          &err);
    check(flat_truth(source, small.queries, WIDE, WIDE_K, METRIC_L2, NULL, NULL, &wide, &err),
          &err);
    wide_truth = malloc((size_t)WIDE * WIDE_K * sizeof *wide_truth);
    for (uint32_t i = 0; i < WIDE * WIDE_K; i++)
        wide_truth[i] = position_of[wide.ids[i]];
    truth_release(&wide);
    vector_source_close(source);
    reader_close(reader);
    disk_index_close(index);
    free(positions);
    free(position_of);
    free(keys);
    return 0;
}

static int remove_index(void **state)
{
    (void)state;
    segment_close(segment);
    small_index_remove(&small);
    free(truth);
    free(wide_truth);
    return 0;
}

static struct calibrate_queries queries_of(uint32_t first, uint32_t count)
{
    return (struct calibrate_queries){.vectors = small.queries + (size_t)first * DIM,
                                      .count = count,
                                      .truth = truth + (size_t)first * K,
                                      .truth_k = K};
}

static void calibrate(const struct calibrate_queries *queries, uint64_t serve_bytes,
                      uint64_t bytes_max, uint32_t workers, struct walk_calibration *out)
{
    struct error err = ERROR_INIT;
    struct pool *pool = NULL;

    if (workers)
        check(pool_new(workers, &pool, &err), &err);
    check(calibrate_field(segment, 0, queries, serve_bytes, bytes_max, pool, NULL, out, &err),
          &err);
    pool_free(pool);
}

/* Replaying rules takes minutes under ThreadSanitizer and shows no threads that the others lack. */
#if defined(__SANITIZE_THREAD__)
#define SKIP_REPLAYS true
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SKIP_REPLAYS true
#endif
#endif
#ifndef SKIP_REPLAYS
#define SKIP_REPLAYS false
#endif

struct outcome {
    uint64_t hits;
    uint64_t reads; /* 4 KiB units */
};

struct replay {
    const struct disk_index *index;
    const struct calibrate_queries *queries;
    struct search_params params;
    uint32_t beam;
    _Atomic uint64_t hits;
    _Atomic uint64_t reads;
    _Atomic uint32_t failures; /* a test may not fail on a pool's thread */
};

static int walk(struct replay *replay, struct disk_search *search, struct reader *reader,
                uint64_t query, struct error *err)
{
    const struct calibrate_queries *queries = replay->queries;
    const uint32_t *wanted = queries->truth + query * queries->truth_k;
    uint32_t k = replay->params.k, count;
    struct reader_read *reads[DISK_SEARCH_BEAM_MAX];
    struct search_hit hits[WIDE_K];

    if (disk_search_begin(search, replay->index, queries->vectors + query * DIM, &replay->params,
                          err) < 0)
        return -1;
    while (!disk_search_done(search)) {
        count = disk_search_wanted(search, reads, replay->beam);
        if (count && reader_submit(reader, reads, count, err) < 0)
            return -1;
        count = reader_wait(reader, reads, replay->beam, true);
        for (uint32_t i = 0; i < count; i++)
            if (disk_search_arrived(search, reads[i], err) < 0)
                return -1;
    }
    if (disk_search_error(search, err) < 0)
        return -1;
    replay->reads += disk_search_stats(search)->reads;
    count = disk_search_hits(search, hits, k);
    for (uint32_t h = 0; h < count; h++)
        for (uint32_t t = 0; t < k; t++)
            replay->hits += hits[h].position == wanted[t];
    return 0;
}

static void replay_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct replay *replay = context;
    struct disk_search_limits limits = {.search_list_max = replay->params.rule.search_list,
                                        .cells_max = replay->params.rule.cells,
                                        .k_max = replay->params.k,
                                        .beam_width = replay->beam};
    struct error err = ERROR_INIT;
    struct walk_scratch *scratch = NULL;
    struct disk_search *search = NULL;
    struct reader *reader = NULL;
    int rc;

    (void)worker;
    disk_search_limits_raise(&limits, replay->index);
    rc = walk_scratch_new(&limits, &scratch, &err);
    if (rc == 0)
        rc = disk_search_new(&limits, scratch, &search, &err);
    if (rc == 0)
        rc = reader_open(READER_AUTO, replay->beam, &reader, &err);
    for (uint64_t q = begin; rc == 0 && q < end; q++)
        rc = walk(replay, search, reader, q, &err);
    if (rc < 0) {
        fprintf(stderr, "%s\n", err.message);
        replay->failures++;
    }
    reader_close(reader);
    disk_search_free(search);
    walk_scratch_free(scratch);
}

/* Runs the rule itself on every query. */
static struct outcome run_rule(const struct disk_index *index,
                               const struct calibrate_queries *queries,
                               const struct walk_rule *rule, uint32_t k, uint32_t beam)
{
    struct replay replay = {
        .index = index, .queries = queries, .params = {.k = k, .rule = *rule}, .beam = beam};
    struct error err = ERROR_INIT;
    struct pool *pool;

    check(pool_new(4, &pool, &err), &err);
    pool_for(pool, queries->count, 64, replay_range, &replay);
    pool_free(pool);
    assert_int_equal(replay.failures, 0);
    return (struct outcome){replay.hits, replay.reads};
}

static void test_every_target_is_reached_on_fresh_queries(void **state)
{
    struct calibrate_queries known = queries_of(0, HALF), fresh = queries_of(HALF, HALF);
    struct disk_index *index;
    struct walk_calibration calibration;
    uint32_t reached = 0;

    (void)state;
    if (SKIP_REPLAYS)
        skip();
    index = open_index(0);
    calibrate(&known, 0, 1, 4, &calibration);
    assert_int_equal(calibration.query_count, HALF);
    assert_true(calibration.own_queries);
    for (uint32_t c = 0; c < calibration.curve_count; c++) {
        const struct walk_curve *curve = &calibration.curves[c];

        for (uint32_t p = 0; p < curve->point_count; p++) {
            double target = (double)curve->points[p].recall;
            struct walk_rule rule;
            float reads;

            if (curve->points[p].reached < curve->points[p].recall)
                continue;
            reached++;
            walk_rule_for_recall(&calibration, target, curve->k, 0, &rule, &reads);
            /* More reads in flight: the same rule, a few reads more. */
            for (uint32_t beam = 1; beam <= (p % 4 == 2 ? 4 : 1); beam += 3) {
                struct outcome out = run_rule(index, &fresh, &rule, curve->k, beam);
                double recall = (double)out.hits / HALF / curve->k;

                if (recall < target - 0.01)
                    fail_msg("k %u, beam %u: recall %.4f for a target of %.3f", curve->k, beam,
                             recall, target);
                if (beam == 1 && fabs((double)out.reads / HALF / (double)reads - 1) > 0.1)
                    fail_msg("k %u, target %.3f: %.2f reads, expected %.2f", curve->k, target,
                             (double)out.reads / HALF, (double)reads);
            }
        }
        assert_true(curve->points[0].reads * 1.3f < curve->points[curve->point_count - 1].reads);
    }
    if (reached < 18)
        fail_msg("only %u of the targets could be reached", reached);
    disk_index_close(index);
}

static void promises_are_kept(const struct calibrate_queries *known, uint32_t curves)
{
    struct walk_calibration calibration;

    calibrate(known, 0, UNLIMITED, 4, &calibration);
    assert_int_equal(calibration.curve_count, curves);
    for (uint32_t c = 0; c < curves; c++) {
        const struct walk_curve *curve = &calibration.curves[c];
        struct disk_index *index = open_index(0);
        uint64_t pages =
            (uint64_t)round((double)curve->resident_share * (double)index->format.page_count);

        disk_index_close(index);
        index = open_index(pages);
        for (uint32_t p = 0; p < curve->point_count; p++) {
            const struct walk_point *point = &curve->points[p];
            struct outcome out;

            if (p > 0 && !memcmp(&point->rule, &point[-1].rule, sizeof point->rule))
                continue;
            out = run_rule(index, known, &point->rule, curve->k, 1);
            if ((float)((double)out.hits / known->count / curve->k) != point->reached ||
                (float)((double)out.reads / known->count) != point->reads)
                fail_msg("k %u, share %.2f, target %.3f: %.4f with %.3f reads, promised %.4f, %.3f",
                         curve->k, (double)curve->resident_share, (double)point->recall,
                         (double)out.hits / known->count / curve->k,
                         (double)out.reads / known->count, (double)point->reached,
                         (double)point->reads);
        }
        disk_index_close(index);
    }
}

/* What a rule would have answered was looked up, not run: it must be the same. */
static void test_the_promise_of_a_rule_is_what_the_rule_does(void **state)
{
    struct calibrate_queries known = queries_of(0, 100);

    (void)state;
    if (SKIP_REPLAYS)
        skip();
    promises_are_kept(&known, 6);
    known.count = WIDE;
    known.truth = wide_truth;
    known.truth_k = WIDE_K;
    promises_are_kept(&known, 9);
}

static void test_one_worker_and_four_measure_the_same(void **state)
{
    struct calibrate_queries known = queries_of(0, 200);
    struct walk_calibration one, four, none;
    uint8_t *bytes[2];
    size_t counts[2];

    (void)state;
    calibrate(&known, 0, UNLIMITED, 1, &one);
    calibrate(&known, 0, UNLIMITED, 4, &four);
    calibrate(&known, 0, UNLIMITED, 0, &none); /* no pool at all */
    assert_int_equal(walk_calibration_encode(&one, &bytes[0], &counts[0], NULL), 0);
    assert_int_equal(walk_calibration_encode(&four, &bytes[1], &counts[1], NULL), 0);
    assert_int_equal(counts[0], counts[1]);
    assert_memory_equal(bytes[0], bytes[1], counts[0]);
    assert_memory_equal(&one, &none, sizeof one);
    free(bytes[0]);
    free(bytes[1]);
}

/* Without a limit pages that were read are kept, with the least one none are. */
static void test_pages_kept_in_memory_change_no_result(void **state)
{
    struct calibrate_queries known = queries_of(0, 200);
    struct walk_calibration kept, read_again;

    (void)state;
    calibrate(&known, 0, UNLIMITED, 4, &kept);
    calibrate(&known, 0, 1, 4, &read_again);
    assert_int_equal(kept.curve_count, 6);
    assert_int_equal(read_again.curve_count, 2);
    for (uint32_t c = 0; c < 2; c++)
        assert_memory_equal(&kept.curves[3 * c], &read_again.curves[c], sizeof kept.curves[0]);
}

static void test_an_even_part_of_the_queries_measures_shares_that_are_not_served(void **state)
{
    const uint32_t part = 300; /* at k of 1 */
    struct calibrate_queries all = queries_of(0, HALF), some = {.count = part, .truth_k = K};
    float *vectors = malloc((size_t)part * DIM * sizeof *vectors);
    uint32_t *nearest = malloc((size_t)part * K * sizeof *nearest);
    struct walk_calibration of_all, of_some;

    (void)state;
    for (uint32_t i = 0; i < part; i++) {
        size_t q = (size_t)i * HALF / part;

        memcpy(vectors + (size_t)i * DIM, all.vectors + q * DIM, DIM * sizeof *vectors);
        memcpy(nearest + (size_t)i * K, all.truth + q * K, K * sizeof *nearest);
    }
    some.vectors = vectors;
    some.truth = nearest;
    calibrate(&all, 0, UNLIMITED, 4, &of_all);
    calibrate(&some, 0, UNLIMITED, 4, &of_some);
    assert_int_equal(of_all.curve_count, 6); /* k of 1 and 10; none, half, all */
    assert_memory_equal(&of_all.curves[1], &of_some.curves[1], sizeof of_all.curves[1]);
    assert_memory_not_equal(&of_all.curves[0], &of_some.curves[0], sizeof of_all.curves[0]);
    free(vectors);
    free(nearest);
}

static void shares_are(uint64_t serve_pages, uint64_t max_pages, const double *shares,
                       uint32_t count)
{
    struct calibrate_queries known = queries_of(0, 20);
    struct disk_index *index = open_index(0);
    uint64_t needed = index->memory_bytes, page_bytes = index->format.page_bytes;
    uint64_t calibrated = index->calibration ? 0 : sizeof *index->calibration;
    double page_count = (double)index->format.page_count;
    struct walk_calibration calibration;

    disk_index_close(index);
    calibrate(&known, serve_pages ? needed + calibrated + serve_pages * page_bytes : 0,
              max_pages ? needed + max_pages * page_bytes : 1, 2, &calibration);
    assert_int_equal(calibration.curve_count, 2 * count); /* k of 1 and 10 */
    for (uint32_t c = 0; c < calibration.curve_count; c++) {
        assert_int_equal(calibration.curves[c].k, c < count ? 1 : 10);
        assert_true(fabs((double)calibration.curves[c].resident_share - shares[c % count]) <=
                    0.51 / page_count);
    }
}

static void test_shares_are_those_that_are_served_and_may_be_held(void **state)
{
    struct disk_index *index = open_index(0);
    uint64_t all = index->format.page_count;
    double tenth = (double)(all / 10) / (double)all;

    (void)state;
    disk_index_close(index);
    shares_are(0, 0, (double[]){0}, 1);
    shares_are(0, all / 2, (double[]){0, 0.5}, 2);
    shares_are(0, all, (double[]){0, 0.5, 1}, 3);
    shares_are(all / 10, all, (double[]){0, tenth, 0.5, 1}, 4);
    shares_are(all / 10, all / 4, (double[]){0, tenth}, 2);
    shares_are(all / 10, all / 20, (double[]){0}, 1);
    shares_are(all - all / 10, all, (double[]){0, 0.5, 1 - tenth, 1}, 4);
    shares_are(all / 2, all, (double[]){0, 0.5, 1}, 3);
    shares_are(2 * all, all, (double[]){0, 0.5, 1}, 3);
}

static void test_more_pages_in_memory_mean_fewer_reads(void **state)
{
    struct calibrate_queries known = queries_of(0, 200);
    struct walk_calibration calibration;

    (void)state;
    calibrate(&known, 0, UNLIMITED, 4, &calibration);
    for (uint32_t k = 0; k < 2; k++) {
        const struct walk_curve *curve = &calibration.curves[3 * k];

        for (uint32_t p = 0; p < curve->point_count; p++) {
            assert_true(curve[1].points[p].reads < curve[0].points[p].reads);
            assert_true(curve[2].points[p].reads == 0);
            /* Of rules that cost nothing the strictest: should fewer pages be held after all. */
            assert_in_range(curve[2].points[p].rule.patience, 10, 32);
        }
    }
}

static void test_a_row_that_serves_as_query_is_not_its_own_answer(void **state)
{
    uint32_t rows[100];
    float *vectors = malloc(sizeof rows / sizeof rows[0] * DIM * sizeof *vectors);
    struct calibrate_queries queries = {
        .vectors = vectors, .count = 100, .truth = rows, .truth_k = 1};
    struct error err = ERROR_INIT;
    struct disk_index *index = open_index(0);
    struct walk_calibration calibration;
    struct reader *reader;

    (void)state;
    for (uint32_t i = 0; i < 100; i++)
        rows[i] = i * 71;
    check(reader_open(READER_AUTO, 32, &reader, &err), &err);
    check(disk_index_vectors(index, reader, rows, 100, vectors, &err), &err);
    calibrate(&queries, 0, 1, 4, &calibration);
    assert_int_equal(calibration.curve_count, 1);
    assert_true(calibration.own_queries);
    assert_true(calibration.curves[0].points[11].reached > 0.98f);
    queries.hidden = rows;
    calibrate(&queries, 0, 1, 4, &calibration);
    assert_false(calibration.own_queries);
    for (uint32_t p = 0; p < calibration.curves[0].point_count; p++) {
        const struct walk_point *point = &calibration.curves[0].points[p];

        /* None is reached: all get the strictest rule, and say so. */
        assert_true(point->reached == 0);
        assert_in_range(point->rule.patience, 10, 32);
        assert_true(point->rule.gain < 1e-5f);
    }
    reader_close(reader);
    disk_index_close(index);
    free(vectors);
}

static void test_what_cannot_be_measured_is_refused(void **state)
{
    struct calibrate_queries queries = queries_of(0, 0);
    struct walk_calibration calibration;
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);

    (void)state;
    assert_int_equal(calibrate_field(segment, 0, &queries, 0, 0, NULL, NULL, &calibration, &err),
                     -1);
    assert_int_equal(err.code, ERR_INVALID);
    queries = queries_of(0, 10);
    queries.truth_k = 0;
    error_clear(&err);
    assert_int_equal(calibrate_field(segment, 0, &queries, 0, 0, NULL, NULL, &calibration, &err),
                     -1);
    assert_int_equal(err.code, ERR_INVALID);
    queries = queries_of(0, 100);
    job_cancel(job);
    error_clear(&err);
    assert_int_equal(calibrate_field(segment, 0, &queries, 0, 0, NULL, job, &calibration, &err),
                     -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_int_equal(calibration.curve_count, 0);
    job_free(job);
}

static void test_a_failing_read_fails_the_calibration_cleanly(void **state)
{
    struct calibrate_queries queries = queries_of(0, 100);
    struct walk_calibration calibration;
    struct error err = ERROR_INIT;
    struct vfs_fault fault;
    struct segment *faulty;
    struct pool *pool;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    check(segment_open(&fault.vfs, small.segment, &faulty, &err), &err);
    check(pool_new(4, &pool, &err), &err);
    for (uint64_t nth = 1; nth < 3000; nth = nth * 3 + 1) {
        vfs_fault_plan(
            &fault, &(struct vfs_fault_plan){
                        .call = VFS_CALL_READ, .nth = nth, .for_ever = true, .errno_value = EIO});
        error_clear(&err);
        assert_int_equal(calibrate_field(faulty, 0, &queries, 0, 1, pool, NULL, &calibration, &err),
                         -1);
        assert_int_equal(err.code, ERR_IO);
    }
    /* A flipped bit anywhere in what is read. */
    vfs_fault_plan(&fault,
                   &(struct vfs_fault_plan){
                       .call = VFS_CALL_READ, .nth = 700, .effect = VFS_EFFECT_FLIP, .bit = 12345});
    error_clear(&err);
    assert_int_equal(calibrate_field(faulty, 0, &queries, 0, 1, pool, NULL, &calibration, &err),
                     -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    vfs_fault_plan(&fault, NULL);
    segment_close(faulty);
    pool_free(pool);
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
}

int main(void)
{
    char reason[256];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_target_is_reached_on_fresh_queries),
        cmocka_unit_test(test_the_promise_of_a_rule_is_what_the_rule_does),
        cmocka_unit_test(test_one_worker_and_four_measure_the_same),
        cmocka_unit_test(test_pages_kept_in_memory_change_no_result),
        cmocka_unit_test(test_an_even_part_of_the_queries_measures_shares_that_are_not_served),
        cmocka_unit_test(test_shares_are_those_that_are_served_and_may_be_held),
        cmocka_unit_test(test_more_pages_in_memory_mean_fewer_reads),
        cmocka_unit_test(test_a_row_that_serves_as_query_is_not_its_own_answer),
        cmocka_unit_test(test_what_cannot_be_measured_is_refused),
        cmocka_unit_test(test_a_failing_read_fails_the_calibration_cleanly),
    };

    reader_probe(reason); /* before there are threads */
    return cmocka_run_group_tests_name("calibrate", tests, make_index, remove_index);
}
