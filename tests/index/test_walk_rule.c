/* Checks index/walk_rule.c: a higher recall is never a laxer rule, the measured points come back as
 * they are, what lies between and beyond is as the header says, and damaged bytes are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/disk_search.h"
#include "index/walk_rule.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"

/* As in walk_rule.c. */
#define CRC_AT 12u
#define BYTES_AT 16u
#define HEADER_BYTES 64u
#define CURVE_BYTES 16u
#define POINT_BYTES 32u

static const float targets[] = {0.8f, 0.9f, 0.95f, 0.99f, 0.999f};

#define TARGETS (sizeof targets / sizeof targets[0])

/* Each curve has gains of its own, so that an answer tells which curve it came from. */
static struct walk_calibration calibration_of(const uint32_t *ks, const float *shares,
                                              uint32_t count)
{
    struct walk_calibration calibration = {
        .query_count = 1000, .own_queries = true, .curve_count = count};

    for (uint32_t c = 0; c < count; c++) {
        struct walk_curve *curve = &calibration.curves[c];

        curve->k = ks[c];
        curve->resident_share = shares[c];
        curve->point_count = TARGETS;
        for (uint32_t p = 0; p < TARGETS; p++)
            curve->points[p] = (struct walk_point){
                .recall = targets[p],
                /* The last target takes more effort than the others. */
                .rule = {.search_list = p < TARGETS - 1 ? 200 : 240,
                         .cells = p < TARGETS - 1 ? 50 : 54,
                         .patience = p < 3 ? 0 : 3 * p,
                         .gain = (float)(c + 1) * (float)ks[c] * (1 - targets[p])},
                .reached = targets[p] + 0.0005f,
                .reads = 10 + 5 * (float)p,
            };
    }
    return calibration;
}

static const uint32_t three_ks[] = {1, 10, 10, 10, 100};
static const float three_shares[] = {0, 0, 0.25f, 0.5f, 0};

static struct walk_calibration usual(void)
{
    return calibration_of(three_ks, three_shares, 5);
}

static void test_a_measured_point_comes_back_as_it_was_measured(void **state)
{
    struct walk_calibration calibration = usual();

    (void)state;
    for (uint32_t p = 0; p < TARGETS; p++) {
        const struct walk_point *point = &calibration.curves[1].points[p];
        char text[32];
        struct walk_rule rule;
        float reads = -1;

        /* As a user writes it: a double that is not the float. */
        snprintf(text, sizeof text, "%g", (double)targets[p]);
        walk_rule_for_recall(&calibration, strtod(text, NULL), 10, 0, &rule, &reads);
        assert_int_equal(rule.search_list, point->rule.search_list);
        assert_int_equal(rule.cells, point->rule.cells);
        assert_int_equal(rule.patience, point->rule.patience);
        assert_true(fabsf(rule.gain - point->rule.gain) <= 1e-4f * point->rule.gain);
        assert_true(reads == point->reads);
    }
}

static void test_rules_between_two_targets_lie_between_and_whole_numbers_go_up(void **state)
{
    struct walk_calibration calibration = usual();
    const struct walk_point *low = &calibration.curves[1].points[2], *high = low + 1;
    struct walk_rule rule;
    float reads;

    (void)state;
    walk_rule_for_recall(&calibration, 0.9500001, 10, 0, &rule, &reads);
    assert_int_equal(rule.patience, 1); /* of 0 and 9 */
    assert_int_equal(rule.search_list, low->rule.search_list);
    /* Half way by log(1 - recall): the geometric mean of the gains. */
    walk_rule_for_recall(&calibration, 1 - sqrt(0.05 * 0.01), 10, 0, &rule, &reads);
    assert_true(fabs(rule.gain - sqrt((double)low->rule.gain * high->rule.gain)) < 1e-4);
    assert_int_equal(rule.patience, 5);
    assert_true(fabsf(reads - (low->reads + high->reads) / 2) < 0.01f);
    /* Between two efforts nothing was measured: the greater is taken whole. */
    walk_rule_for_recall(&calibration, 0.9901, 10, 0, &rule, &reads);
    assert_memory_equal(&rule, &high[1].rule, sizeof rule);
    assert_true(reads == high[1].reads);
    /* A gain of zero has no logarithm: the stricter end is taken. */
    calibration.curves[1].points[3].rule.gain = 0;
    calibration.curves[1].points[4].rule.gain = 0;
    walk_rule_for_recall(&calibration, 0.96, 10, 0, &rule, NULL);
    assert_true(rule.gain == 0);
}

