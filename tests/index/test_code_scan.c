/* Every kernel of every instruction set against sums written out here. Codes, sums and results end
 * at a page that may not be touched, so one byte too many ends the test; tables hold any 16-bit
 * values, so that sums wrap. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "index/code_scan.h"
#include "storage/base/random.h"

#define SEED 20241121u
#define ROWS 200u
#define UNTOUCHED 0xa5a5u

/* Bytes that end where a forbidden page begins. */
struct fenced {
    uint8_t *map;
    size_t map_bytes;
    uint8_t *data;
};

static void fenced_init(struct fenced *fenced, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t inner = (bytes + page - 1) / page * page;

    fenced->map_bytes = inner + 2 * page;
    fenced->map = mmap(NULL, fenced->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(fenced->map != MAP_FAILED);
    if (inner > 0)
        assert_int_equal(mprotect(fenced->map + page, inner, PROT_READ | PROT_WRITE), 0);
    fenced->data = fenced->map + page + inner - bytes;
}

static void fenced_release(struct fenced *fenced)
{
    munmap(fenced->map, fenced->map_bytes);
}

static uint16_t *new_entries(struct random *random, uint32_t chunk_count)
{
    uint16_t *entries = aligned_alloc(64, ((size_t)chunk_count + 1) * 512);

    assert_non_null(entries);
    for (size_t i = 0; i < (size_t)chunk_count * 256; i++)
        entries[i] = (uint16_t)random_u64(random);
    return entries;
}

static uint16_t sum_written_out(const uint16_t *entries, uint32_t chunk_count, const uint8_t *code)
{
    uint32_t sum = 0;

    for (uint32_t c = 0; c < chunk_count; c++)
        sum += entries[c * 256 + code[c]];
    return (uint16_t)sum;
}

/* Codes whose last row's last asked-for byte is the last before the fence. */
static void fenced_codes(struct fenced *fenced, struct random *random, uint32_t rows,
                         uint32_t chunk_count, uint64_t stride)
{
    size_t bytes = (rows - 1) * stride + chunk_count;

    fenced_init(fenced, bytes);
    for (size_t i = 0; i < bytes; i++)
        fenced->data[i] = (uint8_t)random_u64(random);
}

static void assert_sums(const uint16_t *got, const uint16_t *want, uint32_t count, uint32_t room,
                        const char *what, uint32_t chunk_count, uint64_t stride)
{
    for (uint32_t i = 0; i < room; i++) {
        uint16_t expected = i < count ? want[i] : UNTOUCHED;

        if (got[i] != expected)
            fail_msg("%s: %u chunks, stride %llu, count %u: sum %u is %u, not %u", what,
                     chunk_count, (unsigned long long)stride, count, i, got[i], expected);
    }
}

static void check_shape(struct random *random, uint32_t chunk_count, uint64_t stride,
                        uint32_t count_step)
{
    uint16_t *entries = new_entries(random, chunk_count);
    uint16_t want[ROWS], want_listed[ROWS], got[ROWS + 1];
    uint32_t listed[ROWS];
    struct fenced codes;

    fenced_codes(&codes, random, ROWS, chunk_count, stride);
    for (uint32_t i = 0; i < ROWS; i++) {
        /* Often the last row, the one at the fence, and often one seen before. */
        listed[i] = random_below(random, 4) == 0 ? ROWS - 1 : (uint32_t)random_below(random, ROWS);
        want[i] = sum_written_out(entries, chunk_count, codes.data + i * stride);
        want_listed[i] = sum_written_out(entries, chunk_count, codes.data + listed[i] * stride);
    }
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

        for (uint32_t count = 0; k && count <= ROWS; count += count_step) {
            uint32_t first = ROWS - count; /* so that every run ends at the fence */

            memset(got, UNTOUCHED & 255, sizeof got);
            k->spans(entries, chunk_count, codes.data, stride, &(struct code_span){first, count}, 1,
                     got);
            assert_sums(got, want + first, count, ROWS + 1, k->name, chunk_count, stride);
            memset(got, UNTOUCHED & 255, sizeof got);
            k->rows(entries, chunk_count, codes.data, stride, listed, count, got);
            assert_sums(got, want_listed, count, ROWS + 1, k->name, chunk_count, stride);
        }
    }
    fenced_release(&codes);
    free(entries);
}

