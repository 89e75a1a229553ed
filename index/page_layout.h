/* page_layout: which row stands on which page.
 *
 * Space order by balanced bisection: the rows are split at the median of their projection on the
 * line between two sampled centres, again and again, down to one page, so that rows of a page, and
 * neighbouring pages, are near each other. Deterministic whatever the pool. */
#ifndef ANND_INDEX_PAGE_LAYOUT_H
#define ANND_INDEX_PAGE_LAYOUT_H

#include "index/vamana.h"

/* Fills order[position] = row for all vectors->count rows: page p holds positions
 * [p * capacity, (p + 1) * capacity), the last page the rest. */
int page_layout_order(const struct vector_matrix *vectors, uint32_t capacity, uint64_t seed,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err);

#endif