static void test_below_and_beyond_the_targets(void **state)
{
    struct walk_calibration calibration = usual();
    const struct walk_point *first = &calibration.curves[1].points[0],
                            *last = &calibration.curves[1].points[TARGETS - 1];
    struct walk_rule rule;
    float reads;

    (void)state;
    walk_rule_for_recall(&calibration, 0.1, 10, 0, &rule, &reads);
    assert_memory_equal(&rule, &first->rule, sizeof rule);
    assert_true(reads == first->reads);
    walk_rule_for_recall(&calibration, NAN, 10, 0, &rule, NULL);
    assert_memory_equal(&rule, &first->rule, sizeof rule);
    walk_rule_for_recall(&calibration, 0.9999, 10, 0, &rule, &reads);
    assert_true(fabsf(rule.gain - last->rule.gain / 10) < 1e-3f * last->rule.gain);
    assert_int_equal(rule.patience, last->rule.patience);
    assert_true(reads == 0);
    walk_rule_for_recall(&calibration, 1, 10, 0, &rule, NULL);
    assert_true(rule.gain == 0);
}

static void test_the_nearest_k_and_the_share_not_above_are_taken(void **state)
{
    struct walk_calibration calibration = usual();
    struct walk_rule rule;
    float reads;
    static const struct {
        uint32_t k;
        double share;
        uint32_t curve;
    } cases[] = {
        {1, 0, 0},    {3, 0, 0},     {4, 0, 1},      {10, 0, 1},    {31, 0, 1},
        {32, 0, 4},   {1000, 0, 4},  {10, 0.1, 1},   {10, 0.24, 1}, {10, 0.25, 2},
        {10, 0.3, 2}, {10, 0.49, 2}, {10, 0.5, 3},   {10, 1, 3},    {20, 1, 3},
        {1, 1, 0},    {100, 0.5, 4}, {10, 0.248, 2}, /* a page less in memory than was measured */
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct walk_curve *curve = &calibration.curves[cases[i].curve];
        float wanted = curve->points[1].rule.gain * (float)cases[i].k / (float)curve->k;

        walk_rule_for_recall(&calibration, 0.9, cases[i].k, cases[i].share, &rule, &reads);
        if (fabsf(rule.gain - wanted) > 1e-4f * wanted)
            fail_msg("k %u at a share of %g: another curve than %u", cases[i].k, cases[i].share,
                     cases[i].curve);
        assert_true(rule.search_list >= cases[i].k);
        assert_true(cases[i].k == curve->k ? reads == curve->points[1].reads : reads == 0);
    }
    walk_rule_for_recall(&calibration, 0.9, 1000, 0, &rule, NULL);
    assert_int_equal(rule.search_list, 2000);
    walk_rule_for_recall(&calibration, 0.9, SEARCH_LIST_MAX, 0, &rule, NULL);
    assert_int_equal(rule.search_list, SEARCH_LIST_MAX);
    /* Only shares above the given one: the least of them. */
    for (uint32_t c = 1; c < 4; c++)
        calibration.curves[c].resident_share += 0.2f;
    walk_rule_for_recall(&calibration, 0.9, 10, 0, &rule, NULL);
    assert_true(rule.gain == calibration.curves[1].points[1].rule.gain);
}

static void must_be_stricter(const struct walk_rule *rule, const struct walk_rule *before,
                             double recall)
{
    if (rule->gain > before->gain || rule->patience < before->patience ||
        rule->search_list < before->search_list || rule->cells < before->cells)
        fail_msg("recall %.9f: laxer than just below it", recall);
}

static void test_a_higher_recall_never_gets_a_laxer_rule(void **state)
{
    struct walk_calibration calibration;
    struct random random;

    (void)state;
    random_init(&random, 7, 0);
    for (uint32_t round = 0; round < 60; round++) {
        const struct walk_calibration *given = round == 0 ? NULL : &calibration;
        struct walk_rule before, rule;

        calibration = (struct walk_calibration){.curve_count = 1};
        struct walk_curve *curve = &calibration.curves[0];
        struct walk_point point = {.recall = 0.05f + 0.5f * random_float(&random),
                                   .rule = {.search_list = 1 + (uint32_t)random_below(&random, 300),
                                            .cells = (uint32_t)random_below(&random, 200),
                                            .gain = 20 * random_float(&random)}};

        curve->k = 1 + (uint32_t)random_below(&random, 200);
        curve->point_count = 1 + (uint32_t)random_below(&random, WALK_POINTS_MAX);
        for (uint32_t p = 0; p < curve->point_count; p++) {
            curve->points[p] = point;
            point.recall += (1 - point.recall) * (0.01f + 0.5f * random_float(&random));
            if (random_below(&random, 3) == 0) { /* more effort */
                point.rule.search_list += (uint32_t)random_below(&random, 50);
                point.rule.cells += (uint32_t)random_below(&random, 3);
            }
            point.rule.patience += (uint32_t)random_below(&random, 4);
            if (random_below(&random, 3))
                point.rule.gain *= random_float(&random);
            if (random_below(&random, 30) == 0)
                point.rule.gain = 0;
        }
        walk_rule_for_recall(given, 1e-6, 10, 0, &before, NULL);
        for (uint32_t i = 1; i < 2000; i++) {
            double recall = i < 1000 ? i / 1000.0 : 1 - pow(0.99, i - 1000) / 1000;

            walk_rule_for_recall(given, recall, 10, 0, &rule, NULL);
            must_be_stricter(&rule, &before, recall);
            before = rule;
        }
    }
}