static void test_sums_are_exact_at_every_chunk_count_and_row_count(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 0);
    for (uint32_t chunk_count = 1; chunk_count <= 140; chunk_count++)
        check_shape(&random, chunk_count, chunk_count, 1);
}

static void test_sums_are_exact_at_every_stride_and_alignment(void **state)
{
    static const uint32_t chunk_counts[] = {1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 97, 129};
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (size_t s = 0; s < sizeof chunk_counts / sizeof chunk_counts[0]; s++) {
        for (uint32_t gap = 1; gap <= 70; gap += gap < 8 ? 1 : 13)
            check_shape(&random, chunk_counts[s], chunk_counts[s] + gap, 7);
    }
}

static void test_sums_are_exact_for_long_codes(void **state)
{
    static const uint32_t chunk_counts[] = {255, 256, 257, 511, 512, 1000};
    struct random random;

    (void)state;
    random_init(&random, SEED, 2);
    for (size_t s = 0; s < sizeof chunk_counts / sizeof chunk_counts[0]; s++)
        check_shape(&random, chunk_counts[s], chunk_counts[s] + s % 2, 9);
}

/* Any number of spans of any length, empty ones too, that end at the fence or overlap; enough rows
 * for several batches of the wide kernels. */
static void check_spans(struct random *random, uint32_t chunk_count, uint64_t stride)
{
    enum { SPANS = 12 };
    uint16_t *entries = new_entries(random, chunk_count);
    uint16_t want[SPANS * ROWS], got[SPANS * ROWS + 1];
    struct code_span spans[SPANS];
    struct fenced codes;

    fenced_codes(&codes, random, ROWS, chunk_count, stride);
    for (uint32_t trial = 0; trial < 30; trial++) {
        uint32_t span_count = (uint32_t)random_below(random, SPANS + 1), count = 0;

        for (uint32_t s = 0; s < span_count; s++) {
            uint32_t most = trial % 3 == 0 ? 3 : ROWS;
            uint32_t rows = (uint32_t)random_below(random, most + 1);
            uint32_t first = random_below(random, 3)
                                 ? (uint32_t)random_below(random, ROWS - rows + 1)
                                 : ROWS - rows;

            spans[s] = (struct code_span){first, rows};
            for (uint32_t i = 0; i < rows; i++)
                want[count++] =
                    sum_written_out(entries, chunk_count, codes.data + (first + i) * stride);
        }
        for (int isa = 0; isa < ISA_COUNT; isa++) {
            const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

            if (!k)
                continue;
            memset(got, UNTOUCHED & 255, sizeof got);
            k->spans(entries, chunk_count, codes.data, stride, spans, span_count, got);
            assert_sums(got, want, count, SPANS * ROWS + 1, k->name, chunk_count, stride);
        }
    }
    fenced_release(&codes);
    free(entries);
}

static void test_sums_of_many_spans_follow_one_another(void **state)
{
    static const uint32_t chunk_counts[] = {1, 15, 16, 32, 33, 64, 97, 129};
    struct random random;

    (void)state;
    random_init(&random, SEED, 5);
    for (size_t s = 0; s < sizeof chunk_counts / sizeof chunk_counts[0]; s++) {
        check_spans(&random, chunk_counts[s], chunk_counts[s]);
        check_spans(&random, chunk_counts[s], chunk_counts[s] + 1 + 40 * (s % 2));
    }
}

static void test_each_value_of_a_byte_finds_its_own_entry(void **state)
{
    enum { CHUNKS = 35 };
    uint16_t *entries = aligned_alloc(64, CHUNKS * 512);
    uint8_t *codes = calloc(256, CHUNKS);
    uint16_t sums[256];

    (void)state;
    assert_non_null(entries);
    assert_non_null(codes);
    for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
        memset(entries, 0, CHUNKS * 512);
        for (uint32_t v = 0; v < 256; v++) {
            entries[chunk * 256 + v] = (uint16_t)(v * 257 + 1);
            memset(codes + v * CHUNKS, (int)(255 - v), CHUNKS);
            codes[v * CHUNKS + chunk] = (uint8_t)v;
        }
        for (int isa = 0; isa < ISA_COUNT; isa++) {
            const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

            if (!k)
                continue;
            k->spans(entries, CHUNKS, codes, CHUNKS, &(struct code_span){0, 256}, 1, sums);
            for (uint32_t v = 0; v < 256; v++)
                assert_int_equal(sums[v], (uint16_t)(v * 257 + 1));
        }
    }
    free(codes);
    free(entries);
}

