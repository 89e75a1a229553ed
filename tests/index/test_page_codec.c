/* page_codec against a plain model: what goes in comes out, whatever the store, and no bytes crash
 * it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "index/page_codec.h"
#include "storage/base/random.h"
#include "storage/segment.h"

static struct page_format format_for(enum vector_store store, enum metric metric, uint32_t dim,
                                     uint64_t rows)
{
    struct page_format format;
    struct error err = ERROR_INIT;

    assert_int_equal(page_format_choose(&format, store, metric, dim, 64, rows, true, false, &err),
                     0);
    assert_int_equal(page_format_check(&format, &err), 0);
    return format;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* Fills a page with random nodes, encodes, decodes and compares. degree 0 means random up to 64. */
static void round_trip(const struct page_format *format, uint64_t page, uint64_t seed,
                       int64_t key_base, uint64_t key_range, uint32_t degree)
{
    uint32_t count = page_node_count(format, page);
    struct page_node *nodes = calloc(count, sizeof *nodes);
    uint8_t *vectors = malloc((size_t)count * format->vector_bytes);
    uint32_t *edges = malloc((size_t)count * 64 * sizeof *edges);
    uint8_t *payload = malloc(format->page_bytes - BLOCK_CRC_BYTES);
    uint64_t kept = 0, given = 0, stored = 0, offered = 0;
    struct error err = ERROR_INIT;
    struct random random;
    struct page_view view;

    random_init(&random, seed, page);
    for (size_t i = 0; i < (size_t)count * format->vector_bytes; i++)
        vectors[i] = (uint8_t)random_u64(&random);
    for (uint32_t i = 0; i < count; i++) {
        nodes[i].vector = vectors + (size_t)i * format->vector_bytes;
        nodes[i].key = (int64_t)((uint64_t)key_base + random_below(&random, key_range));
        nodes[i].neighbours = edges + (size_t)i * 64;
        nodes[i].degree = degree ? degree : (uint32_t)random_below(&random, 65);
        for (uint32_t e = 0; e < nodes[i].degree; e++) {
            uint32_t at;
            bool again;

            do {
                at = (uint32_t)random_below(&random, format->row_count);
                again = false;
                for (uint32_t b = 0; b < e; b++)
                    again |= edges[(size_t)i * 64 + b] == at;
            } while (again);
            edges[(size_t)i * 64 + e] = at;
            offered += at / format->capacity != page;
        }
    }
    assert_int_equal(page_encode(format, page, nodes, payload, &kept, &given, &err), 0);
    assert_int_equal(page_view_open(format, page, payload, &view, &err), 0);
    assert_int_equal(view.node_count, count);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t out[PAGE_DEGREE_MAX], n, wanted[64], m = 0;

        assert_memory_equal(page_view_vector(&view, i), nodes[i].vector, format->vector_bytes);
        assert_int_equal(page_view_key(&view, i), nodes[i].key);
        assert_int_equal(page_view_row(&view, i), page * format->capacity + i);
        assert_int_equal(page_view_neighbours(&view, i, out, &n, &err), 0);
        /* What is stored is a prefix, in prune order, of the edges that leave the page. */
        for (uint32_t e = 0; e < nodes[i].degree && m < n; e++)
            if (nodes[i].neighbours[e] / format->capacity != page)
                wanted[m++] = nodes[i].neighbours[e];
        assert_int_equal(m, n);
        qsort(wanted, m, sizeof *wanted, compare);
        assert_memory_equal(out, wanted, m * sizeof *wanted);
        stored += n;
    }
    assert_int_equal(kept, stored);
    assert_int_equal(given, offered);
    free(nodes);
    free(vectors);
    free(edges);
    free(payload);
}

static void test_pages_of_every_store_round_trip(void **state)
{
    static const enum vector_store stores[] = {STORE_F32, STORE_F16, STORE_U8, STORE_I8, STORE_SQ8};
    static const uint32_t dims[] = {1, 2, 3, 17, 128, 512, 960, 2048, 4096};

    (void)state;
    for (size_t s = 0; s < sizeof stores / sizeof *stores; s++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            struct page_format format = format_for(stores[s], METRIC_COSINE, dims[d], 5003);

            round_trip(&format, 0, 1, 0, 5003, 0);
            round_trip(&format, format.page_count / 2, 2, 0, 5003, 0);
            round_trip(&format, format.page_count - 1, 3, 0, 5003, 0);
        }
}

static void test_keys_at_both_ends_of_int64_are_exact(void **state)
{
    struct page_format format = format_for(STORE_F16, METRIC_L2, 64, 5000);

    (void)state;
    round_trip(&format, 1, 4, INT64_MIN, 3, 8);
    round_trip(&format, 1, 5, INT64_MAX - 2, 3, 8);
    round_trip(&format, 1, 6, INT64_MIN, UINT64_MAX, 8); /* needs all eight bytes */
    round_trip(&format, 1, 7, 445127262333941301, 1, 8); /* one value: no bytes at all */
}

static void test_an_overfull_page_keeps_the_front_of_each_list(void **state)
{
    /* Far positions cost three bytes an edge: 64 of them a node cannot fit. */
    struct page_format format = format_for(STORE_U8, METRIC_L2, 128, 4000000000u);

    (void)state;
    assert_int_equal(format.capacity, 20);
    round_trip(&format, 77, 8, 0, 1000000, 64);
}

static void test_a_2048_dimensional_half_float_node_takes_one_read_of_two_blocks(void **state)
{
    struct page_format format = format_for(STORE_F16, METRIC_COSINE, 2048, 1000);

    (void)state;
    assert_int_equal(format.page_bytes, 8192);
    assert_int_equal(format.capacity, 1);
}

static void test_no_bytes_make_a_view_read_outside_the_page(void **state)
{
    struct page_format format = format_for(STORE_U8, METRIC_L2, 16, 1000);
    uint32_t bytes = format.page_bytes - BLOCK_CRC_BYTES;
    uint8_t *payload = malloc(bytes); /* exactly the page: the sanitizer sees a byte too many */
    struct random random;

    (void)state;
    random_init(&random, 9, 0);
    for (int round = 0; round < 20000; round++) {
        struct error err = ERROR_INIT;
        struct page_view view;

        for (uint32_t i = 0; i < bytes; i++)
            payload[i] = (uint8_t)(random_u64(&random) & (round % 3 ? 0xff : 0x81));
        if (round % 2) { /* a sound header, so that edges are reached */
            payload[0] = (uint8_t)page_node_count(&format, 1);
            payload[1] = 0;
            payload[2] = (uint8_t)(round % 9);
            payload[3] = 0;
        }
        if (page_view_open(&format, 1, payload, &view, &err) < 0)
            continue;
        for (uint32_t slot = 0; slot < view.node_count; slot++) {
            uint32_t out[PAGE_DEGREE_MAX], count;

            page_view_key(&view, slot);
            if (page_view_neighbours(&view, slot, out, &count, &err) == 0)
                for (uint32_t e = 0; e < count; e++)
                    assert_true(out[e] < format.row_count && (!e || out[e] > out[e - 1]));
            error_clear(&err);
        }
    }
    free(payload);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pages_of_every_store_round_trip),
        cmocka_unit_test(test_keys_at_both_ends_of_int64_are_exact),
        cmocka_unit_test(test_an_overfull_page_keeps_the_front_of_each_list),
        cmocka_unit_test(test_a_2048_dimensional_half_float_node_takes_one_read_of_two_blocks),
        cmocka_unit_test(test_no_bytes_make_a_view_read_outside_the_page),
    };

    return cmocka_run_group_tests_name("page_codec", tests, NULL, NULL);
}
