/* candidates: what one graph search keeps: a bounded sorted list and the set of rows it has seen.
 *
 * Both are scratch of one search thread: allocated once, cleared before each search, no allocation
 * in between. */
#ifndef ANND_INDEX_CANDIDATES_H
#define ANND_INDEX_CANDIDATES_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "storage/base/error.h"

enum candidate_state { CANDIDATE_OPEN = 0, CANDIDATE_EXPANDED = 1 }; /* above: the caller's own */

struct candidate {
    float distance;
    uint32_t id;
    uint32_t state;
};

/* The `limit` nearest, ascending by (distance, id). */
struct candidates {
    struct candidate *items;
    uint32_t count;
    uint32_t limit;
    uint32_t capacity;  /* largest limit candidates_clear() accepts */
    uint32_t open_from; /* no open item stands before it */
};

/* ERR_NOMEM. capacity >= 1. */
int candidates_init(struct candidates *list, uint32_t capacity, struct error *err);
void candidates_release(struct candidates *list);
/* Empties the list; it then keeps `limit` items, 1..capacity. */
void candidates_clear(struct candidates *list, uint32_t limit);

/* True if an item at this distance would enter: to skip the call below where it would not. */
static inline bool candidates_admits(const struct candidates *list, float distance)
{
    return list->count < list->limit || distance <= list->items[list->count - 1].distance;
}

/* Puts an open item at its place, the last one falling off a full list. False if it is no nearer
 * than the last of a full list, or there already (same id and distance). */
bool candidates_insert(struct candidates *list, float distance, uint32_t id);

/* The nearest open item, or NULL. Valid until the next insertion. */
struct candidate *candidates_nearest_open(struct candidates *list);

/* Sorts items ascending by (distance, id); any order of NaNs is memory-safe. */
void candidates_sort(struct candidate *items, uint32_t count);

/* Rows seen by one search: a hash table of pairs, the newer row in the lower half, handled without
 * branches: a search asks about every edge, and the answer cannot be predicted. The set may
 * forget: a full pair drops its older row. A search stays right, since the list refuses what it
 * holds and a forgotten row that fell off the list is too far to come back; it only pays for a
 * distance twice. UINT32_MAX is no row. */
struct visited {
    uint64_t *pairs;
    uint64_t bytes;
    uint32_t shift; /* 32 - log2(number of pairs) */
};

/* `expected`: rows one search is likely to see; there will be at least as many pairs. ERR_NOMEM. */
int visited_init(struct visited *visited, uint32_t expected, struct error *err);
void visited_release(struct visited *visited);
/* Bytes visited_init() takes. */
uint64_t visited_memory_bytes(uint32_t expected);
/* Costs about a microsecond for each 64 KiB. */
void visited_clear(struct visited *visited);

/* Adds id; false if it was there. May say true again for a row that was forgotten. */
static inline bool visited_add(struct visited *visited, uint32_t id)
{
    uint32_t hash = id * 2654435769u; /* 2^32 / golden ratio: the upper bits are well mixed */
    uint64_t *pair = &visited->pairs[hash >> visited->shift];
    uint64_t old = *pair;
    uint64_t fresh = ((uint32_t)old != id) & ((uint32_t)(old >> 32) != id);

    /* Fresh: old << 32 | id; seen: old. Masks, since compilers make a branch of a choice. */
    *pair = old << (fresh << 5) | (id & (0 - fresh));
    return fresh;
}

#endif
