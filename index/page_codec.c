/* How a page is filled. With everything but edges placed, the rest of the page is the edges'
 * budget. All lists are cut to one common length, one edge after another, until they fit; then
 * lists get their last edge back, in slot order, as long as the page holds them. Lists arrive in
 * prune order (alpha 1 first), so cutting a list's tail is what pruning it harder would have done.
 *
 * How capacity is chosen. More nodes a page mean fewer pages for the true neighbours but shorter
 * lists. calibration.md's sweep on 128-d u8 found 20 nodes with 44 edges best, that is about 70
 * edge bytes a node (1.67 bytes an edge); wide vectors have room for all edges. So: as many nodes
 * as fit with EDGE_BYTES_A_NODE each, and one node or more a page, on as many 4 KiB blocks as one
 * node needs. */
#include "index/page_codec.h"

#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/segment.h"

#define EDGE_BYTES_A_NODE 70u
#define EDGE_END_BYTES 2u
/* What keys and rows take when positions are shuffled over 2^24 rows; int64 keys of other ranges
 * cost edges, not correctness. */
#define KEY_BYTES_EXPECTED 3u

static uint32_t node_overhead(const struct page_format *format)
{
    return EDGE_END_BYTES + (format->holds_keys ? KEY_BYTES_EXPECTED : 0) +
           (format->holds_rows ? KEY_BYTES_EXPECTED : 0);
}

int page_format_choose(struct page_format *format, enum vector_store store, enum metric metric,
                       uint32_t dim, uint32_t max_degree, uint64_t row_count, bool holds_keys,
                       bool holds_rows, struct error *err)
{
    memset(format, 0, sizeof *format);
    format->store = store;
    format->metric = metric;
    format->dim = dim;
    format->vector_bytes = store_vector_bytes(store, metric, dim);
    format->row_count = row_count;
    format->holds_keys = holds_keys;
    format->holds_rows = holds_rows;

    uint32_t edge_bytes = max_degree * 2 < EDGE_BYTES_A_NODE ? max_degree * 2 : EDGE_BYTES_A_NODE;
    uint32_t node_bytes = format->vector_bytes + node_overhead(format) + edge_bytes;
    /* Worst case of one node alone: full-width key and row, every edge in five bytes. */
    uint32_t single = PAGE_HEADER_BYTES + format->vector_bytes + EDGE_END_BYTES + 8 + 4 +
                      max_degree * 2 + BLOCK_CRC_BYTES;

    format->page_bytes = FILE_BLOCK_BYTES;
    if (single > format->page_bytes)
        format->page_bytes = (uint32_t)align_up(single, FILE_BLOCK_BYTES);
    if (format->page_bytes > PAGE_BYTES_MAX)
        return error_set(err, ERR_INVALID,
                         "vectors of %u dimensions do not fit a page: a node takes %u bytes, the "
                         "largest page has %u",
                         dim, single, PAGE_BYTES_MAX);
    format->capacity = (format->page_bytes - PAGE_HEADER_BYTES - BLOCK_CRC_BYTES) / node_bytes;
    if (format->capacity < 1)
        format->capacity = 1;
    if (format->capacity > PAGE_CAPACITY_MAX)
        format->capacity = PAGE_CAPACITY_MAX;
    format->page_count = (row_count + format->capacity - 1) / format->capacity;
    return 0;
}

int page_format_check(const struct page_format *format, struct error *err)
{
    uint32_t vector_bytes = store_vector_bytes(format->store, format->metric, format->dim);

    if (format->dim < 1 || vector_bytes == 0 || format->vector_bytes != vector_bytes)
        return error_set(err, ERR_CORRUPT,
                         "a vector of %u dimensions stored as %s takes %u bytes, "
                         "not %u",
                         format->dim, store_name(format->store), vector_bytes,
                         format->vector_bytes);
    if (format->page_bytes == 0 || format->page_bytes % FILE_BLOCK_BYTES ||
        format->page_bytes > PAGE_BYTES_MAX || format->capacity < 1 ||
        format->capacity > PAGE_CAPACITY_MAX ||
        PAGE_HEADER_BYTES + BLOCK_CRC_BYTES +
                (uint64_t)format->capacity * (vector_bytes + EDGE_END_BYTES) >
            format->page_bytes)
        return error_set(err, ERR_CORRUPT, "pages of %u bytes cannot hold %u nodes of %u bytes",
                         format->page_bytes, format->capacity, vector_bytes);
    if (format->row_count < 1 || format->row_count > UINT32_MAX ||
        format->page_count != (format->row_count + format->capacity - 1) / format->capacity)
        return error_set(err, ERR_CORRUPT, "%llu rows on pages of %u nodes are not %llu pages",
                         (unsigned long long)format->row_count, format->capacity,
                         (unsigned long long)format->page_count);
    return 0;
}