static void test_no_chunks_sum_to_nothing(void **state)
{
    _Alignas(64) uint16_t entries[256] = {7};
    uint8_t codes[64] = {0};
    uint32_t rows[40] = {0};
    uint16_t sums[40];

    (void)state;
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

        if (!k)
            continue;
        memset(sums, 1, sizeof sums);
        k->spans(entries, 0, codes, 1, &(struct code_span){0, 40}, 1, sums);
        for (uint32_t i = 0; i < 40; i++)
            assert_int_equal(sums[i], 0);
        memset(sums, 1, sizeof sums);
        k->rows(entries, 0, codes, 1, rows, 40, sums);
        for (uint32_t i = 0; i < 40; i++)
            assert_int_equal(sums[i], 0);
    }
}

/* The sums stand at a fence, and so does out, with room for just the hits. */
static void check_below(const uint16_t *values, uint32_t count, uint16_t limit)
{
    uint32_t want[ROWS], hits = 0;
    struct fenced sums;

    for (uint32_t i = 0; i < count; i++) {
        if (values[i] <= limit)
            want[hits++] = i;
    }
    fenced_init(&sums, count * sizeof(uint16_t));
    if (count > 0)
        memcpy(sums.data, values, count * sizeof(uint16_t));
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);
        struct fenced out;

        if (!k)
            continue;
        fenced_init(&out, hits * sizeof(uint32_t));
        assert_int_equal(k->below((const uint16_t *)(const void *)sums.data, count, limit,
                                  (uint32_t *)(void *)out.data),
                         hits);
        if (hits > 0)
            assert_memory_equal(out.data, want, hits * sizeof(uint32_t));
        fenced_release(&out);
    }
    fenced_release(&sums);
}

static void test_below_finds_what_is_at_or_under_the_limit(void **state)
{
    static const uint16_t limits[] = {0, 1, 32767, 32768, 65534, 65535};
    static const uint16_t edges[] = {0, 1, 32766, 32767, 32768, 65534, 65535};
    struct random random;
    uint16_t values[ROWS];

    (void)state;
    random_init(&random, SEED, 3);
    for (uint32_t count = 0; count <= ROWS; count++) {
        for (size_t l = 0; l < sizeof limits / sizeof limits[0]; l++) {
            for (uint32_t i = 0; i < count; i++)
                values[i] = random_below(&random, 2) ? edges[random_below(&random, 7)]
                                                     : (uint16_t)random_u64(&random);
            check_below(values, count, limits[l]);
        }
    }
    for (uint32_t i = 0; i < ROWS; i++)
        values[i] = 65535;
    check_below(values, ROWS, 65534);
    check_below(values, ROWS, 65535);
}

static int compare_values(const void *a, const void *b)
{
    return (int)*(const uint16_t *)a - (int)*(const uint16_t *)b;
}

static void check_nth(const uint16_t *values, uint32_t count)
{
    uint16_t *sorted = malloc(count * sizeof *sorted);
    uint32_t step = count > ROWS ? count / 16 : 1;
    struct fenced sums;

    assert_non_null(sorted);
    fenced_init(&sums, count * sizeof(uint16_t));
    memcpy(sums.data, values, count * sizeof(uint16_t));
    memcpy(sorted, values, count * sizeof(uint16_t));
    qsort(sorted, count, sizeof *sorted, compare_values);
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

        for (uint32_t nth = 1; k && nth <= count; nth += nth + step > count ? 1 : step)
            assert_int_equal(k->nth((const uint16_t *)(const void *)sums.data, count, nth),
                             sorted[nth - 1]);
    }
    fenced_release(&sums);
    free(sorted);
}