static void test_without_a_calibration_a_cautious_rule_is_given(void **state)
{
    struct walk_calibration none = {0};
    struct walk_rule rule, same;
    float reads = 1;

    (void)state;
    walk_rule_for_recall(NULL, 0.97, 10, 0, &rule, &reads);
    assert_true(reads == 0);
    assert_int_equal(rule.search_list, 100);
    assert_int_equal(rule.cells, 100);
    assert_int_equal(rule.patience, 4);
    assert_true(fabsf(rule.gain - 0.1f) < 1e-5f);
    walk_rule_for_recall(&none, 0.97, 10, 0, &same, NULL);
    assert_memory_equal(&rule, &same, sizeof rule);
    walk_rule_for_recall(NULL, 0.9, 100, 0, &rule, NULL);
    assert_int_equal(rule.search_list, 400);
    walk_rule_for_recall(NULL, 0.9, 10000, 0, &rule, NULL);
    assert_int_equal(rule.search_list, SEARCH_LIST_MAX);
}

static void test_an_explicit_list_is_read_whole(void **state)
{
    struct walk_calibration calibration = usual();
    struct walk_rule rule;

    (void)state;
    walk_rule_for_list(&calibration, 50, 10, &rule);
    assert_int_equal(rule.search_list, 50);
    assert_int_equal(rule.cells, 50);
    assert_int_equal(rule.patience, 0);
    assert_true(rule.gain == 0);
    walk_rule_for_list(NULL, 1, 10, &rule);
    assert_int_equal(rule.search_list, 10);
    assert_int_equal(rule.cells, 16);
    walk_rule_for_list(NULL, 3000, 10, &rule);
    assert_int_equal(rule.search_list, 3000);
    assert_int_equal(rule.cells, 100);
}

static int decode_code(const uint8_t *data, size_t bytes)
{
    struct walk_calibration out;
    struct error err = ERROR_INIT;
    int rc = walk_calibration_decode(data, bytes, "here", &out, &err);

    assert_int_equal(rc < 0, err.code != ERR_NONE);
    if (rc < 0)
        assert_non_null(strstr(err.message, "here"));
    return (int)err.code;
}

static void test_a_calibration_comes_back_as_it_was_written(void **state)
{
    struct walk_calibration calibration = usual(), none = {0}, back;
    struct error err = ERROR_INIT;
    uint8_t *data, *again;
    size_t bytes, again_bytes;

    (void)state;
    assert_int_equal(walk_calibration_encode(&calibration, &data, &bytes, &err), 0);
    assert_int_equal(walk_calibration_decode(data, bytes, "here", &back, &err), 0);
    assert_memory_equal(&back, &calibration, sizeof back);
    assert_int_equal(walk_calibration_encode(&back, &again, &again_bytes, &err), 0);
    assert_int_equal(bytes, again_bytes);
    assert_memory_equal(data, again, bytes);
    free(data);
    free(again);
    assert_int_equal(walk_calibration_encode(&none, &data, &bytes, &err), 0);
    assert_int_equal(walk_calibration_decode(data, bytes, "here", &back, &err), 0);
    assert_int_equal(back.curve_count, 0);
    free(data);
}

static void test_every_flipped_bit_and_every_cut_is_found(void **state)
{
    struct walk_calibration calibration = usual();
    uint8_t *data;
    size_t bytes;

    (void)state;
    assert_int_equal(walk_calibration_encode(&calibration, &data, &bytes, NULL), 0);
    assert_int_equal(decode_code(data, bytes), ERR_NONE);
    for (size_t i = 0; i < 8 * bytes; i++) {
        data[i / 8] ^= (uint8_t)(1u << i % 8);
        assert_int_not_equal(decode_code(data, bytes), ERR_NONE);
        data[i / 8] ^= (uint8_t)(1u << i % 8);
    }
    for (size_t cut = 0; cut < bytes; cut++) {
        uint8_t *part = malloc(cut ? cut : 1);

        memcpy(part, data, cut);
        assert_int_equal(decode_code(part, cut), ERR_CORRUPT);
        free(part);
    }
    free(data);
}

