/* candidate_list: what a walk over a segment knows: the nodes it might read, how far those are that
 * it has scored, and which pages and cells it has seen.
 *
 * Scratch of one search: allocated once, cleared before each query. */
#ifndef ANND_INDEX_CANDIDATE_LIST_H
#define ANND_INDEX_CANDIDATE_LIST_H

#include <stdbool.h>
#include <stdint.h>

#include "index/list_kernels.h"
#include "storage/base/error.h"

/* Candidates: nodes known by their codes, whose page has not been asked for. At least the `limit`
 * nearest of all that were added, in no order. */
struct candidate_list {
    const struct list_kernels *kernels;
    struct candidate_columns columns;
    uint32_t count;
    uint32_t limit;
    uint32_t room;     /* count at which the list is cut back to its limit */
    uint32_t capacity; /* largest limit */
    float bound;       /* nothing beyond it enters */
};

/* capacity: largest limit. ERR_NOMEM. */
int candidate_list_init(struct candidate_list *list, uint32_t capacity, struct error *err);
void candidate_list_release(struct candidate_list *list);
uint64_t candidate_list_memory_bytes(uint32_t capacity);
void candidate_list_clear(struct candidate_list *list, uint32_t limit);
/* Drops all but the `limit` nearest, and lets nothing farther in from now on. */
void candidate_list_cut(struct candidate_list *list);

/* Adds a candidate unless it is too far or there already. distance: not NaN; sharpness: one over
 * its standard error, finite. */
static inline void candidate_list_add(struct candidate_list *list, float distance, float sharpness,
                                      uint32_t position, uint32_t page)
{
    const struct candidate_columns *columns = &list->columns;

    if (distance > list->bound ||
        list->kernels->find(columns->position, list->count, position) != LIST_NONE)
        return;
    if (list->count == list->room)
        candidate_list_cut(list);
    columns->distance[list->count] = distance;
    columns->sharpness[list->count] = sharpness;
    columns->position[list->count] = position;
    columns->page[list->count] = page;
    list->count++;
}

/* Distances of the nodes scored so far: at least the `limit` least, in no order. */
struct scored_list {
    const struct list_kernels *kernels;
    float *distances;
    uint32_t count;
    uint32_t limit;
    uint32_t room;
    float bound; /* what lies beyond it is not kept */
};

int scored_list_init(struct scored_list *list, uint32_t capacity, struct error *err);
void scored_list_release(struct scored_list *list);
uint64_t scored_list_memory_bytes(uint32_t capacity);
void scored_list_clear(struct scored_list *list, uint32_t limit);
void scored_list_cut(struct scored_list *list);

static inline void scored_list_add(struct scored_list *list, float distance)
{
    if (distance > list->bound)
        return;
    if (list->count == list->room)
        scored_list_cut(list);
    list->distances[list->count++] = distance;
}

/* Pages seen by one search: an open-addressed table whose entries carry the search's number, so
 * that starting anew costs nothing. */
struct page_mark {
    uint32_t epoch;
    uint32_t page;
};

struct page_set {
    struct page_mark *marks;
    uint32_t mask; /* of the part in use, which grows with the search: a short one stays in cache */
    uint32_t shift;
    uint32_t size;
    uint32_t count;
    uint32_t epoch;
};

/* Room for `expected` pages at a load of a half at most, and empty for as many. ERR_NOMEM. */
int page_set_init(struct page_set *set, uint32_t expected, struct error *err);
void page_set_release(struct page_set *set);
uint64_t page_set_memory_bytes(uint32_t expected);
void page_set_clear(struct page_set *set);
/* False when the set is full (three quarters): the search has seen its fill. */
bool page_set_add(struct page_set *set, uint32_t page);

static inline struct page_mark *page_set_place(const struct page_set *set, uint32_t page)
{
    uint32_t i = (page * 2654435769u) >> set->shift; /* 2^32 / golden ratio */

    while (set->marks[i].epoch == set->epoch && set->marks[i].page != page)
        i = (i + 1) & set->mask;
    return &set->marks[i];
}

static inline bool page_set_has(const struct page_set *set, uint32_t page)
{
    return page_set_place(set, page)->epoch == set->epoch;
}

/* Cells scanned by one search, which every edge is asked about: buckets of four, without branches.
 * The set may forget: a cell that finds its bucket full is left out, and a neighbour in it is
 * estimated a second time, which the list recognises. */
struct cell_set {
    uint32_t *buckets; /* x CELL_BUCKET; a cell's number plus one, 0: free */
    uint32_t shift;    /* 32 - log2(buckets in use) */
    uint32_t size;     /* buckets */
};

#define CELL_BUCKET 4u

/* ERR_NOMEM. */
int cell_set_init(struct cell_set *set, uint32_t expected, struct error *err);
void cell_set_release(struct cell_set *set);
uint64_t cell_set_memory_bytes(uint32_t expected);
/* Empties it, for up to `expected` cells. */
void cell_set_clear(struct cell_set *set, uint32_t expected);
void cell_set_add(struct cell_set *set, uint32_t cell);

static inline bool cell_set_has(const struct cell_set *set, uint32_t cell)
{
    const uint32_t *bucket =
        set->buckets + (uint64_t)((cell * 2654435769u) >> set->shift) * CELL_BUCKET;
    uint32_t number = cell + 1;

    return (bucket[0] == number) | (bucket[1] == number) | (bucket[2] == number) |
           (bucket[3] == number);
}

#endif
