/* candidate_list: what a walk over a segment holds: the nearest nodes it knows of, estimated or
 * read, and which pages and cells it has seen.
 *
 * Additions are gathered and merged into the sorted list in one pass, since they come in bursts: a
 * page's nodes, the neighbours of all that was expanded. Scratch of one search: allocated once. */
#ifndef ANND_INDEX_CANDIDATE_LIST_H
#define ANND_INDEX_CANDIDATE_LIST_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"

enum listed_state {
    LISTED_UNREAD = 0,   /* an estimate */
    LISTED_WANTED = 1,   /* an estimate; its page is in flight */
    LISTED_LOADED = 2,   /* exact distance, edges not followed yet */
    LISTED_EXPANDED = 3, /* exact distance, edges followed */
    LISTED_GONE = 4      /* an estimate whose page was scored: dropped by the next merge */
};

struct listed {
    float distance; /* never NaN */
    uint32_t position;
    uint32_t page;
    float spread; /* standard error of an estimate; 0 when exact */
    enum listed_state state;
};

/* The `limit` nearest, ascending by (distance, position). */
struct candidate_list {
    struct listed *items;
    uint32_t count;
    uint32_t limit;
    uint32_t capacity;
    struct listed *spare; /* the other buffer of the merge */
    struct listed *fresh; /* added since the last merge, in any order */
    uint32_t fresh_count;
    uint32_t fresh_max;
    bool gone; /* an item may be GONE: whoever marks one says so */
};

/* capacity: largest limit; fresh_max: additions held before a merge is forced. ERR_NOMEM. */
int candidate_list_init(struct candidate_list *list, uint32_t capacity, uint32_t fresh_max,
                        struct error *err);
void candidate_list_release(struct candidate_list *list);
uint64_t candidate_list_memory_bytes(uint32_t capacity, uint32_t fresh_max);
void candidate_list_clear(struct candidate_list *list, uint32_t limit);

/* Sorts what was added into the list, drops what is GONE, and of an estimate that is there already
 * (same position and distance) the newer. */
void candidate_list_merge(struct candidate_list *list);

/* False when an item at this distance could not enter. */
static inline bool candidate_list_admits(const struct candidate_list *list, float distance)
{
    return list->count < list->limit || distance <= list->items[list->count - 1].distance;
}

static inline void candidate_list_add(struct candidate_list *list, float distance,
                                      uint32_t position, uint32_t page, float spread,
                                      enum listed_state state)
{
    if (!candidate_list_admits(list, distance))
        return;
    if (list->fresh_count == list->fresh_max)
        candidate_list_merge(list);
    list->fresh[list->fresh_count++] = (struct listed){distance, position, page, spread, state};
}

/* Numbers seen by one search, each with a value: an open-addressed table whose entries carry the
 * search's number, so that starting anew costs nothing. */
struct mark {
    uint32_t epoch;
    uint32_t number;
    uint32_t value;
};

struct mark_set {
    struct mark *marks;
    uint32_t mask; /* of the part in use, which grows with the search: a short one stays in cache */
    uint32_t shift;
    uint32_t size;
    uint32_t count;
    uint32_t epoch;
};

/* Room for `expected` marks at a load of a half at most, and empty for as many. ERR_NOMEM. */
int mark_set_init(struct mark_set *set, uint32_t expected, struct error *err);
void mark_set_release(struct mark_set *set);
uint64_t mark_set_memory_bytes(uint32_t expected);
void mark_set_clear(struct mark_set *set);
/* Doubles the part in use; false when there is no more. Entries move. */
bool mark_set_grow(struct mark_set *set);

/* The entry of `number`, or the free one where it belongs (mark_is_set tells). */
static inline struct mark *mark_set_find(const struct mark_set *set, uint32_t number)
{
    uint32_t i = (number * 2654435769u) >> set->shift; /* 2^32 / golden ratio */

    while (set->marks[i].epoch == set->epoch && set->marks[i].number != number)
        i = (i + 1) & set->mask;
    return &set->marks[i];
}

static inline bool mark_is_set(const struct mark_set *set, const struct mark *mark)
{
    return mark->epoch == set->epoch;
}

/* Fills the entry that mark_set_find gave; other entries may move. False when the set is full
 * (three quarters): the search has seen its fill. */
static inline bool mark_set_put(struct mark_set *set, struct mark *mark, uint32_t number,
                                uint32_t value)
{
    if (mark->epoch != set->epoch) {
        if (set->count > set->mask / 2 && mark_set_grow(set))
            mark = mark_set_find(set, number);
        if (set->count >= set->mask / 4 * 3)
            return false;
        set->count++;
    }
    *mark = (struct mark){set->epoch, number, value};
    return true;
}

#endif
