/* page_layout: which row stands on which page.
 *
 * Space order by balanced bisection: the rows are split at the median of their projection on the
 * line between two sampled centres, again and again, down to one page, so that rows of a page, and
 * neighbouring pages, are near each other. Then rows of different pages trade places where more
 * pairs of nearest neighbours share a page afterwards (the aim of Wang et al., "Starling", SIGMOD
 * 2024, on kNN lists instead of graph edges, and by trades instead of their block neighbour
 * frequency; up to 24 places of a list count). Hot rows, those that stand in most rows' lists, get
 * pages of their own at the front, in tiers, each in space order within itself: whatever part of
 * the file is kept in memory, it is the part that queries ask for most.
 *
 * In bounded memory the work is done in windows of consecutive rows, which should then be near each
 * other (row_store.h): each is laid out and refined alone, blind to neighbours in others, and what
 * a window leaves of a group (a tier, the rest, the rows apart) that is less than a page waits for
 * the next. Groups are cut over all rows; the windows' parts of a group follow each other.
 *
 * Deterministic whatever the pool; windows are part of what it is a function of. */
#ifndef ANND_INDEX_PAGE_LAYOUT_H
#define ANND_INDEX_PAGE_LAYOUT_H

#include "index/neighbour_lists.h"
#include "index/vamana.h"

#define PAGE_LAYOUT_TIERS_MAX 8u

/* Space rows, in memory or read when a window needs them. */
struct page_vectors {
    uint32_t count;
    uint32_t dim;
    enum element_type type; /* f32, f16, u8, i8 */
    uint64_t row_bytes;     /* from row to row */
    const uint8_t *data;    /* all rows, borrowed; NULL: they are read */
    /* Rows [first, first + count), row_bytes apart: once each, and once more singly for the few
     * that wait for the next window. Called by several threads at once. -1 with err on failure. */
    int (*read)(void *context, uint32_t first, uint32_t count, uint8_t *rows, struct error *err);
    void *context;
};

/* Lists of nearest neighbours, read in up to three passes over a window's rows (one, before, over
 * all rows where there are tiers). A pass is sequential, but that a window's begins with the few
 * rows carried over, one by one. */
struct page_neighbours {
    uint32_t k; /* places, at least 1 */
    /* Lists of rows [first, first + count): count x k, NEIGHBOUR_NONE where there are fewer. One
     * thread at a time: the caller's. -1 with err on failure. */
    int (*read)(void *context, uint32_t first, uint32_t count, uint32_t *lists, struct error *err);
    void *context;
};

/* Lists in memory, borrowed. */
struct page_neighbours page_neighbours_of_lists(const struct neighbour_lists *lists);

struct page_layout_params {
    uint32_t capacity; /* rows a page */
    uint64_t seed;
    const struct neighbour_lists
        *neighbours;        /* of page_layout_order; page_layout_make has its own */
    uint32_t refine_rounds; /* at most; 0: bisection alone. 4 bring most, after 12 little is left */
    /* Rows up to the end of each hot tier, strictly ascending multiples of capacity. */
    uint32_t tier_ends[PAGE_LAYOUT_TIERS_MAX];
    uint32_t tier_count;
    /* Rows that take no part and stand last, in space order among themselves (the rows recall is
     * calibrated with); count - apart_count is a multiple of capacity unless it is 0. */
    const uint32_t *apart;
    uint32_t apart_count;
    /* Rows a window at most: equal windows are made of it. 0: one window of all. Refinement of more
     * than 2^26 rows is done in windows whatever is asked for. */
    uint32_t window_rows;
};

/* Fills order[position] = row for all vectors->count rows: page p holds positions
 * [p * capacity, (p + 1) * capacity), the last page the rest. Without neighbours (NULL): plain
 * space order, no tiers. One phase of the job. ERR_INVALID, ERR_CANCELLED, ERR_NOMEM, and what the
 * readers fail with. */
int page_layout_make(const struct page_vectors *vectors, const struct page_neighbours *neighbours,
                     const struct page_layout_params *params, struct pool *pool, struct job *job,
                     uint32_t *order, struct error *err);
/* The same of vectors and lists in memory. */
int page_layout_order(const struct vector_matrix *vectors, const struct page_layout_params *params,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err);

/* Peak heap bytes of page_layout_make besides the order and what the readers take. stride:
 * row_bytes of vectors that are read, 0 if they are in memory. k: of the neighbour lists, 0
 * without. What tiers, windows and short lists leave of the links is less than it counts with. */
uint64_t page_layout_memory_bytes(uint64_t count, uint32_t window_rows, uint64_t stride, uint32_t k,
                                  uint32_t capacity, uint32_t workers);
/* The most rows a window that memory_bytes are enough for, `count` when one window is; 0 when not
 * even windows of 65,536 rows fit. */
uint32_t page_layout_window_rows(uint32_t count, uint64_t memory_bytes, uint64_t stride, uint32_t k,
                                 uint32_t capacity, uint32_t workers);

#endif