static void test_the_nth_smallest_is_what_sorting_finds(void **state)
{
    enum { MANY = 8003 };
    static const uint16_t edges[] = {0, 1, 255, 256, 257, 32767, 32768, 65534, 65535};
    uint16_t *values = malloc(MANY * sizeof *values);
    struct random random;

    (void)state;
    assert_non_null(values);
    random_init(&random, SEED, 6);
    for (uint32_t count = 1; count <= ROWS; count++) {
        for (uint32_t shape = 0; shape < 4; shape++) {
            uint16_t same = edges[random_below(&random, 9)];

            for (uint32_t i = 0; i < count; i++)
                values[i] = shape == 0   ? (uint16_t)random_u64(&random)
                            : shape == 1 ? same
                            : shape == 2 ? edges[random_below(&random, 9)]
                                         : (uint16_t)(30000 + random_below(&random, 20));
            check_nth(values, count);
        }
    }
    for (uint32_t shape = 0; shape < 3; shape++) {
        for (uint32_t i = 0; i < MANY; i++)
            values[i] = shape == 0   ? (uint16_t)random_u64(&random)
                        : shape == 1 ? (uint16_t)(random_u64(&random) % 2 * 65535)
                                     : (uint16_t)(20000 + random_below(&random, 5000));
        for (uint32_t less = 0; less < 70; less += 23)
            check_nth(values, MANY - less);
    }
    free(values);
}

/* The tables of all sets are the same to the bit. */
static void check_same_fill(const float *shares, uint32_t chunk_count,
                            const struct code_table *want)
{
    struct code_table got = {.entries = aligned_alloc(64, (size_t)chunk_count * 512)};

    assert_non_null(got.entries);
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct code_scan_kernels *k = code_scan_kernels_for((enum isa)isa);

        if (!k)
            continue;
        memset(got.entries, 0x5a, (size_t)chunk_count * 512);
        k->fill(&got, shares, chunk_count);
        assert_int_equal(got.chunk_count, chunk_count);
        assert_memory_equal(&got.step, &want->step, sizeof got.step);
        assert_memory_equal(&got.offset, &want->offset, sizeof got.offset);
        assert_memory_equal(got.entries, want->entries, (size_t)chunk_count * 512);
    }
    free(got.entries);
}

/* Fills a table and checks all that the header promises of it. */
static void check_fill(struct random *random, const float *shares, uint32_t chunk_count)
{
    uint16_t *entries = aligned_alloc(64, (size_t)chunk_count * 512);
    struct code_table table = {.entries = entries};
    uint64_t greatest_sum = 0;
    double lowest_sum = 0, magnitude = 0;

    assert_non_null(entries);
    memset(entries, 0xff, (size_t)chunk_count * 512);
    code_table_fill(&table, shares, chunk_count);
    assert_ptr_equal(table.entries, entries);
    assert_int_equal(table.chunk_count, chunk_count);
    check_same_fill(shares, chunk_count, &table);
    assert_true(isfinite(table.step) && table.step > 0);
    for (uint32_t c = 0; c < chunk_count; c++) {
        uint16_t least = 65535, greatest = 0;
        double least_share = INFINITY, most = 0;

        for (uint32_t v = 0; v < 256; v++) {
            uint16_t entry = entries[c * 256 + v];

            least = entry < least ? entry : least;
            greatest = entry > greatest ? entry : greatest;
            least_share = fmin(least_share, shares[c * 256 + v]);
            most = fmax(most, fabs((double)shares[c * 256 + v]));
        }
        assert_int_equal(least, 0);
        greatest_sum += greatest;
        lowest_sum += least_share;
        magnitude += most;
    }
    assert_true(greatest_sum <= 65535);
    /* The next entry up in every chunk, and what a float's steps may cost, would be too much. */
    if (table.step > FLT_MIN)
        assert_true(greatest_sum + chunk_count + 1 >= 65535);
    assert_true(fabs((double)table.offset - lowest_sum) <= 1e-6 * magnitude);
    for (uint32_t trial = 0; trial < 300; trial++) {
        double exact = 0, estimate;
        uint32_t sum = 0;

        for (uint32_t c = 0; c < chunk_count; c++) {
            uint32_t v = (uint32_t)random_below(random, 256);

            exact += (double)shares[c * 256 + v];
            sum += entries[c * 256 + v];
        }
        estimate = (double)table.offset + (double)table.step * sum;
        if (!(fabs(estimate - exact) <=
              (double)table.step * (chunk_count / 2.0 + 0.05) + 1e-6 * magnitude))
            fail_msg("%u chunks: estimate %g, distance %g, step %g", chunk_count, estimate, exact,
                     (double)table.step);
    }
    free(entries);
}

