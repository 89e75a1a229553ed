/* Fuzzes the decoder of pages: a page whose checksum is right may still hold anything. The first
 * bytes pick the format, the rest is the payload. What is accepted must be readable to its last
 * node without a step outside the payload, edges ascending and inside the segment. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "index/page_codec.h"
#include "storage/segment.h"
#include "tests/support/fuzz_support.h"

#define SHAPE_BYTES 12u

static uint32_t take(const uint8_t *data, uint32_t at, uint32_t bytes)
{
    uint32_t value = 0;

    for (uint32_t i = 0; i < bytes; i++)
        value |= (uint32_t)data[at + i] << 8 * i;
    return value;
}

static void read_node(const struct page_view *view, uint32_t slot, float *vector, uint64_t *sum)
{
    uint32_t neighbours[PAGE_DEGREE_MAX], count = 0;
    struct error err = ERROR_INIT;
    const struct page_format *format = view->format;

    store_decode(format->store, format->metric, page_view_vector(view, slot), format->dim, vector);
    *sum += (uint64_t)page_view_key(view, slot) + page_view_row(view, slot);
    if (page_view_neighbours(view, slot, neighbours, &count, &err) < 0) {
        require(err.code == ERR_CORRUPT, "edges: another error than ERR_CORRUPT");
        return;
    }
    require(count <= PAGE_DEGREE_MAX, "more edges than there may be");
    for (uint32_t i = 0; i < count; i++)
        require(neighbours[i] < format->row_count && (i == 0 || neighbours[i - 1] < neighbours[i]),
                "edges are not ascending, or leave the segment");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const enum vector_store stores[] = {STORE_F32, STORE_F16, STORE_I8, STORE_U8, STORE_SQ8};
    struct page_format format = {.metric = METRIC_L2};
    struct error err = ERROR_INIT;
    struct page_view view;
    volatile uint64_t seen;
    uint64_t sum = 0;

    if (bytes < SHAPE_BYTES)
        return 0;
    format.store = stores[data[0] % 5];
    format.metric = (enum metric)(METRIC_L2 + data[1] % 3);
    format.holds_keys = data[1] & 0x40;
    format.holds_rows = data[1] & 0x80;
    format.dim = take(data, 2, 2);
    format.capacity = 1 + data[4];
    format.page_bytes = 4096 * (1 + data[5] % 4);
    format.row_count = take(data, 6, 4);
    format.page_count = (format.row_count + format.capacity - 1) / format.capacity;
    format.vector_bytes = store_vector_bytes(format.store, format.metric, format.dim);
    if (page_format_check(&format, &err) < 0) {
        require(err.code == ERR_CORRUPT, "format: another error than ERR_CORRUPT");
        return 0;
    }
    uint64_t page = take(data, 10, 2) % format.page_count;
    uint32_t payload_bytes = format.page_bytes - BLOCK_CRC_BYTES;
    uint8_t *payload = calloc(1, payload_bytes); /* exactly: a byte too far is seen */
    float *vector = malloc(format.dim * sizeof *vector);

    require(payload && vector, "no memory");
    bytes -= SHAPE_BYTES;
    memcpy(payload, data + SHAPE_BYTES, bytes < payload_bytes ? bytes : payload_bytes);
    if (page_view_open(&format, page, payload, &view, &err) < 0) {
        require(err.code == ERR_CORRUPT, "page: another error than ERR_CORRUPT");
    } else {
        require(view.node_count == page_node_count(&format, page), "a wrong node count");
        for (uint32_t slot = 0; slot < view.node_count; slot++)
            read_node(&view, slot, vector, &sum);
    }
    seen = sum;
    (void)seen;
    free(payload);
    free(vector);
    return 0;
}
