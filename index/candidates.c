/* How it works: the list is a plain array; insertion finds its place by bisection and moves the
 * tail, which for the few hundred items of a search is faster than any heap and keeps the list
 * readable in order at any time. The visited set is cleared whole: it is small, and an entry
 * without a search's number is half as wide. */
#include "index/candidates.h"

#include <assert.h>
#include <stdlib.h>

int candidates_init(struct candidates *list, uint32_t capacity, struct error *err)
{
    assert(capacity >= 1);
    memset(list, 0, sizeof *list);
    list->items = malloc((size_t)capacity * sizeof *list->items);
    if (!list->items)
        return error_set(err, ERR_NOMEM, "candidate list: no memory for %u items", capacity);
    list->capacity = capacity;
    list->limit = capacity;
    return 0;
}

void candidates_release(struct candidates *list)
{
    free(list->items);
    memset(list, 0, sizeof *list);
}

void candidates_clear(struct candidates *list, uint32_t limit)
{
    assert(limit >= 1 && limit <= list->capacity);
    list->limit = limit;
    list->count = 0;
    list->open_from = 0;
}

bool candidates_insert(struct candidates *list, float distance, uint32_t id)
{
    struct candidate *items = list->items;
    uint32_t low = 0;
    uint32_t high = list->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;
        const struct candidate *item = &items[middle];

        if (item->distance < distance || (item->distance == distance && item->id < id))
            low = middle + 1;
        else
            high = middle;
    }
    if (low < list->count && items[low].id == id && items[low].distance == distance)
        return false;
    if (list->count == list->limit) {
        if (low == list->count)
            return false;
        list->count--;
    }
    memmove(items + low + 1, items + low, (list->count - low) * sizeof *items);
    items[low] = (struct candidate){.distance = distance, .id = id, .state = CANDIDATE_OPEN};
    list->count++;
    if (low < list->open_from)
        list->open_from = low;
    return true;
}

struct candidate *candidates_nearest_open(struct candidates *list)
{
    while (list->open_from < list->count) {
        struct candidate *item = &list->items[list->open_from];

        if (item->state == CANDIDATE_OPEN)
            return item;
        list->open_from++;
    }
    return NULL;
}

static bool before(const struct candidate *a, const struct candidate *b)
{
    return a->distance < b->distance || (a->distance == b->distance && a->id < b->id);
}

static void insertion_sort(struct candidate *items, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++) {
        struct candidate item = items[i];
        uint32_t at = i;

        while (at > 0 && before(&item, &items[at - 1])) {
            items[at] = items[at - 1];
            at--;
        }
        items[at] = item;
    }
}

static void sift_down(struct candidate *items, uint32_t root, uint32_t count)
{
    struct candidate item = items[root];

    for (;;) {
        uint32_t child = 2 * root + 1;

        if (child >= count)
            break;
        if (child + 1 < count && before(&items[child], &items[child + 1]))
            child++;
        if (!before(&item, &items[child]))
            break;
        items[root] = items[child];
        root = child;
    }
    items[root] = item;
}

static void heap_sort(struct candidate *items, uint32_t count)
{
    for (uint32_t i = count / 2; i > 0; i--)
        sift_down(items, i - 1, count);
    for (uint32_t i = count; i > 1; i--) {
        struct candidate last = items[i - 1];

        items[i - 1] = items[0];
        items[0] = last;
        sift_down(items, 0, i - 1);
    }
}

static void swap(struct candidate *a, struct candidate *b)
{
    struct candidate held = *a;

    *a = *b;
    *b = held;
}

/* Quicksort on the middle element with bounds checked at every step, since a NaN compares false
 * both ways; after `depth` bad splits the rest goes to heapsort. */
static void sort_range(struct candidate *items, uint32_t count, uint32_t depth)
{
    while (count > 24) {
        uint32_t store = 0;

        if (depth-- == 0) {
            heap_sort(items, count);
            return;
        }
        swap(&items[count / 2], &items[count - 1]);
        for (uint32_t i = 0; i + 1 < count; i++) {
            if (before(&items[i], &items[count - 1]))
                swap(&items[i], &items[store++]);
        }
        swap(&items[store], &items[count - 1]);
        if (store < count - store - 1) {
            sort_range(items, store, depth);
            items += store + 1;
            count -= store + 1;
        } else {
            sort_range(items + store + 1, count - store - 1, depth);
            count = store;
        }
    }
    insertion_sort(items, count);
}

void candidates_sort(struct candidate *items, uint32_t count)
{
    sort_range(items, count, 48);
}

static uint32_t pair_bits(uint32_t expected)
{
    uint32_t bits = 4;

    while (bits < 28 && (1ull << bits) < expected)
        bits++;
    return bits;
}

uint64_t visited_memory_bytes(uint32_t expected)
{
    return sizeof(uint64_t) << pair_bits(expected);
}

int visited_init(struct visited *visited, uint32_t expected, struct error *err)
{
    memset(visited, 0, sizeof *visited);
    visited->bytes = visited_memory_bytes(expected);
    visited->shift = 32 - pair_bits(expected);
    visited->pairs = aligned_alloc(64, visited->bytes);
    if (!visited->pairs)
        return error_set(err, ERR_NOMEM, "visited set: no memory for %llu bytes",
                         (unsigned long long)visited->bytes);
    visited_clear(visited);
    return 0;
}

void visited_release(struct visited *visited)
{
    free(visited->pairs);
    memset(visited, 0, sizeof *visited);
}

void visited_clear(struct visited *visited)
{
    memset(visited->pairs, 0xff, visited->bytes);
}