static void test_a_filled_table_never_overflows_and_errs_by_half_a_step_a_chunk(void **state)
{
    static const uint32_t chunk_counts[] = {1, 2, 3, 16, 32, 97, 129, 512};
    struct random random;

    (void)state;
    random_init(&random, SEED, 4);
    for (size_t s = 0; s < sizeof chunk_counts / sizeof chunk_counts[0]; s++) {
        uint32_t n = chunk_counts[s];
        float *shares = malloc((size_t)n * 256 * sizeof *shares);

        assert_non_null(shares);
        for (uint32_t shape = 0; shape < 9; shape++) {
            for (uint32_t c = 0; c < n; c++) {
                float wide = random_float(&random) * (c % 5 == 0 ? 100.0f : 1.0f);

                for (uint32_t v = 0; v < 256; v++) {
                    float *share = &shares[c * 256 + v];

                    switch (shape) {
                    case 0: /* as distances */
                        *share = random_float(&random) * wide;
                        break;
                    case 1: /* as inner products */
                        *share = (random_float(&random) - 0.5f) * wide;
                        break;
                    case 2: /* all ranges equal: every chunk's rounding goes the same way */
                        *share = (float)(v % 2);
                        break;
                    case 3: /* greatest entries that end in a half */
                        *share = v == 77 ? (float)(65535 / n) + 0.5f : 0.0f;
                        break;
                    case 4: /* one chunk has all the range */
                        *share = c == n / 2 ? (float)v : 3.0f;
                        break;
                    case 5: /* ranges of a few steps */
                        *share = -1000.0f + (float)(v % 3) * 0.015f + (c == 0 ? (float)v : 0.0f);
                        break;
                    case 6:
                        *share = random_float(&random) * 1e-30f;
                        break;
                    case 7: /* denormal steps */
                        *share = (float)v * 1e-40f;
                        break;
                    default: /* a difference that no float holds */
                        *share = c > 0 ? 1.0f : v % 2 ? 3e38f : -3e38f;
                        break;
                    }
                }
            }
            check_fill(&random, shares, n);
        }
        free(shares);
    }
}

static void test_a_table_of_equal_shares_has_step_zero(void **state)
{
    enum { CHUNKS = 5 };
    _Alignas(64) uint16_t entries[CHUNKS * 256];
    struct code_table table = {.entries = entries};
    float shares[CHUNKS * 256];

    (void)state;
    memset(entries, 0xff, sizeof entries);
    for (uint32_t i = 0; i < CHUNKS * 256; i++)
        shares[i] = -2.5f * (float)(i / 256);
    code_table_fill(&table, shares, CHUNKS);
    assert_true(table.step == 0);
    assert_true(table.offset == -2.5f * (0 + 1 + 2 + 3 + 4));
    for (uint32_t i = 0; i < CHUNKS * 256; i++)
        assert_int_equal(entries[i], 0);
}

static void test_kernels_are_there_for_the_sets_that_distances_have(void **state)
{
    (void)state;
    assert_non_null(code_scan_kernels_for(ISA_SCALAR));
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        const struct distance_kernels *distance = distance_kernels_for((enum isa)isa);
        const struct code_scan_kernels *scan = code_scan_kernels_for((enum isa)isa);

        assert_int_equal(scan != NULL, distance != NULL);
        if (scan)
            assert_string_equal(scan->name, distance->name);
    }
    assert_null(code_scan_kernels_for(ISA_COUNT));
    assert_string_equal(code_scan_kernels_best()->name, distance_kernels_best()->name);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums_are_exact_at_every_chunk_count_and_row_count),
        cmocka_unit_test(test_sums_are_exact_at_every_stride_and_alignment),
        cmocka_unit_test(test_sums_are_exact_for_long_codes),
        cmocka_unit_test(test_sums_of_many_spans_follow_one_another),
        cmocka_unit_test(test_each_value_of_a_byte_finds_its_own_entry),
        cmocka_unit_test(test_no_chunks_sum_to_nothing),
        cmocka_unit_test(test_below_finds_what_is_at_or_under_the_limit),
        cmocka_unit_test(test_the_nth_smallest_is_what_sorting_finds),
        cmocka_unit_test(test_a_filled_table_never_overflows_and_errs_by_half_a_step_a_chunk),
        cmocka_unit_test(test_a_table_of_equal_shares_has_step_zero),
        cmocka_unit_test(test_kernels_are_there_for_the_sets_that_distances_have),
    };

    return cmocka_run_group_tests_name("code_scan", tests, NULL, NULL);
}