/* The bytes with a right length and checksum and one u32 changed. */
static int code_with(const uint8_t *data, size_t bytes, size_t keep, size_t at, uint32_t value)
{
    uint8_t *copy = malloc(bytes);
    int code;

    memcpy(copy, data, bytes);
    store_u32(copy + at, value);
    store_u64(copy + BYTES_AT, keep);
    store_u32(copy + CRC_AT, 0);
    store_u32(copy + CRC_AT, crc32c(0, copy, keep));
    code = decode_code(copy, keep);
    free(copy);
    return code;
}

static uint32_t bits_of(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static void test_hostile_bytes_with_a_right_checksum_are_refused(void **state)
{
    struct walk_calibration calibration = usual();
    size_t curve = HEADER_BYTES, point = curve + CURVE_BYTES, bytes;
    uint8_t *data;
    const struct {
        size_t at;
        uint32_t value;
    } cases[] = {
        {32, WALK_CURVES_MAX + 1}, /* curves */
        {32, 6},                   /* one more than there are */
        {32, 4},                   /* one less */
        {28, 2},                   /* flags */
        {40, 1},                   /* reserved */
        {curve, 0},                /* k */
        {curve, 11},               /* out of order */
        {curve, 10},               /* twice the same */
        {curve, UINT32_MAX},
        {curve + 4, bits_of(NAN)}, /* share */
        {curve + 4, bits_of(1.5f)},
        {curve + 4, bits_of(-0.5f)},
        {curve + 8, 0}, /* points */
        {curve + 8, WALK_POINTS_MAX + 1},
        {curve + 8, UINT32_MAX},
        {curve + 12, 1}, /* reserved */
        {point, bits_of(NAN)},
        {point, bits_of(0.95f)}, /* not ascending */
        {point, bits_of(0)},
        {point + 4, 0}, /* search_list */
        {point + 4, UINT32_MAX},
        {point + 4, 1000}, /* a laxer rule after it */
        {point + 8, UINT32_MAX},
        {point + 8, 1000},
        {point + 12, UINT32_MAX},
        {point + 12, 10},
        {point + 16, bits_of(NAN)},
        {point + 16, bits_of(INFINITY)},
        {point + 16, bits_of(0)},
        {point + 16, bits_of(-1)},
        {point + 20, bits_of(NAN)},
        {point + 20, bits_of(2)},
        {point + 24, bits_of(NAN)},
        {point + 24, bits_of(-3)},
        {point + 28, 1}, /* reserved */
    };

    (void)state;
    assert_int_equal(walk_calibration_encode(&calibration, &data, &bytes, NULL), 0);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (code_with(data, bytes, bytes, cases[i].at, cases[i].value) != ERR_CORRUPT)
            fail_msg("case %zu was not refused", i);
    }
    assert_int_equal(code_with(data, bytes, bytes, 8, 2), ERR_UNSUPPORTED);
    assert_int_equal(code_with(data, bytes, bytes, 24, 77), ERR_NONE); /* a count of queries */
    for (size_t keep = HEADER_BYTES; keep < bytes; keep += 4)
        assert_int_equal(code_with(data, bytes, keep, 24, 1000), ERR_CORRUPT);
    free(data);
}

static void test_a_calibration_that_makes_no_sense_is_not_written(void **state)
{
    struct walk_calibration calibration = usual();
    struct error err = ERROR_INIT;
    uint8_t *data = NULL;
    size_t bytes;

    (void)state;
    calibration.curves[2].points[1].rule.gain = 1e6f;
    assert_int_equal(walk_calibration_encode(&calibration, &data, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_INTERNAL);
    assert_null(data);
    calibration.curve_count = WALK_CURVES_MAX + 1;
    assert_int_equal(walk_calibration_encode(&calibration, &data, &bytes, NULL), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_measured_point_comes_back_as_it_was_measured),
        cmocka_unit_test(test_rules_between_two_targets_lie_between_and_whole_numbers_go_up),
        cmocka_unit_test(test_below_and_beyond_the_targets),
        cmocka_unit_test(test_the_nearest_k_and_the_share_not_above_are_taken),
        cmocka_unit_test(test_a_higher_recall_never_gets_a_laxer_rule),
        cmocka_unit_test(test_without_a_calibration_a_cautious_rule_is_given),
        cmocka_unit_test(test_an_explicit_list_is_read_whole),
        cmocka_unit_test(test_a_calibration_comes_back_as_it_was_written),
        cmocka_unit_test(test_every_flipped_bit_and_every_cut_is_found),
        cmocka_unit_test(test_hostile_bytes_with_a_right_checksum_are_refused),
        cmocka_unit_test(test_a_calibration_that_makes_no_sense_is_not_written),
    };

    return cmocka_run_group_tests_name("walk_rule", tests, NULL, NULL);
}
