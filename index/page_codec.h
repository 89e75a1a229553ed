/* page_codec: the bytes of one page of a `pages` section.
 *
 * A page holds the vectors, keys and out-edges of up to `capacity` nodes. Page p holds positions
 * [p * capacity, ...). All nodes of a page are scored when it is read, so an edge that stays inside
 * the page says nothing and is not stored; the others are sorted and delta-coded. Layout:
 *
 *   00-01  u16 node count
 *   02     u8  key bytes, 0..8: keys are key base + an unsigned number of so many bytes
 *   03     u8  row bytes, 0..4: row positions likewise, 0 when position and row are the same
 *   04-07  u32 row base
 *   08-15  i64 key base
 *   16-    vectors, node count x vector_bytes (store.h)
 *          keys, node count x key bytes; rows, node count x row bytes
 *          u16 edge end, node count: where node i's edge bytes end, from the first edge byte
 *          edge bytes: per node, its neighbours' positions ascending as varints: the first as a
 *          zigzag difference to the page's first position, each next as the gap less one
 *   ...    zero; the last 4 bytes are the block's CRC (segment.h)
 *
 * Space for edges is shared: when a page overflows, lists are cut from the end of their prune
 * order, the longest first. Pure functions: any thread. */
#ifndef ANND_INDEX_PAGE_CODEC_H
#define ANND_INDEX_PAGE_CODEC_H

#include <stdbool.h>
#include <stdint.h>

#include "index/store.h"
#include "storage/base/error.h"

#define PAGE_HEADER_BYTES 16u
#define PAGE_CAPACITY_MAX 256u
#define PAGE_BYTES_MAX (64u * 4096u)
#define PAGE_DEGREE_MAX 256u

struct page_format {
    enum vector_store store;
    enum metric metric;
    uint32_t dim;
    uint32_t vector_bytes;
    uint32_t capacity;
    uint32_t page_bytes; /* multiple of 4,096, CRC included */
    uint64_t row_count;
    uint64_t page_count;
    bool holds_keys;
    bool holds_rows;
};

/* Picks page_bytes and capacity so that about `edge_bytes` remain per node (see page_codec.c for
 * the choice). ERR_INVALID for a dimension too large. */
int page_format_choose(struct page_format *format, enum vector_store store, enum metric metric,
                       uint32_t dim, uint32_t max_degree, uint64_t row_count, bool holds_keys,
                       bool holds_rows, struct error *err);
/* Checks numbers that were read from a manifest. */
int page_format_check(const struct page_format *format, struct error *err);

/* Nodes on page p. */
static inline uint32_t page_node_count(const struct page_format *format, uint64_t page)
{
    uint64_t first = page * format->capacity;
    uint64_t left = format->row_count - first;

    return left < format->capacity ? (uint32_t)left : format->capacity;
}

/* One node to be written. */
struct page_node {
    const uint8_t *vector; /* vector_bytes */
    int64_t key;
    uint32_t row;
    const uint32_t *neighbours; /* positions, in prune order; those inside the page are skipped */
    uint32_t degree;
};

/* Writes the payload (page_bytes - 4) of page `page`. *edges_kept and *edges_given (may be NULL)
 * grow by what was stored and what was offered (out-of-page edges only). */
int page_encode(const struct page_format *format, uint64_t page, const struct page_node *nodes,
                uint8_t *payload, uint64_t *edges_kept, uint64_t *edges_given, struct error *err);

/* A page taken apart; points into it. */
struct page_view {
    const struct page_format *format;
    uint64_t first; /* position of slot 0 */
    uint32_t node_count;
    uint32_t key_bytes;
    uint32_t row_bytes;
    uint32_t row_base;
    int64_t key_base;
    const uint8_t *vectors;
    const uint8_t *keys;
    const uint8_t *rows;
    const uint8_t *edge_ends;
    const uint8_t *edges;
    uint32_t edge_bytes;
};

/* The page's CRC has been verified; this checks that its numbers make sense. ERR_CORRUPT. */
int page_view_open(const struct page_format *format, uint64_t page, const uint8_t *payload,
                   struct page_view *view, struct error *err);
static inline const uint8_t *page_view_vector(const struct page_view *view, uint32_t slot)
{
    return view->vectors + (uint64_t)slot * view->format->vector_bytes;
}
int64_t page_view_key(const struct page_view *view, uint32_t slot);
uint32_t page_view_row(const struct page_view *view, uint32_t slot);
/* Stored neighbours' positions, ascending, at most PAGE_DEGREE_MAX. *count is set. ERR_CORRUPT when
 * the bytes run out, repeat or leave the segment. */
int page_view_neighbours(const struct page_view *view, uint32_t slot, uint32_t *out,
                         uint32_t *count, struct error *err);

#endif
