/* page_layout: which row stands on which page.
 *
 * Space order by balanced bisection: the rows are split at the median of their projection on the
 * line between two sampled centres, again and again, down to one page, so that rows of a page, and
 * neighbouring pages, are near each other. Then rows of different pages trade places where more
 * pairs of nearest neighbours share a page afterwards (the aim of Wang et al., "Starling", SIGMOD
 * 2024, on kNN lists instead of graph edges, and by trades instead of their block neighbour
 * frequency; up to 24 places of a list count). That takes about 44 bytes a row and 8 a counted
 * place. Hot rows, those that stand in most rows' lists, get pages of
 * their own at the front, in tiers, each in space order within itself: whatever part of the file
 * is kept in memory, it is the part that queries ask for most. Deterministic whatever the pool. */
#ifndef ANND_INDEX_PAGE_LAYOUT_H
#define ANND_INDEX_PAGE_LAYOUT_H

#include "index/neighbour_lists.h"
#include "index/vamana.h"

#define PAGE_LAYOUT_TIERS_MAX 8u

struct page_layout_params {
    uint32_t capacity; /* rows a page */
    uint64_t seed;
    const struct neighbour_lists *neighbours; /* NULL: plain space order, no tiers */
    uint32_t refine_rounds; /* at most; 0: bisection alone. 4 bring most, after 12 little is left */
    /* Rows up to the end of each hot tier, strictly ascending multiples of capacity. */
    uint32_t tier_ends[PAGE_LAYOUT_TIERS_MAX];
    uint32_t tier_count;
    /* Rows that take no part and stand last, in space order among themselves (the rows recall is
     * calibrated with); count - apart_count is a multiple of capacity unless it is 0. */
    const uint32_t *apart;
    uint32_t apart_count;
};

/* Fills order[position] = row for all vectors->count rows: page p holds positions
 * [p * capacity, (p + 1) * capacity), the last page the rest. ERR_INVALID, ERR_CANCELLED,
 * ERR_NOMEM. */
int page_layout_order(const struct vector_matrix *vectors, const struct page_layout_params *params,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err);

#endif