/* ---- writing ---- */

static uint32_t varint_bytes(uint32_t value)
{
    return 1u + (value >= 1u << 7) + (value >= 1u << 14) + (value >= 1u << 21) +
           (value >= 1u << 28);
}

static uint8_t *varint_put(uint8_t *out, uint32_t value)
{
    while (value >= 0x80) {
        *out++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *out++ = (uint8_t)value;
    return out;
}

/* Zigzag over 33-bit differences folded into 32: both positions are below 2^32 and differences
 * wrap, which decoding undoes. */
static uint32_t zigzag(uint32_t from, uint32_t to)
{
    uint32_t difference = to - from;

    return (difference << 1) ^ (uint32_t) - (int32_t)(difference >> 31);
}

static uint32_t unzigzag(uint32_t from, uint32_t coded)
{
    return from + ((coded >> 1) ^ (uint32_t) - (int32_t)(coded & 1));
}

/* A node's edges out of the page, ascending. Those kept are a list within the list: each knows the
 * one before and the one behind, count + 1 standing for the end, so that one leaves at no cost. */
struct edge_list {
    uint32_t positions[PAGE_DEGREE_MAX + 1]; /* from 1 on; 0 is free */
    uint16_t places[PAGE_DEGREE_MAX];        /* by prune order: where each stands */
    uint16_t before[PAGE_DEGREE_MAX + 2];
    uint16_t behind[PAGE_DEGREE_MAX + 2];
    uint32_t count;
    uint32_t kept;
    uint32_t saved; /* bytes that the edge that left last took */
};

/* Lists are short, and counting what is less takes no branches. */
static void edges_fill(struct edge_list *list, const struct page_node *node, uint32_t first,
                       uint32_t node_count)
{
    uint32_t positions[PAGE_DEGREE_MAX], count = 0;

    for (uint32_t e = 0; e < node->degree && count < PAGE_DEGREE_MAX; e++) {
        uint32_t position = node->neighbours[e];

        positions[count] = position;
        count += position - first >= node_count;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t position = positions[i], place = 1;

        for (uint32_t j = 0; j < i; j++)
            place += positions[j] <= position;
        for (uint32_t j = i + 1; j < count; j++)
            place += positions[j] < position;
        list->places[i] = (uint16_t)place;
        list->positions[place] = position;
    }
    for (uint32_t i = 0; i <= count; i++) {
        list->before[i + 1] = (uint16_t)i;
        list->behind[i] = (uint16_t)(i + 1);
    }
    list->count = list->kept = count;
    list->saved = 0;
}

/* What is stored of the edge at `place` when the one at `before` is stored before it. */
static uint32_t edge_value(const struct edge_list *list, uint32_t before, uint32_t place,
                           uint32_t first)
{
    return before ? list->positions[place] - list->positions[before] - 1
                  : zigzag(first, list->positions[place]);
}

/* Coded bytes of a whole list. */
static uint32_t edges_coded(const struct edge_list *list, uint32_t first)
{
    uint32_t bytes = 0;

    for (uint32_t place = 1; place <= list->count; place++)
        bytes += varint_bytes(edge_value(list, place - 1, place, first));
    return bytes;
}

/* The last in prune order leaves: never for more bytes, as a gap takes no more than its parts. */
static void edges_cut(struct edge_list *list, uint32_t first)
{
    uint32_t place = list->places[--list->kept];
    uint32_t before = list->before[place], behind = list->behind[place];

    list->saved = varint_bytes(edge_value(list, before, place, first));
    if (behind <= list->count) {
        list->saved += varint_bytes(edge_value(list, place, behind, first));
        list->saved -= varint_bytes(edge_value(list, before, behind, first));
    }
    list->behind[before] = (uint16_t)behind;
    list->before[behind] = (uint16_t)before;
}

static void edges_restore(struct edge_list *list)
{
    uint32_t place = list->places[list->kept++];

    list->behind[list->before[place]] = (uint16_t)place;
    list->before[list->behind[place]] = (uint16_t)place;
}

static void edges_fit(struct edge_list *lists, uint32_t node_count, uint32_t first, uint32_t budget)
{
    uint32_t cap = 0, used = 0;

    for (uint32_t i = 0; i < node_count; i++) {
        cap = lists[i].count > cap ? lists[i].count : cap;
        used += edges_coded(&lists[i], first);
    }
    if (used <= budget)
        return;
    while (used > budget && cap > 0) {
        cap--;
        for (uint32_t i = 0; i < node_count; i++) {
            if (lists[i].kept <= cap)
                continue;
            edges_cut(&lists[i], first);
            used -= lists[i].saved;
        }
    }
    for (uint32_t i = 0; i < node_count; i++) {
        if (lists[i].count <= cap || used + lists[i].saved > budget)
            continue;
        used += lists[i].saved;
        edges_restore(&lists[i]);
    }
}

static uint32_t bytes_for(uint64_t range)
{
    uint32_t bytes = 0;

    for (; range; range >>= 8)
        bytes++;
    return bytes;
}

static uint8_t *put_low_bytes(uint8_t *out, uint64_t value, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        *out++ = (uint8_t)(value >> (8 * i));
    return out;
}

int page_encode(const struct page_format *format, uint64_t page, const struct page_node *nodes,
                uint8_t *payload, uint64_t *edges_kept, uint64_t *edges_given, struct error *err)
{
    uint32_t node_count = page_node_count(format, page);
    uint32_t first = (uint32_t)(page * format->capacity);
    uint32_t payload_bytes = format->page_bytes - BLOCK_CRC_BYTES;
    int64_t key_base = 0;
    uint32_t row_base = 0, key_bytes = 0, row_bytes = 0;
    int rc = -1;
    struct edge_list *lists = malloc(node_count * sizeof *lists);

    if (!lists)
        return error_set(err, ERR_NOMEM, "no memory for the edge lists of a page");
    memset(payload, 0, payload_bytes);
    if (format->holds_keys) {
        int64_t key_top = nodes[0].key;

        key_base = nodes[0].key;
        for (uint32_t i = 1; i < node_count; i++) {
            key_base = nodes[i].key < key_base ? nodes[i].key : key_base;
            key_top = nodes[i].key > key_top ? nodes[i].key : key_top;
        }
        key_bytes = bytes_for((uint64_t)key_top - (uint64_t)key_base);
    }
    if (format->holds_rows) {
        uint32_t row_top = nodes[0].row;

        row_base = nodes[0].row;
        for (uint32_t i = 1; i < node_count; i++) {
            row_base = nodes[i].row < row_base ? nodes[i].row : row_base;
            row_top = nodes[i].row > row_top ? nodes[i].row : row_top;
        }
        row_bytes = bytes_for(row_top - row_base);
    }
    uint32_t fixed = PAGE_HEADER_BYTES +
                     node_count * (format->vector_bytes + key_bytes + row_bytes + EDGE_END_BYTES);

    if (fixed > payload_bytes) {
        error_set(err, ERR_INTERNAL, "page %llu: %u nodes take %u bytes of %u",
                  (unsigned long long)page, node_count, fixed, payload_bytes);
        goto done;
    }
    for (uint32_t i = 0; i < node_count; i++)
        edges_fill(&lists[i], &nodes[i], first, node_count);
    edges_fit(lists, node_count, first, payload_bytes - fixed);

    store_u16(payload, (uint16_t)node_count);
    payload[2] = (uint8_t)key_bytes;
    payload[3] = (uint8_t)row_bytes;
    store_u32(payload + 4, row_base);
    store_u64(payload + 8, (uint64_t)key_base);
    uint8_t *out = payload + PAGE_HEADER_BYTES;

    for (uint32_t i = 0; i < node_count; i++, out += format->vector_bytes)
        memcpy(out, nodes[i].vector, format->vector_bytes);
    for (uint32_t i = 0; i < node_count; i++)
        out = put_low_bytes(out, (uint64_t)nodes[i].key - (uint64_t)key_base, key_bytes);
    for (uint32_t i = 0; i < node_count; i++)
        out = put_low_bytes(out, nodes[i].row - row_base, row_bytes);
    uint8_t *ends = out, *edges = out + node_count * EDGE_END_BYTES;

    out = edges;
    for (uint32_t i = 0; i < node_count; i++) {
        const struct edge_list *list = &lists[i];

        for (uint32_t place = list->behind[0]; place <= list->count; place = list->behind[place])
            out = varint_put(out, edge_value(list, list->before[place], place, first));
        store_u16(ends + i * EDGE_END_BYTES, (uint16_t)(out - edges));
        if (edges_kept)
            *edges_kept += lists[i].kept;
        if (edges_given)
            *edges_given += lists[i].count;
    }
    rc = 0;
done:
    free(lists);
    return rc;
}

/* ---- reading ---- */

int page_view_open(const struct page_format *format, uint64_t page, const uint8_t *payload,
                   struct page_view *view, struct error *err)
{
    uint32_t payload_bytes = format->page_bytes - BLOCK_CRC_BYTES;
    uint32_t node_count = load_u16(payload);
    uint32_t key_bytes = payload[2], row_bytes = payload[3];

    if (node_count != page_node_count(format, page) || key_bytes > (format->holds_keys ? 8u : 0u) ||
        row_bytes > (format->holds_rows ? 4u : 0u))
        return error_set(err, ERR_CORRUPT,
                         "page %llu says %u nodes, %u key bytes, %u row bytes; wanted %u nodes",
                         (unsigned long long)page, node_count, key_bytes, row_bytes,
                         page_node_count(format, page));
    uint32_t fixed = PAGE_HEADER_BYTES +
                     node_count * (format->vector_bytes + key_bytes + row_bytes + EDGE_END_BYTES);

    if (fixed > payload_bytes)
        return error_set(err, ERR_CORRUPT, "page %llu: its nodes take %u bytes of %u",
                         (unsigned long long)page, fixed, payload_bytes);
    view->format = format;
    view->first = page * format->capacity;
    view->node_count = node_count;
    view->key_bytes = key_bytes;
    view->row_bytes = row_bytes;
    view->row_base = load_u32(payload + 4);
    view->key_base = (int64_t)load_u64(payload + 8);
    view->vectors = payload + PAGE_HEADER_BYTES;
    view->keys = view->vectors + node_count * format->vector_bytes;
    view->rows = view->keys + node_count * key_bytes;
    view->edge_ends = view->rows + node_count * row_bytes;
    view->edges = view->edge_ends + node_count * EDGE_END_BYTES;
    view->edge_bytes = payload_bytes - fixed;
    return 0;
}

int64_t page_view_key(const struct page_view *view, uint32_t slot)
{
    const uint8_t *in = view->keys + slot * view->key_bytes;
    uint64_t value = 0;

    for (uint32_t i = 0; i < view->key_bytes; i++)
        value |= (uint64_t)in[i] << (8 * i);
    return (int64_t)((uint64_t)view->key_base + value);
}

uint32_t page_view_row(const struct page_view *view, uint32_t slot)
{
    const uint8_t *in = view->rows + slot * view->row_bytes;
    uint32_t value = 0;

    if (!view->format->holds_rows)
        return (uint32_t)view->first + slot;
    for (uint32_t i = 0; i < view->row_bytes; i++)
        value |= (uint32_t)in[i] << (8 * i);
    return view->row_base + value;
}

/* The value at *in, which moves behind it; false when it does not end before `stop`. */
static inline bool varint_get(const uint8_t **in, const uint8_t *stop, uint32_t *value)
{
    uint32_t shift = 7;

    *value = **in & 0x7f;
    while (*(*in)++ & 0x80) {
        if (*in == stop || shift > 28)
            return false;
        *value |= (uint32_t)(**in & 0x7f) << shift;
        shift += 7;
    }
    return true;
}

int page_view_neighbours(const struct page_view *view, uint32_t slot, uint32_t *out,
                         uint32_t *count, struct error *err)
{
    uint32_t begin = slot ? load_u16(view->edge_ends + (slot - 1) * EDGE_END_BYTES) : 0;
    uint32_t end = load_u16(view->edge_ends + slot * EDGE_END_BYTES);
    uint64_t row_count = view->format->row_count;
    uint32_t n = 0;
    uint64_t position = 0;

    if (begin > end || end > view->edge_bytes)
        goto corrupt;
    for (const uint8_t *in = view->edges + begin, *stop = view->edges + end; in < stop; n++) {
        uint32_t value, word, ends = 0;

        /* Lengths cannot be predicted, so up to four bytes are taken at once, without a branch: the
         * lowest clear top bit ends the number. */
        if (view->edges + view->edge_bytes - in >= 4) {
            word = load_u32(in);
            ends = ~word & 0x80808080u;
        }
        if (ends) {
            word &= ends ^ (ends - 1);
            value = (word & 0x7f) | (word >> 1 & 0x3f80) | (word >> 2 & 0x1fc000) |
                    (word >> 3 & 0xfe00000);
            in += ((uint32_t)__builtin_ctz(ends) >> 3) + 1;
            if (in > stop)
                goto corrupt;
        } else if (!varint_get(&in, stop, &value)) {
            goto corrupt;
        }
        position = n == 0 ? unzigzag((uint32_t)view->first, value) : position + value + 1;
        if (position >= row_count || n == PAGE_DEGREE_MAX)
            goto corrupt;
        out[n] = (uint32_t)position;
    }
    *count = n;
    return 0;
corrupt:
    return error_set(err, ERR_CORRUPT, "the edges of node %llu cannot be decoded",
                     (unsigned long long)(view->first + slot));
}
